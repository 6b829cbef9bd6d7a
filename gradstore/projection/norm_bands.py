"""How far ‖P g‖² / (K ‖g‖²) of a right projection may be from 1, up to a chance of 1e-12 a row.

A store of 10^9 rows and classes is refused wrongly once in a thousand.
"""

from __future__ import annotations

import math

_FALSE_ALARM = 1e-12


def dense_band(K: int) -> tuple[float, float]:
    """Bound the ratio for independent entries, Gaussian or of signs.

    For a Gaussian P the ratio is a chi-squared variable with K degrees of freedom over K, bounded by Laurent and
    Massart (2000), lemma 1; a Rademacher P is concentrated at least as well (Achlioptas 2003).

    Returns:
        Least and greatest, near 1 ± 7.4 sqrt(2/K).
    """
    t = math.log(1 / _FALSE_ALARM)
    return max(0.0, 1 - 2 * math.sqrt(t / K)), 1 + 2 * math.sqrt(t / K) + 2 * t / K


def sparse_band(blocks: int, rows: int) -> tuple[float, float]:
    """Bound the ratio for one non-zero ±sqrt(B) in each column and each of s blocks of B rows.

    The ratio less 1 is the mean over blocks of Z_j = Σ_(p ≠ q in one row of block j) ± g_p g_q / ‖g‖², independent and
    of mean 0. Its variance is 2 (1 - Σ g_p⁴ / ‖g‖⁴) / (s B), below 2/K. Where g has two equal entries Z_j is ±1 with
    a chance of 1/B, or else 0: a few blocks in which they meet move the ratio by 1/s each. Bennett's inequality with
    terms of that size and the variance 2/K,

        P(|ratio - 1| > t) <= 2 exp(-v h(u)),   v = 2 s / B,   u = t s / v,   h(u) = (1 + u) ln(1 + u) - u

    bounds that case. That no other g does worse is not proved; the tests compute the tails of vectors of up to five
    entries, equal and not, exactly, and all are far below. Vectors of many entries of like size are as concentrated as
    under signs.

    Args:
        blocks: s.
        rows: B, of a block.

    Returns:
        Least and greatest: 0.40 to 1.60 for ten blocks of 1024, 0.90 to 1.10 for a hundred, and no lower bound for five
        or fewer.
    """
    v = 2 * blocks / rows
    target = math.log(2 / _FALSE_ALARM) / v
    low, high = 0.0, 2.0 + target
    for _ in range(100):  # h rises from 0, and h(u) > u for u > e²
        u = (low + high) / 2
        low, high = (u, high) if (1 + u) * math.log1p(u) - u < target else (low, u)
    t = high * v / blocks
    return max(0.0, 1 - t), 1 + t
