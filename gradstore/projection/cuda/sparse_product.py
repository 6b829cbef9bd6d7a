"""The product with a sparse P on a CUDA device, by sums of integers in shared memory; see ``src/sums.cu``."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch
from torch import Tensor

from gradstore.projection.cuda.geometry import slabs
from gradstore.projection.cuda.operands import operands
from gradstore.projection.cuda.sparse_driver import SumsJob
from gradstore.projection.cuda.sparse_geometry import BLOCK, SumsLaunch, SumsVariant, sums_launches
from gradstore.projection.entries import Entries

WORKSPACE_BYTES = 160 << 20  # for the packed gradients of a launch: as much as the fused product has under way
_MOST_WORKSPACE = 1 << 30  # so that the second sizes of grids stay below 2^16


class SumsTarget(Protocol):
    """What the product asks of a device; tests put an emulation in its place."""

    @property
    def tile_rows(self) -> int:
        """Rows of gradients whose sums fit the shared memory of a thread block."""

    def pack(self, variant: SumsVariant, dtype: torch.dtype, job: ctypes.Structure, rows: int, spans: int) -> None:
        """Queue the packing of ``rows`` tiles x ``spans`` stretches on the current stream."""

    def multiply(self, variant: SumsVariant, job: SumsJob, blocks: int) -> None:
        """Queue the product with ``blocks`` blocks of rows of P on the current stream."""


def accumulate_sums(
    device: SumsTarget,
    entries: Entries,
    out: Tensor,
    block: Tensor,
    start: int,
    first_k: int,
    precision: str,
    *,
    workspace: int = WORKSPACE_BYTES,
) -> None:
    """Add ``block @ P[first_k : first_k + K', start : start + p].T`` to ``out`` in place, on the current stream.

    Gradients become multiples of a unit for each (row, stretch of 4096 parameters), of 1024 where `precision` is
    "exact": a power of two of at most 2^-29 of the sum of their sizes. That moves a row by at most 2^-18 of its norm
    ("fast", 4e-6) or 2^-20 ("exact", 1e-6), and most rows by a fifth of that. Sums of a stretch are exact, those of
    stretches float32, in a fixed order, and go to the output after every 32,768 parameters; so a row's bits do not
    depend on the rows beside it. A row that is not finite becomes NaN.

    Args:
        device: where to run.
        entries: the matrix P, a sparse one.
        out: float32 [rows, K'].
        block: any float dtype [rows, p]; other than float32, float16 and bfloat16 it is copied to float32 first.
        start: flat parameter index of the first column; any non-negative integer.
        first_k: the row of P that column 0 of ``out`` belongs to; it need not begin a block of rows.
        precision: "fast" or "exact".
        workspace: bytes for the packed gradients of a launch. No bit depends on it.

    Holds 168 MB of packed gradients, less where there are fewer, and 8 bytes for each (row, stretch). An ``out`` or
    ``block`` whose columns are not adjacent is copied.
    """
    if out.numel() == 0 or block.shape[1] == 0:
        return
    budget = min(workspace, _MOST_WORKSPACE)
    variant = SumsVariant(precision, device.tile_rows)
    with operands(out, block) as (target, source):
        for rows in slabs(variant, len(source), budget):
            part = slice(rows.start, rows.stop)
            _accumulate_slab(device, variant, entries, target[part], source[part], start, first_k, budget)


def _accumulate_slab(
    device: SumsTarget,
    variant: SumsVariant,
    entries: Entries,
    out: Tensor,
    block: Tensor,
    start: int,
    first_k: int,
    budget: int,
) -> None:
    """Rows of gradients that are packed together."""
    (rows, columns), count = block.shape, out.shape[1]
    tiles, blocks = -(-rows // variant.rows), -(-(first_k + count) // BLOCK) - first_k // BLOCK
    plan = list(sums_launches(variant, rows, start, columns, budget))
    packed, undo = _memory(variant, tiles, plan, block.device)
    for launch in plan:
        job = SumsJob(
            *(tensor.data_ptr() for tensor in (block, packed, undo, out)),
            *(rows, columns, block.stride(0), count, out.stride(0)),
            *(launch.first, launch.first * variant.stretch - start),
            *(first_k, entries.seed & 0xFFFFFFFF, entries.seed >> 32, entries.domain),
            *(launch.stretches, tiles),
        )
        device.pack(variant, block.dtype, job, tiles, launch.stretches)
        device.multiply(variant, job, blocks)


def _memory(variant: SumsVariant, tiles: int, plan: list[SumsLaunch], device: torch.device) -> tuple[Tensor, Tensor]:
    """Packed gradients of any launch, and what undoes their scales."""
    rows_of_stretches = max(launch.stretches for launch in plan) * tiles * variant.rows
    packed = torch.empty(rows_of_stretches * variant.stretch, dtype=torch.int32, device=device)
    return packed, torch.empty(rows_of_stretches * 2, dtype=torch.float32, device=device)
