"""Arithmetic of the fused product: which variant of the source, which tiles, which pieces of the parameter axis.

Plain functions of integers, so that they are tested where there is no GPU. Two rules keep the bits of a row independent
of everything beside it: the parameter axis is cut at multiples of `SPAN` counted from parameter 0, and spans are added
in ascending order. Rows, tiles, launches and multiprocessors only decide who computes what.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from gradstore.errors import UsageError
from gradstore.projection.kind_record import Fused
from gradstore.projection.kinds import kind_of

GROUP = 256  # parameters that are handled whole; the same constants stand in src/entries.cuh
STAGE = 64
SPAN = 8192
PRECISIONS = ("fast", "exact")

_ROW_STEP = 32
_RING_BYTES = {True: 160 << 10, False: 64 << 10}  # of gradients in shared memory: Hopper, and every card since Ampere
_MAX_STAGES = 8
_SLACK = 1024  # the ring is aligned to this within its shared memory


class Tiles(Protocol):
    """How gradients are packed: so many rows together, up to a cut of the parameter axis at the least."""

    @property
    def rows(self) -> int:
        """Rows of a tile."""

    @property
    def span_bytes(self) -> int:
        """Packed gradients of a tile from one cut of the parameter axis to the next."""


@dataclass(frozen=True)
class Variant:
    """One compiled form of the product.

    Attributes:
        kind: of the entries, a name of `kinds.KINDS`.
        precision: "fast" (one 16-bit limb of each gradient) or "exact" (two).
        rows: rows of gradients in a tile of the output, a multiple of 32.
        hopper: wgmma instead of mma.
    """

    kind: str
    precision: str
    rows: int
    hopper: bool

    @property
    def limbs(self) -> int:
        """16-bit numbers that a gradient becomes."""
        return 2 if self.precision == "exact" else 1

    @property
    def tiles(self) -> int:
        """Fragments of P that a warp keeps; a tile of the output has 128 times as many rows of P."""
        return _fused(self.kind).tiles

    @property
    def rows_of_p(self) -> int:
        """Rows of P in a tile of the output."""
        return 128 * self.tiles

    @property
    def stage_bytes(self) -> int:
        """Gradients of one stage: STAGE parameters of `rows` rows."""
        return self.rows * STAGE * 2 * self.limbs

    @property
    def span_bytes(self) -> int:
        """Packed gradients of one span of a tile."""
        return self.rows * SPAN * 2 * self.limbs

    @property
    def stages(self) -> int:
        """Stages that are in shared memory at once."""
        return min(_MAX_STAGES, _RING_BYTES[self.hopper] // self.stage_bytes)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block."""
        return self.stages * self.stage_bytes + _SLACK

    @property
    def threads(self) -> int:
        """Threads of a block: eight warps that multiply, and on Hopper four of which one thread copies."""
        return 384 if self.hopper else 256

    @property
    def main(self) -> str:
        """The file in src that is compiled."""
        return "project.cu"

    @property
    def defines(self) -> dict[str, int]:
        """Preprocessor definitions of src/project.cu."""
        return {
            "KIND": _fused(self.kind).number,
            "LIMBS": self.limbs,
            "ROWS": self.rows,
            "TILES": self.tiles,
            "STAGES": self.stages,
            "WGMMA": int(self.hopper),
        }


@dataclass(frozen=True)
class Launch:
    """A consecutive piece of the parameter axis that is packed and multiplied at once.

    Attributes:
        first_group: its first group of 256 parameters, counted from parameter 0.
        groups: number of groups.
        spans: number of spans that it touches.
    """

    first_group: int
    groups: int
    spans: int


def _fused(kind: str) -> Fused:
    found = kind_of(kind).fused
    if found is None:
        raise UsageError("the fused product does not serve this kind", where="kind", got=repr(kind))
    return found


def variant_for(kind: str, precision: str, rows: int, hopper: bool) -> Variant:
    """The variant for a number of rows: as few tiles of equal size as there can be."""
    tiles = -(-rows // _fused(kind).rows[precision])
    each = -(-rows // tiles)
    return Variant(kind, precision, -(-each // _ROW_STEP) * _ROW_STEP, hopper)


def row_tiles(kind: str, precision: str) -> tuple[int, ...]:
    """Every number of rows that a tile of the output may have."""
    return tuple(range(_ROW_STEP, _fused(kind).rows[precision] + 1, _ROW_STEP))


def slabs(tiles: Tiles, rows: int, budget: int) -> Iterator[range]:
    """Rows cut into pieces of whole tiles, each so small that one span of it fits the budget (or is one tile)."""
    step = max(1, budget // tiles.span_bytes) * tiles.rows
    for first in range(0, rows, step):
        yield range(first, min(first + step, rows))


def launches(
    variant: Variant, rows: int, count: int, start: int, columns: int, budget: int, resident: int
) -> Iterator[Launch]:
    """Cut the parameter axis [start, start + columns) at multiples of `SPAN`.

    Args:
        variant: the compiled form.
        rows: rows of gradients.
        count: rows of P.
        start: parameter of the first column.
        columns: number of columns, at least 1.
        budget: bytes for packed gradients; exceeded only where one span of one tile is larger.
        resident: thread blocks that run at once, each on one tile at a time.

    Yields:
        Launches of several spans each, in order.
    """
    first, last = start // GROUP, -(-(start + columns) // GROUP)
    span_groups = SPAN // GROUP
    row_tiles = -(-rows // variant.rows)
    most = max(1, budget // (row_tiles * variant.span_bytes))
    total = -(-last // span_groups) - first // span_groups
    step = balanced_spans(row_tiles * -(-count // variant.rows_of_p), most, total, resident)
    while first < last:
        stop = min(last, (first // span_groups + step) * span_groups)
        yield Launch(first, stop - first, -(-stop // span_groups) - first // span_groups)
        first = stop


def balanced_spans(tiles: int, most: int, total: int, resident: int) -> int:
    """How many spans, of at most `most` at a time, get through `total` in the fewest rounds of `resident` blocks."""
    if total <= most:
        return total

    def rounds(step: int) -> int:
        whole, rest = divmod(total, step)
        return whole * -(-tiles * step // resident) + -(-tiles * rest // resident)

    return min(range(most, most // 2, -1), key=rounds)
