"""Bounds on similarities from products of bfloat16 limbs, which the processor's matrix unit multiplies.

A row t and a query q are cut into one limb or two each, t = t' + δ_t. What one limb leaves is measured, some 0.0017 of
the norm; two leave at most 2^-17, and nothing of a float16. Sums of N roundings in float32 (`rounding_bound`) and, of
two limbs a side, the products of two lower ones, left out, make up the rest:

    |computed − ⟨q, t⟩| ≤ ‖q‖ ‖δ_t‖ + ‖δ_q‖ ‖t'‖ + (γ + 2^-16) ‖q'‖ ‖t'‖,   γ = N u / (1 − N u), u = 2^-24,

by Cauchy and Schwarz; `limb_error` is that in units of ‖q‖ ‖t‖. One limb a side, 0.0034, costs a third of two, 0.00004,
and lets more rows through to exact scoring; so one is taken until too many get through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from gradstore.arithmetic import matrix_unit
from gradstore.arithmetic.bfloat16_limbs import LIMB, limb_error, relative_rests, rounding_bound, sample_product
from gradstore.arithmetic.matrix_unit import Packed, Strips, aligned, pack
from gradstore.arithmetic.names import BFLOAT16
from gradstore.errors import UsageError
from gradstore.kernels.feature_map import FeatureMap, Scaled
from gradstore.machine.threads import Workers
from gradstore.search.bounds.bounds import BlockBounds, Bounds, Found, Needs, bounds_within, most_rows
from gradstore.search.query_batch import QueryGroup
from gradstore.search.streamed import Streamed, streamed_bytes
from gradstore.store.rows import Rows

# The matrix unit is so fast that packed queries should be read from memory seldom: blocks are larger than for BLAS.
_BLOCK_BYTES = 80 << 20
# Queries whose limbs are measured together: few, for copies of them are made.
_TOGETHER = 16
_STRIPS = 64
"""A block's rows are a multiple of this: with two limbs a value there is room for half of them."""


@dataclass(frozen=True)
class PackedQueries:
    """A group of queries, ready to be multiplied by rows, a segment at a time.

    Attributes:
        group: the queries.
        packed: of each segment.
        rest: float64 [g], what the limbs leave of each query at most, in units of its norm.
        exact: whether two limbs leave nothing of a row.
    """

    group: QueryGroup
    packed: tuple[Packed, ...]
    rest: np.ndarray
    exact: bool

    @property
    def limbs(self) -> int:
        """Limbs of a value."""
        return self.packed[0].limbs

    @classmethod
    def of(cls, group: QueryGroup, dtype: str, workers: int = 1) -> PackedQueries:
        """With one limb: holds 2 bytes a value, queries rounded up to 32, and 8·K more a query and worker meanwhile.

        Args:
            group: the queries.
            dtype: of the training store's features.
            workers: threads that pack.

        Returns:
            The queries, packed.
        """

        def pack_segment(s: int) -> tuple[Packed, np.ndarray]:
            part = group.segment(s)
            return pack(part, 1), np.concatenate([_left_out(rows) for rows in part.split(_TOGETHER)])

        with Workers(workers) as pool:
            found = pool.map(pack_segment, range(group.phi.segments))
        squares = np.add.accumulate([squares for _, squares in found])[-1]
        exact = dtype != "float32" and group.phi.as_stored
        return cls(group, tuple(packed for packed, _ in found), relative_rests(squares, group.norms), exact)

    def refined(self) -> PackedQueries:
        """With two limbs: holds 4 bytes a value."""
        packed = tuple(pack(self.group.segment(s), 2) for s in range(self.group.phi.segments))
        return replace(self, packed=packed, rest=np.full(len(self.rest), LIMB**2 / 2))

    def error(self, row_rest: np.ndarray) -> Tensor:
        """What similarities are off at most, in units of ‖q‖ ‖t‖, float64 [g, B].

        Args:
            row_rest: float64 [B], what first limbs leave of the rows, in units of their norms.

        Returns:
            float64 [g, B].
        """
        added = rounding_bound(self.packed[0].width, len(self.packed))
        if self.limbs == 2:
            row_rest = np.full(len(row_rest), 0 if self.exact else LIMB**2 / 2)
            added += LIMB**2
        return limb_error(torch.from_numpy(self.rest), torch.from_numpy(row_rest), added)


def _left_out(rows: Tensor) -> np.ndarray:
    """‖x − h‖² of each row, float64, h being its values' first limbs."""
    lower = rows - rows.bfloat16().float()
    return torch.linalg.vector_norm(lower, dim=1, dtype=torch.float64).square_().numpy()


class LimbBounds(Bounds):
    """Bounds by the matrix unit. Holds the queries in one limb, until `refine` is called."""

    choice = BFLOAT16
    sample_product = staticmethod(sample_product)

    @classmethod
    def refusal(cls, K: int) -> UsageError | None:
        """See `Bounds`."""
        return matrix_unit.refusal(cls.choice.name, "--engine")

    @classmethod
    def bytes_for(cls, train: Rows, phis: Sequence[FeatureMap]) -> Needs:
        """See `Bounds`: queries in float32 and in two limbs, which follow one limb, and whole strips of rows."""
        query, preparing = max(10 * phi.pieces * phi.width for phi in phis), max(8 * phi.K for phi in phis)
        fixed = sum(31 * 6 * phi.length for phi in phis)  # queries of a feature map are rounded up to 32
        most = most_rows(train, _BLOCK_BYTES, sum(2 * phi.length for phi in phis))
        sizes = range(max(_STRIPS, most // _STRIPS * _STRIPS), 0, -_STRIPS)
        return Needs(query, preparing, fixed, [(size, _block_bytes(train, phis, size)) for size in sizes])

    def __init__(self, train: Rows, groups: Sequence[QueryGroup], workers: int = 1) -> None:
        self.train = train
        self.parts = tuple(PackedQueries.of(group, train.schema.dtype, workers) for group in groups)
        self._lock = Lock()

    def block(self, rows: int) -> BlockBounds:
        """See `Bounds`."""
        return _LimbBlock(self, rows)

    def refine(self) -> None:
        """Take two limbs from the next block on."""
        with self._lock:
            if any(part.limbs == 1 for part in self.parts):
                self.parts = tuple(part.refined() for part in self.parts)


class _LimbBlock(BlockBounds):
    """Holds `_block_bytes`, and 32 bytes a row and query.

    Rows are cut into limbs while they are in the cache after reading and checking; they are multiplied when a whole
    block of them is there, since the packed queries come from memory for every block.
    """

    def __init__(self, queries: LimbBounds, rows: int) -> None:
        self.train, self.queries, self._rows = queries.train, queries, _strip_rows(rows)
        self._streamed = Streamed(self.train, self._rows)
        self._rooms = {
            phi: aligned(Strips.bytes_needed(phi.segments, phi.K, self._rows, 1))
            for phi in {part.group.phi for part in queries.parts}
        }

    def bounds(self, start: int, stop: int, thresholds: Tensor) -> Found:
        """See `BlockBounds`."""
        parts = self.queries.parts
        step = self._rows // max(part.limbs for part in parts)
        found = [self._bounds(parts, low, min(low + step, stop)) for low in range(start, stop, step)]
        if len(found) == 1:
            return found[0]
        return [
            (part.group, torch.cat([bound[i][1] for bound in found], 1), torch.cat([bound[i][2] for bound in found], 1))
            for i, part in enumerate(parts)
        ]

    def _bounds(self, parts: Sequence[PackedQueries], start: int, stop: int) -> Found:
        limbs, where = max(part.limbs for part in parts), self.train.where
        sizes = self._rows // limbs, stop - start, limbs
        placed = {phi: _Placed(phi, *sizes, room) for phi, room in self._rooms.items()}
        for at, features, columns in self._streamed.pieces(start, stop):
            for phi, rows in placed.items():
                rows.place(at, phi.scaled(features, columns, where))
                phi.require_direction(rows.norms[at], columns["row"], where)
        return [(part.group, *placed[part.group.phi].bounds(part)) for part in parts]


class _Placed:
    """Rows of a block under one feature map.

    Args:
        phi: the feature map.
        capacity: rows.
        count: of them there are.
        limbs: of a value.
        room: memory for them.
    """

    def __init__(self, phi: FeatureMap, capacity: int, count: int, limbs: int, room: np.ndarray) -> None:
        self._strips = Strips(phi.segments, phi.K, capacity, limbs, room)
        self.norms, self._exponent = np.empty(count), np.empty(count, np.int64)
        self._factors = torch.empty(phi.segments, count)

    def place(self, at: slice, scaled: Scaled) -> None:
        """Some rows."""
        values, factors = scaled.vectors()  # factors are applied to products
        self._strips.place(at.start, values)
        self.norms[at], self._exponent[at], self._factors[:, at] = scaled.norms(values), scaled.exponent, factors.T

    def bounds(self, queries: PackedQueries) -> tuple[Tensor, Tensor]:
        """Similarities float64 [g, B] and their largest errors."""
        group, count = queries.group, len(self.norms)
        out, squares = torch.zeros(count, len(group.members)), torch.zeros(count, dtype=torch.float64)
        for s, packed in enumerate(queries.packed):
            factors = self._factors[s]
            self._strips.add_product(s, count, packed, out, left_factors=factors)
            squares += self._strips.rests[s, :count] * factors.double().square()
        error = queries.error(relative_rests(squares.numpy(), self.norms))
        return bounds_within(group, out.T.double(), self.norms, self._exponent, error)


def _strip_rows(block: int) -> int:
    """Rows that a block has room for: whole strips, and with two limbs half of them."""
    return -(-block // _STRIPS) * _STRIPS


def _block_bytes(train: Rows, phis: Sequence[FeatureMap], block: int) -> int:
    """Bytes that a worker holds for a block, beside those a row and query."""
    rows = _strip_rows(block)
    making = max(phi.making for phi in phis)
    return streamed_bytes(train.schema, rows, making=making) + sum(
        Strips.bytes_needed(phi.segments, phi.K, rows, 1) for phi in phis
    )
