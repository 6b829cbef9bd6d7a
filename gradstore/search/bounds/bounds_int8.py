"""Bounds on similarities from products of 8-bit integers: as tight as those of float32, and several times faster.

Rows and queries are rounded to two digits of 8 bits, with a step for each row and stretch of K (a class). Three integer
products, high · high, low · high and high · low, are exact; what they leave out is bounded one stretch s at a time,
by the norms of what rounding really took away:

    |error| ≤ Σ_s ‖q_s‖ ‖δ_t,s‖ + ‖δ_q,s‖ ‖t'_s‖ + ‖q_low,s‖ ‖t_low,s‖,

some 0.00015 of the norms for normal entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.arithmetic.int8 import refusal
from gradstore.arithmetic.int8_digits import (
    MAX_WIDTH,
    Rounded,
    add_integer_product,
    round_stretches,
    sample_product,
)
from gradstore.arithmetic.names import INT8_DIGITS
from gradstore.errors import UsageError
from gradstore.kernels.feature_map import FeatureMap, Scaled
from gradstore.search.bounds.bounds import BlockBounds, Bounds, Found, Needs, most_rows
from gradstore.search.query_batch import QueryGroup
from gradstore.search.streamed import Streamed, streamed_bytes
from gradstore.store.rows import Rows

# A block is large enough for a good matrix product and no larger.
_BLOCK_BYTES = 24 << 20
_UNIT = 2.0**-24
# Covers float64 roundings of bounds, and of norms that were summed in float64.
_ROUNDED = 1e-9


@dataclass(frozen=True)
class RoundedQueries:
    """A group of queries, rounded.

    Attributes:
        group: the queries.
        digits: int8 [segments, 2, g, K].
        steps: float32 [segments, g].
        sides: float64 [g, 3 · segments]; times the rows' sides, a bound on the error of an inner product.
    """

    group: QueryGroup
    digits: Tensor
    steps: Tensor
    sides: Tensor

    @classmethod
    def of(cls, group: QueryGroup) -> RoundedQueries:
        """Holds 2·D bytes a query, and 8·K more while rounding."""
        phi, count = group.phi, len(group.members)
        digits = torch.empty(phi.segments, 2, count, phi.K, dtype=torch.int8)
        found = np.empty((phi.segments, count, 4))
        for s in range(phi.segments):
            values, ones = group.segment(s)[:, None], torch.ones(count, 1)
            round_stretches(values, ones, digits[s, :1], digits[s, 1:], found[s : s + 1])
        rounded = Rounded.of(found, phi.K, two=True)
        norm, low, missed = (torch.from_numpy(part).T for part in (rounded.norm, rounded.low, rounded.missed))
        sums = (phi.segments + 16) * _UNIT  # float32 sums of scaled products
        sides = torch.cat([norm + missed, missed + sums * norm, low], dim=1)
        return cls(group, digits, torch.from_numpy(rounded.step).float(), sides)


class IntegerBounds(Bounds):
    """Bounds by products of 8-bit integers. Holds two digits of each query."""

    choice = INT8_DIGITS
    sample_product = staticmethod(sample_product)

    @classmethod
    def refusal(cls, K: int) -> UsageError | None:
        """See `Bounds`."""
        if K <= MAX_WIDTH:
            return refusal("--engine")
        return UsageError(
            "K is too large for sums of integers", where="--engine int8", expected=f"at most {MAX_WIDTH}", got=K
        )

    @classmethod
    def bytes_for(cls, train: Rows, phis: Sequence[FeatureMap]) -> Needs:
        """See `Bounds`: two digits of a block for each feature map, and some rows as stored."""
        schema, digits = train.schema, sum(2 * phi.length for phi in phis)
        query = max(6 * phi.pieces * phi.width + 8 * phi.K for phi in phis)
        sizes = range(most_rows(train, _BLOCK_BYTES, schema.row_bytes), 0, -1)
        making = max(phi.making for phi in phis)
        held = [(size, size * digits + streamed_bytes(schema, size, _together(size), making)) for size in sizes]
        return Needs(query, 0, 0, held)

    def __init__(self, train: Rows, groups: Sequence[QueryGroup], workers: int = 1) -> None:
        self.train, self.queries = train, [RoundedQueries.of(group) for group in groups]

    def block(self, rows: int) -> BlockBounds:
        """See `Bounds`."""
        return _IntegerBlock(self, rows)


def _together(block: int) -> int:
    """Rows of a block that are read together, at most."""
    return max(1, block // 2)


class _IntegerBlock(BlockBounds):
    """Holds 2·D bytes a row for each feature map, megabytes of rows as stored, and 32 bytes a row and query."""

    def __init__(self, shared: IntegerBounds, rows: int) -> None:
        self._train, self._queries = shared.train, shared.queries
        self._streamed = Streamed(self._train, rows, _together(rows))
        maps = {part.group.phi for part in self._queries}
        self._digits = {phi: torch.empty(2 * phi.segments * rows * phi.K, dtype=torch.int8) for phi in maps}

    def bounds(self, start: int, stop: int) -> Found:
        """See `BlockBounds`."""
        rows = {phi: _Rows.empty(phi, room, stop - start) for phi, room in self._digits.items()}
        for at, features, columns in self._streamed.pieces(start, stop):
            for phi, block in rows.items():
                block.write(at, phi.scaled(features, columns, self._train.where))
                phi.require_direction(block.norms[at], columns["row"], self._train.where)
        return [(part.group, *_bounds(part, rows[part.group.phi])) for part in self._queries]


@dataclass(frozen=True)
class _Rows:
    """B rounded rows.

    Attributes:
        digits: int8 [2, segments, B, K].
        found: float64 [segments, B, 4], what `Rounded.of` takes.
        norms: float64 [B], ‖Φ‖ / 2^exponent.
        exponent: int64 [B].
    """

    digits: Tensor
    found: np.ndarray
    norms: np.ndarray
    exponent: np.ndarray

    @classmethod
    def empty(cls, phi: FeatureMap, room: Tensor, count: int) -> _Rows:
        digits = room[: 2 * phi.segments * count * phi.K].view(2, phi.segments, count, phi.K)
        return cls(digits, np.empty((phi.segments, count, 4)), np.empty(count), np.empty(count, np.int64))

    def write(self, at: slice, scaled: Scaled) -> None:
        (values, factors), (high, low) = scaled.vectors(), self.digits[:, :, at]
        round_stretches(values, factors, high, low, self.found[:, at])
        self.norms[at], self.exponent[at] = scaled.norms(values), scaled.exponent


def _bounds(queries: RoundedQueries, rows: _Rows) -> tuple[Tensor, Tensor]:
    group, phi = queries.group, queries.group.phi
    rounded = Rounded.of(rows.found, phi.K, two=True)
    steps = torch.from_numpy(rounded.step).float()
    total = torch.zeros(len(group.members), len(rows.norms))
    for s in range(phi.segments):
        high, low = rows.digits[:, s]
        add_integer_product(queries.digits[s], queries.steps[s], high, low, steps[s], total)
    sides = torch.from_numpy(np.concatenate([rounded.missed, rounded.norm, rounded.low]))
    row_scale = phi.unscaled(rows.norms, rows.exponent)
    query_side, row_side = torch.from_numpy(group.scale)[:, None], torch.from_numpy(row_scale)
    spread = (queries.sides @ sides).mul_(query_side).mul_(row_side * (1 + _ROUNDED))
    center = total.double().mul_(query_side).mul_(row_side)
    return center, spread.add_(center.abs(), alpha=_ROUNDED)
