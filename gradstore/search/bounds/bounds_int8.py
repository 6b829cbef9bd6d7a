"""Bounds on similarities from products of 7-bit integers, exact and compiled for processors without a matrix unit.

Rows and queries are rounded to ±63, with a step for each row and stretch of K (a class). What that leaves out is
bounded one stretch s at a time, by the norms of what rounding really took away:

    |error| ≤ Σ_s ‖q_s‖ ‖δ_t,s‖ + ‖δ_q,s‖ ‖t'_s‖,

some 0.035 of the norms for normal entries. Where that lets too many rows through to exact scoring, a second digit is
taken of each; the products high · high, low · high and high · low cost three times as much, and ‖q_low,s‖ ‖t_low,s‖ is
added for the fourth: some 0.0006.

Segments are multiplied one after another, and a pair only as long as it may still be among the best: what is left of a
similarity is at most the product of the norms that are left.
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
        digits: of each segment one digit or two, the higher first.
        steps: float32 [segments, g].
        sides: float64 [g, segments · (2 or 3)]; times the rows' sides, a bound on the error of an inner product.
        norms: float64 [g, segments], at least the norm of each segment.
    """

    group: QueryGroup
    digits: tuple[tuple[LeftRows, ...], ...]
    steps: Tensor
    sides: Tensor
    norms: Tensor

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
        return cls(group, tuple(left), torch.from_numpy(rounded.step).float(), sides, norm + missed)

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

    def bounds(self, start: int, stop: int, thresholds: Tensor) -> Found:
        """See `BlockBounds`."""
        queries = self._shared.queries  # which another worker may refine
        digits = len(queries[0].digits[0])
        rows = {phi: _Rows.empty(phi, room, stop - start, digits) for phi, room in self._room.items()}
        for at, features, columns in self._streamed.pieces(start, stop):
            for phi, block in rows.items():
                block.write(at, phi.scaled(features, columns, self._train.where))
                phi.require_direction(block.norms[at], columns["row"], self._train.where)
        return [(part.group, *_bounds(part, rows[part.group.phi], thresholds[part.group.members])) for part in queries]


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


def _bounds(queries: RoundedQueries, rows: _Rows, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities float64 [g, B] and their largest errors."""
    group, phi, digits = queries.group, queries.group.phi, len(rows.digits)
    rounded = Rounded.of(rows.found, phi.K, two=digits == 2)
    norm, missed = torch.from_numpy(rounded.norm), torch.from_numpy(rounded.missed)
    spread = queries.sides @ torch.cat([missed, norm, torch.from_numpy(rounded.low)][: digits + 1])
    query_side = torch.from_numpy(group.scale)[:, None]
    row_side = torch.from_numpy(phi.unscaled(rows.norms, rows.exponent))
    wanted = (thresholds[:, None] / query_side / row_side).sub_(spread)
    product = _Product(queries, rows.digits, torch.from_numpy(rounded.step).float(), norm + missed)
    center = product.up_to(wanted).double()
    spread += product.rest
    spread.mul_(query_side).mul_(row_side * (1 + _ROUNDED))
    center.mul_(query_side).mul_(row_side)
    return center, spread.add_(center.abs(), alpha=_ROUNDED)


class _Product:
    """Inner products of rounded queries and rows, a segment after another, of most pairs not to the end.

    After some segments what the others may add is bounded by their norms. Once few pairs may still become as large as
    is wanted, the other segments are multiplied for these alone. Rows that are not finite are among them: their bounds
    are infinite.

    Args:
        queries: the queries.
        digits: int8 [1 or 2, segments, B, K], of the rows.
        steps: float32 [segments, B].
        norms: float64 [segments, B], at least the norm of each segment.

    Attributes:
        total: float32 [g, B], of the segments that were multiplied.
        rest: float64 [g, B], the most that the others may add or take away.
    """

    def __init__(self, queries: RoundedQueries, digits: Tensor, steps: Tensor, norms: Tensor) -> None:
        self._queries, self._digits, self._steps, self._norms = queries, digits, steps, norms
        shape = len(queries.group.members), digits.shape[2]
        self.total, self.rest = torch.zeros(shape), torch.zeros(shape, dtype=torch.float64)

    def up_to(self, wanted: Tensor) -> Tensor:
        """Multiply until no product that is not whole may reach `wanted`, float64 [g, B]; returns the total."""
        segments = self._digits.shape[1]
        for s in range(segments):
            operands = self._operands(s)
            add_integer_product(*operands, self.total)
            if s + 1 < segments and self._finish_few(s + 1, wanted):
                break
        return self.total

    def _finish_few(self, start: int, wanted: Tensor) -> bool:
        """Multiply segments from `start` on for the pairs that still matter, if they are few."""
        rest = self._queries.norms[:, start:] @ self._norms[start:]
        open_pairs = self.total + rest >= wanted
        if int(open_pairs.sum()) > _FEW * open_pairs.numel():
            return False
        columns, places = (part.contiguous() for part in open_pairs.T.nonzero().T)
        for s in range(start, self._digits.shape[1]):
            self.total[places, columns] += pair_products(*self._operands(s), (places, columns))
        self.rest = rest.index_put_((places, columns), torch.zeros((), dtype=torch.float64))
        return True

    def _operands(self, s: int) -> tuple[tuple[LeftRows, ...], Tensor, tuple[Tensor, ...], Tensor]:
        return self._queries.digits[s], self._queries.steps[s], self._digits[:, s].unbind(), self._steps[s]
