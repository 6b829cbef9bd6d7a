"""The product with P by Triton, for any card that Triton compiles for; others than NVIDIA's are untried.

A second implementation, which shares nothing with the fused CUDA source but the definition of P. A row's bits depend
on nothing beside it: rows are scaled, and sums cut, at multiples of `SPAN` counted from parameter 0, and one program
adds all spans of its tile of the output in ascending order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradstore.projection import triton_kernels
from gradstore.projection.entries import Entries

ROW_TILES = {"fast": (16, 32, 64, 128), "exact": (16, 32, 64)}  # rows of gradients of a program
WORKSPACE_BYTES = 56 << 20  # for packed gradients; exceeded only where one span of one tile is larger
BLOCKS, SPAN = triton_kernels.BLOCKS.value, triton_kernels.SPAN.value
_TILE_K = 128  # rows of P of a program
_WARPS, _STAGES = 8, 3
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MASK32 = 0xFFFFFFFF


def accumulate(
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

    Gradients are scaled by a power of two per (row, span of 4096 parameters) and become one float16 ("fast": relative
    error of a feature vector about 2e-4) or the sum of two ("exact": about 1e-6), as in `cuda.accumulate`.

    Args:
        entries: the matrix P, of signs.
        out: float32 [rows, K'].
        block: any float dtype [rows, p]; other than float32, float16 and bfloat16 it is copied to float32 first.
        start: flat parameter index of the first column; any non-negative integer.
        first_k: the row of P that column 0 of ``out`` belongs to.
        precision: "fast" or "exact".
        workspace: bytes for the packed gradients of a launch. No bit depends on it.

    Holds 56 MB of packed gradients. An ``out`` or ``block`` whose columns are not adjacent is copied.
    """
    if out.numel() == 0 or block.shape[1] == 0:
        return
    source = block if block.dtype in _DTYPES else block.to(torch.float32)
    source = source if source.stride(1) == 1 else source.contiguous()
    target = out if out.stride(1) == 1 else out.contiguous()
    limbs, tiles = 2 if precision == "exact" else 1, ROW_TILES[precision]
    tile = next((tile for tile in tiles if len(source) <= tile), tiles[-1])
    some = max(1, workspace // (tile * SPAN * 2 * limbs)) * tile  # rows of which one span fits
    with torch.cuda.device_of(source):  # Triton launches on the current device
        for first in range(0, len(source), some):
            rows = slice(first, first + some)
            _add(entries, target[rows], source[rows], start, first_k, limbs, tile, workspace)
    if target is not out:
        out.copy_(target)


def _add(
    entries: Entries, out: Tensor, block: Tensor, start: int, first_k: int, limbs: int, tile: int, workspace: int
) -> None:
    """Add the product of some rows, in launches whose packed gradients fit the workspace."""
    rows, columns = block.shape
    padded = -(-rows // tile) * tile
    first, last = start // SPAN, -(-(start + columns) // SPAN)
    most = min(last - first, max(1, workspace // (padded * SPAN * 2 * limbs)))
    packed = torch.empty(limbs, padded * most * SPAN, dtype=torch.float16, device=block.device)
    undo = torch.empty(most * padded, dtype=torch.int32, device=block.device)
    words = (first_k, entries.seed & _MASK32, entries.seed >> 32, entries.domain)
    grid = -(-out.shape[1] // _TILE_K), padded // tile
    for span in range(first, last, most):
        spans, call = min(most, last - span), span * BLOCKS
        triton_kernels.pack[padded, spans](
            block, packed, undo, columns, block.stride(0), rows, span * SPAN - start, packed.stride(0),
            ROWS=tile, LIMBS=limbs, num_warps=_WARPS,
        )  # fmt: skip
        triton_kernels.product[grid](
            packed, undo, out, rows, out.shape[1], out.stride(0), packed.stride(0), spans,
            *(_signed(word) for word in (call & _MASK32, call >> 32, *words)),
            ROWS=tile, TILE_K=_TILE_K, LIMBS=limbs, STAGES=_STAGES, num_warps=_WARPS,
        )  # fmt: skip


def _signed(word: int) -> int:
    """A word of 32 bits as Triton passes it."""
    return word - (1 << 32) if word >= 1 << 31 else word
