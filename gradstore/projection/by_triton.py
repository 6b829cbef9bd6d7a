"""The product with P by Triton, for any card that Triton compiles for; others than NVIDIA's are untried.

A second implementation, which shares nothing with the fused CUDA source but the definition of P. A row's bits depend
on nothing beside it: rows are scaled, and sums cut, at multiples of `SPAN` counted from parameter 0, and one program
adds all spans of its tile of the output in ascending order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradstore.projection import triton_kernels
from gradstore.projection.entries import KINDS, Entries

ROW_TILES = {"fast": (16, 32, 64, 128), "exact": (16, 32, 64)}  # rows of gradients of a program
WORKSPACE_BYTES = 56 << 20  # for packed gradients; exceeded only where one span of all rows is larger
BLOCKS, SPAN = triton_kernels.BLOCKS.value, triton_kernels.SPAN.value
_TILE_K = 128  # rows of P of a program
_WARPS, _STAGES = 8, 3
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MASK32 = 0xFFFFFFFF


def accumulate(entries: Entries, out: Tensor, block: Tensor, start: int, first_k: int, precision: str) -> None:
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

    Holds 56 MB of packed gradients, or one span of all rows where that is more. An ``out`` or ``block`` whose columns
    are not adjacent is copied.
    """
    if out.numel() == 0 or block.shape[1] == 0:
        return
    source = block if block.dtype in _DTYPES else block.to(torch.float32)
    source = source if source.stride(1) == 1 else source.contiguous()
    target = out if out.stride(1) == 1 else out.contiguous()
    (rows, columns), limbs = source.shape, 2 if precision == "exact" else 1
    tiles = ROW_TILES[precision]
    tile = next((tile for tile in tiles if rows <= tile), tiles[-1])
    padded = -(-rows // tile) * tile
    first, last = start // SPAN, -(-(start + columns) // SPAN)
    most = min(last - first, max(1, WORKSPACE_BYTES // (padded * SPAN * 2 * limbs)))
    packed = torch.empty(limbs, padded * most * SPAN, dtype=torch.float16, device=block.device)
    undo = torch.empty(most * padded, dtype=torch.int32, device=block.device)
    words = (first_k, entries.seed & _MASK32, entries.seed >> 32, 2 * entries.stream + KINDS.index(entries.kind))
    grid = -(-target.shape[1] // _TILE_K), padded // tile
    for span in range(first, last, most):
        spans, call = min(most, last - span), span * BLOCKS
        triton_kernels.pack[padded, spans](
            source, packed, undo, columns, source.stride(0), rows, span * SPAN - start, packed.stride(0),
            ROWS=tile, LIMBS=limbs, num_warps=_WARPS,
        )  # fmt: skip
        triton_kernels.product[grid](
            packed, undo, target, rows, target.shape[1], target.stride(0), packed.stride(0), spans,
            *(_signed(word) for word in (call & _MASK32, call >> 32, *words)),
            ROWS=tile, TILE_K=_TILE_K, LIMBS=limbs, STAGES=_STAGES, num_warps=_WARPS,
        )  # fmt: skip
    if target is not out:
        out.copy_(target)


def _signed(word: int) -> int:
    """A word of 32 bits as Triton passes it."""
    return word - (1 << 32) if word >= 1 << 31 else word
