"""Arithmetic of the product by sums with a sparse P: its variants, and the launches that cover the parameter axis.

Plain functions of integers, so that they are tested where there is no GPU. The parameter axis is cut at multiples of
`CUT` counted from parameter 0, where sums go to the output, and in between at multiples of a stretch; so the bits of a
row depend neither on launches nor on other rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

CUT = 32768  # the same constants stand in src/sums.cu
BLOCK = 1024
THREADS = 512
SUMS_ROW_TILES = (32,)  # numbers of rows that fill whole tiles on every device
_STRETCH = {"fast": 4096, "exact": 1024}
_MOST_ROWS, _FEWER_ROWS = 32, 16


@dataclass(frozen=True)
class SumsVariant:
    """One compiled form of the product.

    Attributes:
        precision: "fast" or "exact".
        rows: of gradients in a tile, 32 or 16.
    """

    precision: str
    rows: int

    @property
    def stretch(self) -> int:
        """Parameters that share a row's unit; the finer, the more often sums leave shared memory."""
        return _STRETCH[self.precision]

    @property
    def stretches_of_cut(self) -> int:
        """Stretches from one cut to the next."""
        return CUT // self.stretch

    @property
    def span_bytes(self) -> int:
        """Packed gradients of a tile from one cut to the next."""
        return CUT * self.rows * 4

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block: a sum for each row of gradients and of a block of P."""
        return BLOCK * self.rows * 4

    @property
    def main(self) -> str:
        """The file in src that is compiled."""
        return "sums.cu"

    @property
    def defines(self) -> dict[str, int]:
        """Preprocessor definitions of src/sums.cu."""
        return {"ROWS": self.rows, "STRETCH": self.stretch}


@dataclass(frozen=True)
class SumsLaunch:
    """A consecutive piece of the parameter axis that is packed and multiplied at once.

    Attributes:
        first: its first stretch, counted from parameter 0.
        stretches: number of stretches.
    """

    first: int
    stretches: int


def tile_rows(shared_bytes: int) -> int:
    """Choose the tile by the shared memory that a thread block may have.

    Of the cards since Ampere some give it 163 KiB or more (compute capability 8.0, 8.7, 9.0, 10), the others 99 KiB.

    Returns:
        Rows of gradients in a tile.
    """
    return _MOST_ROWS if shared_bytes >= SumsVariant("fast", _MOST_ROWS).shared_bytes else _FEWER_ROWS


def sums_launches(variant: SumsVariant, rows: int, start: int, columns: int, budget: int) -> Iterator[SumsLaunch]:
    """Cut the parameter axis [start, start + columns) at multiples of `CUT`.

    Args:
        variant: the compiled form.
        rows: rows of gradients.
        start: parameter of the first column.
        columns: number of columns, at least 1.
        budget: bytes for packed gradients; exceeded only where one cut of the tiles is larger.

    Yields:
        Launches of several cuts each, in order.
    """
    first, last = start // variant.stretch, -(-(start + columns) // variant.stretch)
    step = max(1, budget // (-(-rows // variant.rows) * variant.span_bytes))
    while first < last:
        stop = min(last, (first // variant.stretches_of_cut + step) * variant.stretches_of_cut)
        yield SumsLaunch(first, stop - first)
        first = stop
