"""Tiles of a Gram matrix: which rows meet which, in an order that reads rows seldom and holds few of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from gradstore.errors import UsageError
from gradstore.machine.byte_counts import format_bytes
from gradstore.machine.prefetch import prefetched

S = TypeVar("S")
T = TypeVar("T")

CELL = 16
"""Rows and columns at which a tile may begin are multiples of this."""

_MAX_BLOCK = 1024


@dataclass(frozen=True)
class Tile:
    """A rectangle of a Gram matrix.

    Attributes:
        start_a: its first row.
        start_b: its first column.
        values: [rows, columns], float32, or float64 from an exact kernel.
    """

    start_a: int
    start_b: int
    values: np.ndarray

    @property
    def rows(self) -> range:
        """The rows of the matrix that it covers."""
        return range(self.start_a, self.start_a + self.values.shape[0])

    @property
    def columns(self) -> range:
        """The columns of the matrix that it covers."""
        return range(self.start_b, self.start_b + self.values.shape[1])


Skip = Callable[[range, range], bool]
"""Whether a rectangle (rows, columns) is already known and need not be computed."""


def nothing(rows: range, columns: range) -> bool:
    """The `Skip` that skips nothing."""
    return False


@dataclass(frozen=True)
class Grid:
    """How a Gram matrix is cut.

    Rows are taken a group at a time and stay in memory, while the columns pass by a block at a time. Of a symmetric
    matrix only the blocks on and above the diagonal are computed.

    Attributes:
        n: rows of the matrix.
        m: its columns.
        symmetric: both sides are the same rows.
        block: columns that pass by together, a multiple of `CELL`.
        group: rows held together, a multiple of `block`.
        ahead: operands are loaded in a thread, ahead of the arithmetic.
    """

    n: int
    m: int
    symmetric: bool
    block: int
    group: int
    ahead: bool = True

    def tiles(
        self,
        load_a: Callable[[range], T],
        load_b: Callable[[range], T],
        multiply: Callable[[Sequence[T], T], np.ndarray],
        skip: Skip = nothing,
    ) -> Iterator[Tile]:
        """Compute the matrix tile by tile; each tile lies within one group of rows and one block of columns.

        Args:
            load_a: the operand of some rows of a group, at most `block` of them, in order.
            load_b: the same for columns that pass by.
            multiply: (operands of consecutive rows, operand of columns) -> their tile.
            skip: rectangles to leave out.

        Yields:
            Tiles, row by row.
        """
        for group in _cut(range(self.n), self.group):
            if self.symmetric:
                yield from self._symmetric_panel(group, load_a, load_b, multiply, skip)
            else:
                yield from self._panel(group, load_a, load_b, multiply, skip)

    def _symmetric_panel(
        self,
        group: range,
        load_a: Callable[[range], T],
        load_b: Callable[[range], T],
        multiply: Callable[[Sequence[T], T], np.ndarray],
        skip: Skip,
    ) -> Iterator[Tile]:
        """The group against itself, block by block as it arrives, and then against all later columns."""
        resident: list[T] = []
        wanted = [
            block
            for block in _cut(range(group.start, self.n), self.block)
            if not skip(range(group.start, min(block.stop, group.stop)), block)
        ]
        if not wanted:
            return
        needed = [*_cut(group, self.block), *(block for block in wanted if block.start >= group.stop)]
        load = lambda block: load_a(block) if block.start < group.stop else load_b(block)  # noqa: E731
        for block, operand in self._loaded(load, needed):
            if block.start < group.stop:
                resident.append(operand)
            if block in wanted:
                yield Tile(group.start, block.start, multiply(resident, operand))

    def _panel(
        self,
        group: range,
        load_a: Callable[[range], T],
        load_b: Callable[[range], T],
        multiply: Callable[[Sequence[T], T], np.ndarray],
        skip: Skip,
    ) -> Iterator[Tile]:
        """The group against all columns."""
        wanted = [block for block in _cut(range(self.m), self.block) if not skip(group, block)]
        if not wanted:
            return
        held = _cut(group, self.block)
        requests = [*((load_a, span) for span in held), *((load_b, span) for span in wanted)]
        resident: list[T] = []
        for (_, block), operand in self._loaded(lambda request: request[0](request[1]), requests):
            if len(resident) < len(held):
                resident.append(operand)
            else:
                yield Tile(group.start, block.start, multiply(resident, operand))

    def _loaded(self, load: Callable[[S], T], requests: Sequence[S]) -> Iterator[tuple[S, T]]:
        if self.ahead:
            return prefetched(load, requests)
        return ((request, load(request)) for request in requests)


def plan_grid(
    n: int,
    m: int,
    *,
    symmetric: bool,
    held: int,
    loading: int,
    value: int,
    memory: int,
    fixed: int = 0,
    most: int = _MAX_BLOCK,
    ahead: bool = True,
) -> Grid:
    """The cut that reads least within a memory budget.

    Args:
        n: rows of the matrix.
        m: its columns.
        symmetric: both sides are the same rows.
        held: bytes of one row's operand.
        loading: bytes that making one row's operand takes beside the operand itself.
        value: bytes that one value of a tile takes while it is made.
        memory: the budget. In it are: the group, the blocks that pass by, a tile, and what is fixed.
        fixed: bytes that are taken whatever the cut.
        most: the largest block.
        ahead: operands are loaded in a thread, so that one is ready and one being made while one is in use.

    Returns:
        The cut.

    Raises:
        UsageError: not even the smallest cut fits.
    """
    passing, room = (3 if ahead else 1) * held + loading, memory - fixed
    block = max(CELL, min(most, -(-max(n, m) // CELL) * CELL))
    while block > CELL and (passing * block > room // 2 or block * (passing + held + value * block) > room):
        block = max(CELL, block // 2 // CELL * CELL)
    rows = (room - passing * block) // (held + value * block)
    if rows < block:
        need = fixed + block * (passing + held + value * block)
        raise UsageError(
            "too little memory", where="--memory", expected=f"at least {format_bytes(need)}", got=format_bytes(memory)
        )
    return Grid(n, m, symmetric, block, rows // block * block, ahead)


def _cut(span: range, size: int) -> list[range]:
    return [range(start, min(start + size, span.stop)) for start in range(span.start, span.stop, size)]
