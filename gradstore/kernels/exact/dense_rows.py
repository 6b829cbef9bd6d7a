"""Products of dense Jacobian rows: columns are formed a slice at a time, multiplied in float32 and added up in float64.

On a CPU worker threads form the rows of some batches each, and share a product; a processor's matrix unit is used where
there is one (`gradstore.arithmetic.matrix_unit`, whose products are right to about 1e-6), and BLAS elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from gradstore.arithmetic import matrix_unit
from gradstore.arithmetic.product import equal_shares
from gradstore.jacobians.reused_memory import reused
from gradstore.kernels.exact.factors import (
    Held,
    column_slices,
    count,
    device_of,
    rows_and_classes,
    unit_columns,
    write_columns,
)
from gradstore.machine.threads import Workers

S = TypeVar("S")
T = TypeVar("T")

# Columns whose products float32 sums take before they are added to the float64 ones.
_COLUMNS = 1 << 16
# Rows of a symmetric product that BLAS computes together; of their square both halves are.
_SQUARE = 128


def workers_for(device: torch.device) -> AbstractContextManager[Workers | None]:
    """The threads that share the work on a CPU; none on another device, which has its own queue."""
    return Workers() if device.type == "cpu" else nullcontext()


class Sums:
    """Float32 sums of products over some columns, which go to float64 now and then.

    Args:
        out: float64 [n, m], added to.
        own: both sides are the same rows; nothing left of the diagonal is computed, but for some values near it.
        workers: share a product.
    """

    def __init__(self, out: Tensor, own: bool, workers: Workers | None) -> None:
        self._out, self._own, self._workers = out, own, workers
        self._sums = torch.zeros(out.shape, device=out.device)
        self._columns = 0

    def add(self, left: Tensor, right: Tensor, at: int = 0) -> None:
        """Add left [r, w] @ right [m, w]ᵀ, float32, to the rows from `at` on."""
        self._columns += right.shape[1] * len(left) // len(self._out)
        diagonal = at if self._own else None
        shares = equal_shares(len(left), len(right), diagonal, self._workers.count if self._workers else 1)

        def add_share(share: tuple[int, int]) -> None:
            low, high = share
            out = self._sums[at + low : at + high]
            _add_product(left[low:high], right, out, None if diagonal is None else diagonal + low)

        each(self._workers, add_share, shares)
        if self._columns >= _COLUMNS:
            self.settle()

    def settle(self) -> None:
        """Add the float32 sums to the float64 ones; to be called at the end."""
        for low in range(0, len(self._out), _SQUARE):  # converting all at once would hold them twice
            self._out[low : low + _SQUARE] += self._sums[low : low + _SQUARE]
        self._sums.zero_()
        self._columns = 0


def each(workers: Workers | None, work: Callable[[S], T], jobs: Iterable[S]) -> list[T]:
    """The results in order, by the workers where there are any."""
    return workers.map(work, jobs) if workers else [work(job) for job in jobs]


def _add_product(left: Tensor, right: Tensor, out: Tensor, diagonal: int | None) -> None:
    if left.device.type == "cpu" and matrix_unit.available():
        matrix_unit.add_product(left, right, out, diagonal=diagonal)
        return
    step = len(left) if diagonal is None else _SQUARE
    for low in range(0, len(left), step):
        first = 0 if diagonal is None else diagonal + low
        out[low : low + step, first:].addmm_(left[low : low + step], right[first:].T)


@dataclass(frozen=True)
class Piece:
    """Columns of one block of parameters.

    Attributes:
        block: its place among the blocks.
        part: which of its columns, as `column_slices` counts them.
        width: columns, of all classes.
    """

    block: int
    part: slice
    width: int


def slices(blocks: Sequence[Sequence[Held]], room: int, *, joined: bool) -> Iterator[list[Piece]]:
    """All columns of several blocks, cut and put together to slices.

    Args:
        blocks: for each block of parameters, its batches.
        room: columns, times classes, that a slice may have, unless the least there can be has more.
        joined: a slice may have columns of several blocks.

    Yields:
        The pieces of a slice.
    """
    slice_, width = list[Piece](), 0
    for i, batches in enumerate(blocks):
        c = rows_and_classes(batches[0])[1]
        for part in column_slices(batches, room * count(batches)):
            piece = Piece(i, part, c * (part.stop - part.start) * unit_columns(batches[0]))
            if slice_ and (not joined or width + piece.width > room):
                yield slice_
                slice_, width = [], 0
            slice_.append(piece)
            width += piece.width
    if slice_:
        yield slice_


def formed(
    blocks: Sequence[Sequence[Held]],
    pieces: Sequence[Piece],
    batches: range,
    workers: Workers | None,
    squares: Sequence[Tensor] | None = None,
) -> Tensor:
    """Dense rows of some batches, float32 [n, w]: pieces side by side, classes side by side within a piece.

    Args:
        blocks: for each block of parameters, its batches.
        pieces: the columns.
        batches: which of the batches.
        workers: share them.
        squares: for each block float64 [n, c], to which the squared norms of rows are added; None where not wanted.

    Returns:
        float32 [n, w].
    """
    first = blocks[pieces[0].block]
    starts = [0]
    for k in batches:
        starts.append(starts[-1] + rows_and_classes(first[k])[0])
    like = torch.empty((), device=device_of(first[0]))
    out = reused((starts[-1], sum(piece.width for piece in pieces)), like)

    def form(i: int) -> None:
        rows, at = slice(starts[i], starts[i + 1]), 0
        for piece in pieces:
            block = blocks[piece.block][batches[i]]
            place = out[rows, at : at + piece.width].unflatten(1, (rows_and_classes(block)[1], -1))
            write_columns(block, piece.part, place)
            if squares is not None:
                squares[piece.block][rows] += torch.linalg.vector_norm(place, dim=2).double().square()
            at += piece.width

    each(workers, form, range(len(batches)))
    return out
