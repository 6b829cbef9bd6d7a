"""The product with P in Triton: signs made in registers, gradients as one or two float16 limbs, for any card that Triton has.

A second implementation, independent of the fused CUDA source, and the way to cards that are not NVIDIA's. The words of
`BLOCKS` consecutive generator calls (128 parameters each) lie as the matrix instruction's A operand does, [k, block]. Bit j
of word w of all of them is the operand of one product, so gradients are packed in the order [bit j][word w][row][block]
and no generator call is repeated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradstore.projection.entries import KINDS, Entries

BLOCKS = 32  # generator calls of one product
SPAN = 128 * BLOCKS  # parameters that share a row's scale and are summed before they reach the output
WORKSPACE_BYTES = 56 << 20  # for packed gradients; exceeded only where one span of all rows is larger
ROW_TILES = (16, 32, 64, 128)  # rows of gradients of a program
_TILE_K = 128  # rows of P of a program
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _round(c0, c1, c2, c3, key0, key1):
    high0, high2 = tl.umulhi(c0, tl.full([], 0xD2511F53, tl.uint32)), tl.umulhi(c2, tl.full([], 0xCD9E8D57, tl.uint32))
    low0, low2 = c0 * tl.full([], 0xD2511F53, tl.uint32), c2 * tl.full([], 0xCD9E8D57, tl.uint32)
    return high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0


@triton.jit
def _philox(c0, c1, c2, c3, key0, key1):
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, key0, key1)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _signs(words, j):
    """Bit j of each word as float16: 1 is +1, 0 is -1."""
    return (0xBC00 ^ (((words >> j) & 1) << 15)).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _add(total, signs, at, limb_size, LIMBS: tl.constexpr):
    for limb in tl.static_range(LIMBS):
        total = tl.dot(signs, tl.load(at + limb * limb_size), total)
    return total


@triton.jit
def _pack(block, packed, undo, columns, row_stride, rows, first, limb_size, padded_rows,
          R: tl.constexpr, BLOCKS: tl.constexpr, LIMBS: tl.constexpr, SPAN: tl.constexpr, MODE: tl.constexpr):
    """One span of one row: scaled by a power of two so that its largest value comes to [2^14, 2^15), and cut into limbs."""
    row, span = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, SPAN)
    b = i % BLOCKS
    if MODE == 1:
        j, w = i // BLOCKS % 32, i // (32 * BLOCKS)
    else:
        w, j = i // BLOCKS % 4, i // (4 * BLOCKS)
    column = first + span * SPAN + b * 128 + w * 32 + j
    inside = (column >= 0) & (column < columns) & (row < rows)
    value = tl.load(block + row.to(tl.int64) * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    bits = tl.max(value.to(tl.uint32, bitcast=True) & 0x7FFFFFFF, 0)
    # Subnormal numbers are multiplied by 2^127 at most, which brings them below 2^1; what is not finite stays so.
    biased = tl.maximum((bits >> 23).to(tl.int32), 14)
    biased = tl.where(biased > 254, 141, biased)
    up = 268 - biased  # the bits of 2^(141 - biased): in [14, 254]
    value *= (up << 23).to(tl.float32, bitcast=True)
    scale = ((biased - 14).to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(biased == 14, 5.877471754111438e-39, scale)
    tl.store(undo + span * padded_rows + row, scale)
    tile = (row // R) * tl.num_programs(1) + span
    place = tile.to(tl.int64) * (R * SPAN) + ((i // BLOCKS) * R + row % R) * BLOCKS + b
    for limb in tl.static_range(LIMBS):
        half = value.to(tl.float16)
        tl.store(packed + limb * limb_size + place, half)
        value -= half.to(tl.float32)


@triton.jit
def _product(packed, undo, out, rows, count, out_stride, limb_size, padded_rows, spans, block_low, block_high, first_k,
             key0, key1, domain, still, R: tl.constexpr, K: tl.constexpr, BLOCKS: tl.constexpr, LIMBS: tl.constexpr,
             SPAN: tl.constexpr, STAGES: tl.constexpr, MODE: tl.constexpr):
    """out[r, k] += sum over spans of undo[span, r] * sum_p P[k, p] (limbs of r)[p]."""
    k, r = tl.program_id(0) * K + tl.arange(0, K), tl.program_id(1) * R + tl.arange(0, R)
    b = tl.arange(0, BLOCKS)
    zero = tl.zeros([K, BLOCKS], tl.uint32)
    inside = (r < rows)[None, :] & (k < count)[:, None]
    at = packed + tl.program_id(1).to(tl.int64) * spans * (R * SPAN) + tl.arange(0, R)[None, :] * BLOCKS + b[:, None]
    for span in range(spans):
        low = zero + block_low.to(tl.uint32) + span * BLOCKS + b[None, :].to(tl.uint32)
        high = zero + block_high.to(tl.uint32) + (low < block_low.to(tl.uint32)).to(tl.uint32)
        row_of_p = zero + (first_k + k).to(tl.uint32)[:, None]
        w0, w1, w2, w3 = _philox(low, high, row_of_p, zero + domain.to(tl.uint32), key0.to(tl.uint32), key1.to(tl.uint32))
        sum = tl.zeros([K, R], tl.float32)
        if MODE == 0:
            for j in tl.range(32, num_stages=STAGES):
                sum = _add(sum, _signs(w0, j), at, limb_size, LIMBS)
                sum = _add(sum, _signs(w1, j), at + R * BLOCKS, limb_size, LIMBS)
                sum = _add(sum, _signs(w2, j), at + 2 * R * BLOCKS, limb_size, LIMBS)
                sum = _add(sum, _signs(w3, j), at + 3 * R * BLOCKS, limb_size, LIMBS)
                at += 4 * R * BLOCKS
        elif MODE == 1:
            for w in tl.static_range(4):
                words = w0 if w == 0 else w1 if w == 1 else w2 if w == 2 else w3
                for j in tl.range(32, num_stages=STAGES):
                    sum = _add(sum, _signs(words, j), at, limb_size, LIMBS)
                    at += R * BLOCKS
        else:
            for j in tl.range(128, num_stages=STAGES):
                sum = _add(sum, _signs(w0, 0), at, limb_size, LIMBS)
                at += R * BLOCKS
                w0, w1, w2, w3 = w1, w2, w3, w0 >> 1
        scale = tl.load(undo + span * padded_rows + r)
        where = (out + (tl.program_id(1).to(tl.int64) * R * out_stride + tl.program_id(0) * K + span * still)) + (
            tl.arange(0, R)[None, :] * out_stride + (tl.arange(0, K)[:, None] + span * still))
        old = tl.load(where, mask=inside, other=0.0)
        tl.store(where, old + sum * scale[None, :], mask=inside)


def accumulate(entries: Entries, out: Tensor, block: Tensor, start: int, first_k: int, precision: str, **tuned) -> None:
    if out.numel() == 0 or block.shape[1] == 0:
        return
    source = block if block.dtype in _DTYPES else block.to(torch.float32)
    source = source if source.stride(1) == 1 else source.contiguous()
    target = out if out.stride(1) == 1 else out.contiguous()
    (rows, columns), count = source.shape, target.shape[1]
    limbs = 2 if precision == "exact" else 1
    R = tuned.get("R") or next((tile for tile in ROW_TILES if rows <= tile), ROW_TILES[-1])
    K, B, warps, stages = tuned.get("K", _TILE_K), tuned.get("B", BLOCKS), tuned.get("warps", 8), tuned.get("stages", 3)
    MODE, span = tuned.get("mode", 0), 128 * B
    padded = -(-rows // R) * R
    first, last = start // span, -(-(start + columns) // span)
    step = min(last - first, max(1, WORKSPACE_BYTES // (padded * span * 2 * limbs)))
    packed = torch.empty(limbs, padded * step * span, dtype=torch.float16, device=block.device)
    undo = torch.empty(step * padded, dtype=torch.float32, device=block.device)
    key = (entries.seed & 0xFFFFFFFF, entries.seed >> 32, 2 * entries.stream + KINDS.index(entries.kind))
    for begin in range(first, last, step):
        spans, low = min(step, last - begin), begin * B
        _pack[(padded, spans)](source, packed, undo, columns, source.stride(0), rows, begin * span - start,
                               packed.stride(0), padded, R=R, BLOCKS=B, LIMBS=limbs, SPAN=span, MODE=MODE, num_warps=8)
        words = [_signed(word) for word in (low & 0xFFFFFFFF, low >> 32, first_k, *key)]
        _product[(-(-count // K), padded // R)](packed, undo, target, rows, count, target.stride(0), packed.stride(0),
                                                padded, spans, *words, 0, R=R, K=K, BLOCKS=B, LIMBS=limbs, SPAN=span,
                                                STAGES=stages, MODE=MODE, num_warps=warps)
    if target is not out:
        out.copy_(target)


def _signed(word: int) -> int:
    """A word as the 32-bit integer that Triton passes."""
    return word - (1 << 32) if word >= 1 << 31 else word
