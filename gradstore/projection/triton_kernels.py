"""The product with P as Triton kernels; `by_triton.py` launches them.

The words of `BLOCKS` consecutive generator calls, of 128 parameters each, are held as [k, block]. Bit j of word w of
all of them is one operand of a matrix product with the gradients of those parameters, which are packed in the order
[bit j][word w][row][block]: no generator call is repeated, and what a product reads lies together.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCKS = tl.constexpr(32)  # generator calls that are held together
SPAN = tl.constexpr(128 * 32)  # their parameters, which share a row's scale


@triton.jit
def _philox(c0, c1, c2, c3, key0, key1):
    """philox4x32_10 of counters and keys in uint32; see `philox.py`."""
    m0, m1 = tl.full([], 0xD2511F53, tl.uint32), tl.full([], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, m0), tl.umulhi(c2, m1)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, c2 * m1, high0 ^ c3 ^ key1, c0 * m0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _signs(words, j):
    """Bit j of each word as float16: 1 is +1, 0 is -1."""
    return (0xBC00 ^ (((words >> j) & 1) << 15)).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _power_of_two(exponent):
    """2^exponent as float32, for exponents of normal numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _add(total, signs, at, limb_size, LIMBS: tl.constexpr):
    """The total, and signs times every limb of the gradients."""
    for limb in tl.static_range(LIMBS):
        total = tl.dot(signs, tl.load(at + limb * limb_size), total)
    return total


@triton.jit(do_not_specialize=["first"])
def pack(block, packed, undo, columns, row_stride, rows, first, limb_size, ROWS: tl.constexpr, LIMBS: tl.constexpr):
    """One row and span: scaled by a power of two, its largest value to [2^14, 2^15), and cut into limbs.

    So rounding to 16 bits cannot overflow. What is not finite stays so.
    """
    row, span = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, SPAN)
    b, w, j = i % BLOCKS, i // BLOCKS % 4, i // (4 * BLOCKS)
    column = first.to(tl.int64) + span * SPAN + b * 128 + w * 32 + j
    inside = (column >= 0) & (column < tl.where(row < rows, columns, 0))
    value = tl.load(block + row.to(tl.int64) * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(value.to(tl.uint32, bitcast=True) & 0x7FFFFFFF, 0)
    exponent = (largest >> 23).to(tl.int32)  # with float32's bias of 127
    exponent = tl.where(exponent == 255, 141, tl.maximum(exponent, 14))  # 2^127 is the largest factor
    value *= _power_of_two(141 - exponent)
    tl.store(undo + span * tl.num_programs(0) + row, exponent - 141)
    tile = (row // ROWS) * tl.num_programs(1) + span
    place = tile.to(tl.int64) * (ROWS * SPAN) + (i // BLOCKS * ROWS + row % ROWS) * BLOCKS + b
    for limb in tl.static_range(LIMBS):
        half = value.to(tl.float16)
        tl.store(packed + limb * limb_size + place, half)
        value -= half.to(tl.float32)


@triton.jit(do_not_specialize=["spans", "block_low", "block_high", "first_k", "key0", "key1", "domain"])
def product(
    packed, undo, out, rows, count, out_stride, limb_size, spans,
    block_low, block_high, first_k, key0, key1, domain,
    ROWS: tl.constexpr, TILE_K: tl.constexpr, LIMBS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[r, k] += 2^undo[span, r] * sum_p P[k, p] (limbs of r)[p], over the spans of a launch."""
    k, r = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, BLOCKS)
    zero = tl.zeros([TILE_K, BLOCKS], tl.uint32)
    inside = (r < rows)[None, :] & (k < count)[:, None]
    where = out + r.to(tl.int64)[None, :] * out_stride + k[:, None]
    at = packed + tl.program_id(1).to(tl.int64) * spans * (ROWS * SPAN)
    at += tl.arange(0, ROWS)[None, :] * BLOCKS + b[:, None]
    step = ROWS * BLOCKS
    for span in range(spans):
        low = zero + block_low.to(tl.uint32) + span * BLOCKS + b[None, :].to(tl.uint32)
        high = zero + block_high.to(tl.uint32) + (low < block_low.to(tl.uint32)).to(tl.uint32)
        row_of_p = zero + (first_k + k).to(tl.uint32)[:, None]
        w0, w1, w2, w3 = _philox(
            low, high, row_of_p, zero + domain.to(tl.uint32), key0.to(tl.uint32), key1.to(tl.uint32)
        )
        total = tl.zeros([TILE_K, ROWS], tl.float32)
        for j in tl.range(32, num_stages=STAGES):
            # With two limbs the tensor cores' sums, which are rounded towards zero, are kept short.
            part = total if LIMBS == 1 else tl.zeros([TILE_K, ROWS], tl.float32)
            part = _add(part, _signs(w0, j), at, limb_size, LIMBS)
            part = _add(part, _signs(w1, j), at + step, limb_size, LIMBS)
            part = _add(part, _signs(w2, j), at + 2 * step, limb_size, LIMBS)
            part = _add(part, _signs(w3, j), at + 3 * step, limb_size, LIMBS)
            total = part if LIMBS == 1 else total + part
            at += 4 * step
        exponent = tl.load(undo + span * (tl.num_programs(1) * ROWS) + r)
        total = total * _power_of_two(exponent >> 1)[None, :] * _power_of_two(exponent - (exponent >> 1))[None, :]
        tl.store(where, tl.load(where, mask=inside, other=0.0) + total, mask=inside)
