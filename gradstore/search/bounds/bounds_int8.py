"""Bounds on similarities from products of 7-bit integers, exact and compiled for processors without a matrix unit.

Rows and queries are rounded to two digits within ±63, with a step for each row and stretch of K (a class). The higher
digits are multiplied first, and what that leaves out is bounded one stretch s at a time, by the norms of what rounding
really took away:

    |error| ≤ Σ_s ‖q_s‖ ‖δ_t,s‖ + ‖δ_q,s‖ ‖t'_s‖,

some 0.035 of the norms for normal entries. Segments follow one another, and a pair is multiplied only as long as it may
still be among the best: what is left of a similarity is at most the product of the norms that are left. Of pairs that
may be in the end, low · high and high · low are added, and ‖q_low,s‖ ‖t_low,s‖ bounds the fourth product: some 0.0006.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.arithmetic.int8_digits import (
    MAX_WIDTH,
    Rounded,
    add_integer_product,
    pair_products,
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
# Of all pairs, so many that multiplying them one by one saves time.
_FEW = 0.3
# Covers float64 roundings of bounds, and of norms that were summed in float64.
_ROUNDED = 1e-9


@dataclass(frozen=True)
class RoundedQueries:
    """A group of queries, rounded.

    Attributes:
        group: the queries.
        digits: both of each segment, the higher first.
        steps: float32 [segments, g].
        coarse: float64 [g, 2 · segments]; times `_Rows.coarse`, a bound on the error of higher digits' inner products.
        fine: float64 [g, 3 · segments]; the same of both digits'.
        norms: float64 [g, segments], at least the norm of each segment.
    """

    group: QueryGroup
    digits: tuple[tuple[LeftRows, LeftRows], ...]
    steps: Tensor
    coarse: Tensor
    fine: Tensor
    norms: Tensor

    @classmethod
    def of(cls, group: QueryGroup) -> RoundedQueries:
        """Holds 2 bytes a value, and 6·K more a query while rounding."""
        phi, count = group.phi, len(group.members)
        room = torch.empty(2, 1, count, phi.K, dtype=torch.int8)
        found, left = np.empty((phi.segments, count, 4)), []
        for s in range(phi.segments):
            values, ones = group.segment(s)[:, None], torch.ones(count, 1)
            round_stretches(values, ones, room[0], room[1], found[s : s + 1], largest=MOST)
            left.append((LeftRows(room[0, 0]), LeftRows(room[1, 0])))
        sums = (phi.segments + 16) * _UNIT  # float32 sums of scaled products

        def sides(rounded: Rounded) -> tuple[Tensor, ...]:
            norm, low, missed = (torch.from_numpy(part).T for part in (rounded.norm, rounded.low, rounded.missed))
            return norm + missed, missed + sums * norm, low

        coarse, fine = (Rounded.of(found, phi.K, two=two) for two in (False, True))
        norms, *others = sides(fine)
        steps, both = torch.from_numpy(fine.step).float(), torch.cat([norms, *others], dim=1)
        return cls(group, tuple(left), steps, torch.cat(sides(coarse)[:2], dim=1), both, norms)


class IntegerBounds(Bounds):
    """Bounds by products of integers. Holds two digits of each query."""

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
        """See `Bounds`: queries in float32 and in two digits; two digits of a block."""
        schema, digits = train.schema, sum(2 * phi.length for phi in phis)
        query = max(
            4 * phi.pieces * phi.width + 2 * phi.segments * LeftRows.row_bytes(phi.K) + 8 * phi.K for phi in phis
        )
        sizes = range(most_rows(train, _BLOCK_BYTES, schema.row_bytes), 0, -1)
        making = max(phi.making for phi in phis)
        held = [(size, size * digits + streamed_bytes(schema, size, _together(size), making)) for size in sizes]
        return Needs(query, 0, 0, held)

    def __init__(self, train: Rows, groups: Sequence[QueryGroup], workers: int = 1) -> None:
        self.train, self.queries = train, tuple(RoundedQueries.of(group) for group in groups)

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
        maps = {part.group.phi for part in shared.queries}
        self._room = {phi: torch.empty(2 * phi.segments * rows * phi.K, dtype=torch.int8) for phi in maps}

    def bounds(self, start: int, stop: int, thresholds: Tensor) -> Found:
        """See `BlockBounds`."""
        rows = {phi: _Rows.empty(phi, room, stop - start) for phi, room in self._room.items()}
        for at, features, columns in self._streamed.pieces(start, stop):
            for phi, block in rows.items():
                block.write(at, phi.scaled(features, columns, self._train.where))
                phi.require_direction(block.norms[at], columns["row"], self._train.where)
        return [
            (part.group, *_bounds(part, rows[part.group.phi], thresholds[part.group.members])) for part in self._queries
        ]


@dataclass(frozen=True)
class _Rows:
    """B rounded rows.

    Attributes:
        digits: int8 [2, segments, B, K], the higher first.
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
        round_stretches(values, factors, high, low, self.found[:, at], largest=MOST)
        self.norms[at], self.exponent[at] = scaled.norms(values), scaled.exponent


def _bounds(queries: RoundedQueries, rows: _Rows, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities float64 [g, B] and their largest errors."""
    group, phi = queries.group, queries.group.phi
    query_side = torch.from_numpy(group.scale)[:, None]
    row_side = torch.from_numpy(phi.unscaled(rows.norms, rows.exponent))
    product = _Product(queries, rows)
    product.approach(thresholds[:, None] / query_side / row_side)
    center, spread = product.total.double(), product.spread
    spread.mul_(query_side).mul_(row_side * (1 + _ROUNDED))
    center.mul_(query_side).mul_(row_side)
    return center, spread.add_(center.abs(), alpha=_ROUNDED)


class _Product:
    """Inner products of rounded queries and rows, as closely as is wanted of each.

    Args:
        queries: the queries.
        rows: the rows. Those that are not finite have an infinite spread until they are multiplied to the end.

    Attributes:
        total: float32 [g, B].
        spread: float64 [g, B], how far off it may be.
    """

    def __init__(self, queries: RoundedQueries, rows: _Rows) -> None:
        self._queries, self._digits, self._segments = queries, rows.digits, rows.digits.shape[1]
        coarse, fine = (Rounded.of(rows.found, queries.group.phi.K, two=two) for two in (False, True))
        self._steps = torch.from_numpy(fine.step).float()
        self._norms = torch.from_numpy(fine.norm + fine.missed)
        self._fine = torch.from_numpy(np.concatenate([fine.missed, fine.norm, fine.low]))
        self.total = torch.zeros(len(queries.group.members), rows.digits.shape[2])
        self.spread = queries.coarse @ torch.from_numpy(np.concatenate([coarse.missed, coarse.norm]))

    def approach(self, wanted: Tensor) -> None:
        """Multiply, and more closely the pairs that may reach `wanted`, float64 [g, B]; overwrites it."""
        known, wanted = not wanted.isneginf().all(), wanted.sub_(self.spread)
        for s in range(self._segments):
            high, steps = self._queries.digits[s][0], self._queries.steps[s]
            add_integer_product(high, steps, self._digits[0, s], self._steps[s], self.total)
            if s + 1 < self._segments and self._finish_few(s + 1, wanted):
                break
        if known:  # else every pair is in question
            self._refine(wanted)

    def _finish_few(self, start: int, wanted: Tensor) -> bool:
        """Multiply segments from `start` on for the pairs that still matter, if they are few."""
        rest = self._queries.norms[:, start:] @ self._norms[start:]
        in_question = self.total + rest >= wanted
        if int(in_question.sum()) > _FEW * in_question.numel():
            return False
        places, columns = _row_by_row(in_question)
        self._add(places, columns, start, lower=False)
        rest[places, columns] = 0
        self.spread += rest
        return True

    def _refine(self, wanted: Tensor) -> None:
        """Take both digits of the pairs that may reach `wanted`; some rows at a time, for these may be all pairs."""
        fine, count = self._queries.fine @ self._fine, self.total.shape[1]
        step = -(-count // 4)
        for low in range(0, count, step):
            places, columns = _row_by_row(self.total[:, low : low + step] >= wanted[:, low : low + step])
            columns += low
            self._add(places, columns, 0, lower=True)
            self.spread[places, columns] = fine[places, columns]

    def _add(self, places: Tensor, columns: Tensor, start: int, *, lower: bool) -> None:
        """Add what segments from `start` on are for some pairs by their higher digits, or what the lower ones add."""
        for s in range(start, self._segments):
            digits, query_steps = self._queries.digits[s], self._queries.steps[s]
            rows = self._digits[:, s].unbind(), self._steps[s]
            self.total[places, columns] += pair_products(digits, query_steps, *rows, (places, columns), lower=lower)


def _row_by_row(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Where bool [g, B] holds: (queries, rows), int64, the pairs of a row one after another."""
    columns, places = pairs.T.nonzero().T
    return places.contiguous(), columns.contiguous()
