"""The fused product on a CUDA device: gradients of any size against any rows of P, in launches of bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from gradstore.projection.cuda.driver import Job, Pack
from gradstore.projection.cuda.geometry import GROUP, STAGE, Launch, Variant, launches, slabs, variant_for
from gradstore.projection.cuda.operands import operands
from gradstore.projection.entries import Entries

WORKSPACE_BYTES = 80 << 20  # for the packed gradients of a launch; two are under way at a time
_SLOTS = 2
_TURNS = 2  # counters of a tile: on Hopper its two halves go their own way


class Lanes(Protocol):
    """Two queues of a device: gradients are packed in one while the other multiplies what was packed before."""

    def packing(self, slot: int) -> AbstractContextManager[None]:
        """Within: what is queued fills a slot of memory, once its last reader is done."""

    def multiplying(self, slot: int) -> AbstractContextManager[None]:
        """Within: what is queued reads a slot, once it is filled."""


class Device(Protocol):
    """What the product asks of a device; tests put an emulation in its place."""

    hopper: bool

    def lanes(self) -> AbstractContextManager[Lanes]:
        """Two queues behind the current stream's, which goes on after both."""

    def resident(self, variant: Variant) -> int:
        """Thread blocks of the product that run at once; they wait for one another, so no launch has more."""

    def pack(self, variant: Variant, dtype: torch.dtype, job: Pack, rows: int, spans: int) -> None:
        """Queue the packing of ``rows`` x ``spans`` pieces on the current stream."""

    def multiply(self, variant: Variant, job: Job, blocks: int) -> None:
        """Queue the product by ``blocks`` thread blocks on the current stream."""


def accumulate(
    device: Device,
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

    Gradients are scaled by a power of two per (row, span of 8192 parameters) and become one float16 ("fast": relative
    error of a feature vector about 2e-4, far below the projection's own noise) or the sum of two ("exact": about 1e-6,
    as float32 products have). Signs are exact; normals become float16 too, or the sum of two. Sums are float32, in a
    fixed order, so a row's bits do not depend on the rows beside it.

    Args:
        device: where to run.
        entries: the matrix P.
        out: float32 [rows, K'].
        block: any float dtype [rows, p]; other than float32, float16 and bfloat16 it is copied to float32 first.
        start: flat parameter index of the first column; any non-negative integer.
        first_k: the row of P that column 0 of ``out`` belongs to.
        precision: "fast" or "exact".
        workspace: bytes for the packed gradients of a launch. No bit depends on it.

    Holds 168 MB of packed gradients, less where there are fewer, and 8 bytes for each (row, span) and tile. An ``out``
    or ``block`` whose columns are not adjacent is copied.
    """
    if out.numel() == 0 or block.shape[1] == 0:
        return
    variant = variant_for(entries.kind, precision, len(block), device.hopper)
    with operands(out, block) as (target, source):
        for rows in slabs(variant, len(source), workspace):
            part = slice(rows.start, rows.stop)
            _Slab(device, variant, entries, target[part], source[part], start, first_k, workspace).run()


class _Slab:
    """Rows of gradients that are packed together."""

    def __init__(
        self,
        device: Device,
        variant: Variant,
        entries: Entries,
        out: Tensor,
        block: Tensor,
        start: int,
        first_k: int,
        workspace: int,
    ) -> None:
        self.device, self.variant, self.entries = device, variant, entries
        self.out, self.block, self.start, self.first_k = out, block, start, first_k
        self.workspace = workspace
        self.row_tiles = -(-len(block) // variant.rows)
        self.k_tiles = -(-out.shape[1] // variant.rows_of_p)
        self.padded_rows = self.row_tiles * variant.rows

    def run(self) -> None:
        """Queue all launches."""
        (rows, columns), count = self.block.shape, self.out.shape[1]
        resident = self.device.resident(self.variant)
        plan = list(launches(self.variant, rows, count, self.start, columns, self.workspace, resident))
        slots = [self._slot(plan) for _ in plan[:_SLOTS]]
        with self.device.lanes() as lanes:
            for number, launch in enumerate(plan):
                slot = number % _SLOTS
                with lanes.packing(slot):
                    self._pack(launch, *slots[slot])
                with lanes.multiplying(slot):
                    self._multiply(launch, *slots[slot], resident)

    def _slot(self, plan: Sequence[Launch]) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for any launch: packed gradients, what undoes their scales, and turns at the output."""
        stages = max(launch.groups for launch in plan) * (GROUP // STAGE)
        spans = max(launch.spans for launch in plan)
        empty = torch.empty
        packed = empty(self.row_tiles * stages * self.variant.stage_bytes, dtype=torch.uint8, device=self.block.device)
        undo = empty(spans * self.padded_rows * 2, dtype=torch.float32, device=self.block.device)
        turns = empty(_TURNS * self.row_tiles * self.k_tiles, dtype=torch.int32, device=self.block.device)
        return packed, undo, turns

    def _pack(self, launch: Launch, packed: Tensor, undo: Tensor, turns: Tensor) -> None:
        job = Pack(
            *(tensor.data_ptr() for tensor in (self.block, packed, undo, turns)),
            *(*self.block.shape, self.block.stride(0), self.start, launch.first_group),
            *(launch.groups, self.variant.rows, self.padded_rows, turns.numel()),
        )
        self.device.pack(self.variant, self.block.dtype, job, self.padded_rows, launch.spans)

    def _multiply(self, launch: Launch, packed: Tensor, undo: Tensor, turns: Tensor, resident: int) -> None:
        seed = self.entries.seed
        job = Job(
            *(tensor.data_ptr() for tensor in (packed, undo, self.out, turns)),
            None,  # the device's own
            *(*self.out.shape, self.out.stride(0), launch.first_group),
            *(self.first_k, seed & 0xFFFFFFFF, seed >> 32, self.entries.domain),
            *(launch.groups, launch.spans, self.padded_rows, self.row_tiles, self.k_tiles),
        )
        units = launch.spans * self.row_tiles * self.k_tiles
        self.device.multiply(self.variant, job, min(units, resident))
