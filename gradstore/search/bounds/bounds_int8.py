"""Bounds on similarities from products of 7-bit integers, exact and compiled for processors without a matrix unit.

Rows and queries are rounded to ±63, with a step for each row and stretch of K (a class). What that leaves out is
bounded one stretch s at a time, by the norms of what rounding really took away:

    |error| ≤ Σ_s ‖q_s‖ ‖δ_t,s‖ + ‖δ_q,s‖ ‖t'_s‖,

some 0.035 of the norms for normal entries. Where that lets too many rows through to exact scoring, a second digit is
taken of each; the products high · high, low · high and high · low cost three times as much, and ‖q_low,s‖ ‖t_low,s‖ is
added for the fourth: some 0.0006.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from gradstore.arithmetic.int8_digits import (
    MAX_WIDTH,
    Rounded,
    add_integer_product,
    round_stretches,
    sample_product,
)
from gradstore.arithmetic.names import INT8_DIGITS
from gradstore.arithmetic.seven_bits import MOST, LeftRows, refusal
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
        digits: of each segment one digit or two, the higher first.
        steps: float32 [segments, g].
        sides: float64 [g, segments · (2 or 3)]; times the rows' sides, a bound on the error of an inner product.
    """

    group: QueryGroup
    digits: tuple[tuple[LeftRows, ...], ...]
    steps: Tensor
    sides: Tensor

    @classmethod
    def of(cls, group: QueryGroup, digits: int = 1) -> RoundedQueries:
        """Holds as many bytes a value as digits are taken, and 7·K more a query while rounding."""
        phi, count = group.phi, len(group.members)
        room = torch.empty(digits, 1, count, phi.K, dtype=torch.int8)
        found, left = np.empty((phi.segments, count, 4)), []
        for s in range(phi.segments):
            values, ones = group.segment(s)[:, None], torch.ones(count, 1)
            round_stretches(values, ones, room[0], _second(room), found[s : s + 1], largest=MOST)
            left.append(tuple(LeftRows(digit[0]) for digit in room))
        rounded = Rounded.of(found, phi.K, two=digits == 2)
        norm, low, missed = (torch.from_numpy(part).T for part in (rounded.norm, rounded.low, rounded.missed))
        sums = (phi.segments + 16) * _UNIT  # float32 sums of scaled products
        sides = torch.cat([norm + missed, missed + sums * norm, low][: digits + 1], dim=1)
        return cls(group, tuple(left), torch.from_numpy(rounded.step).float(), sides)

    def refined(self) -> RoundedQueries:
        """With two digits."""
        return self.of(self.group, 2)


def _second(digits: Tensor) -> Tensor | None:
    """The lower digit, where there is one."""
    return digits[1] if len(digits) > 1 else None


class IntegerBounds(Bounds):
    """Bounds by products of integers. Holds one digit of each query, and two once `refine` was called."""

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
        """See `Bounds`: queries in float32 and in three digits, two of which follow one; two digits of a block."""
        schema, digits = train.schema, sum(2 * phi.length for phi in phis)
        query = max(
            4 * phi.pieces * phi.width + 3 * phi.segments * LeftRows.row_bytes(phi.K) + 8 * phi.K for phi in phis
        )
        sizes = range(most_rows(train, _BLOCK_BYTES, schema.row_bytes), 0, -1)
        making = max(phi.making for phi in phis)
        held = [(size, size * digits + streamed_bytes(schema, size, _together(size), making)) for size in sizes]
        return Needs(query, 0, 0, held)

    def __init__(self, train: Rows, groups: Sequence[QueryGroup], workers: int = 1) -> None:
        self.train, self.queries = train, tuple(RoundedQueries.of(group) for group in groups)
        self._lock = Lock()

    def block(self, rows: int) -> BlockBounds:
        """See `Bounds`."""
        return _IntegerBlock(self, rows)

    def refine(self) -> None:
        """Take two digits from the next block on."""
        with self._lock:
            if len(self.queries[0].digits[0]) == 1:
                self.queries = tuple(part.refined() for part in self.queries)


def _together(block: int) -> int:
    """Rows of a block that are read together, at most."""
    return max(1, block // 2)


class _IntegerBlock(BlockBounds):
    """Holds 2·D bytes a row for each feature map, megabytes of rows as stored, and 32 bytes a row and query."""

    def __init__(self, shared: IntegerBounds, rows: int) -> None:
        self._train, self._shared = shared.train, shared
        self._streamed = Streamed(self._train, rows, _together(rows))
        maps = {part.group.phi for part in shared.queries}
        self._room = {phi: torch.empty(2 * phi.segments * rows * phi.K, dtype=torch.int8) for phi in maps}

    def bounds(self, start: int, stop: int) -> Found:
        """See `BlockBounds`."""
        queries = self._shared.queries  # which another worker may refine
        digits = len(queries[0].digits[0])
        rows = {phi: _Rows.empty(phi, room, stop - start, digits) for phi, room in self._room.items()}
        for at, features, columns in self._streamed.pieces(start, stop):
            for phi, block in rows.items():
                block.write(at, phi.scaled(features, columns, self._train.where))
                phi.require_direction(block.norms[at], columns["row"], self._train.where)
        return [(part.group, *_bounds(part, rows[part.group.phi])) for part in queries]


@dataclass(frozen=True)
class _Rows:
    """B rounded rows.

    Attributes:
        digits: int8 [1 or 2, segments, B, K].
        found: float64 [segments, B, 4], what `Rounded.of` takes.
        norms: float64 [B], ‖Φ‖ / 2^exponent.
        exponent: int64 [B].
    """

    digits: Tensor
    found: np.ndarray
    norms: np.ndarray
    exponent: np.ndarray

    @classmethod
    def empty(cls, phi: FeatureMap, room: Tensor, count: int, digits: int) -> _Rows:
        shape = digits, phi.segments, count, phi.K
        values = room[: digits * phi.segments * count * phi.K].view(shape)
        return cls(values, np.empty((phi.segments, count, 4)), np.empty(count), np.empty(count, np.int64))

    def write(self, at: slice, scaled: Scaled) -> None:
        (values, factors), digits = scaled.vectors(), self.digits[:, :, at]
        round_stretches(values, factors, digits[0], _second(digits), self.found[:, at], largest=MOST)
        self.norms[at], self.exponent[at] = scaled.norms(values), scaled.exponent


def _bounds(queries: RoundedQueries, rows: _Rows) -> tuple[Tensor, Tensor]:
    group, phi, digits = queries.group, queries.group.phi, len(rows.digits)
    rounded = Rounded.of(rows.found, phi.K, two=digits == 2)
    steps = torch.from_numpy(rounded.step).float()
    total = torch.zeros(len(group.members), len(rows.norms))
    for s in range(phi.segments):
        add_integer_product(queries.digits[s], queries.steps[s], rows.digits[:, s].unbind(), steps[s], total)
    sides = torch.from_numpy(np.concatenate([rounded.missed, rounded.norm, rounded.low][: digits + 1]))
    row_scale = phi.unscaled(rows.norms, rows.exponent)
    query_side, row_side = torch.from_numpy(group.scale)[:, None], torch.from_numpy(row_scale)
    spread = (queries.sides @ sides).mul_(query_side).mul_(row_side * (1 + _ROUNDED))
    center = total.double().mul_(query_side).mul_(row_side)
    return center, spread.add_(center.abs(), alpha=_ROUNDED)
