"""Philox4x32-10, the counter-based generator behind every entry of the projection (Salmon et al., SC 2011).

Written in torch int64 arithmetic so that one definition runs on every device: a 32-bit word lives in an int64 lane, and
a 32 x 32 -> 64 bit product may wrap the sign bit, which the masks after it remove.
"""

from __future__ import annotations

from torch import Tensor

MASK32 = 0xFFFFFFFF
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10

Counter = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32_10(counter: Counter, key: tuple[int, int]) -> Counter:
    """Four random 32-bit words per counter.

    Args:
        counter: four broadcastable int64 tensors with values in [0, 2^32).
        key: two integers in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            _high(product_1) ^ c1 ^ k0,
            product_1 & MASK32,
            _high(product_0) ^ c3 ^ k1,
            product_0 & MASK32,
        )
        k0, k1 = (k0 + _WEYL_0) & MASK32, (k1 + _WEYL_1) & MASK32
    return c0, c1, c2, c3


def split_key(seed: int) -> tuple[int, int]:
    """The generator's key for a seed in [0, 2^64): (low word, high word)."""
    return seed & MASK32, seed >> 32


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & MASK32
