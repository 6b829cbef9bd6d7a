"""How far a kernel value estimated in the layout "sketched" is from the exact one: its variance, and its error bars.

Features are r parts of K/r columns, f_j = P_j v_j with v_j = Σ_c s_jc g^c for random signs s_j and independent P_j. For
two examples with gradients g^c and h^c let M_cd = ⟨g^c, h^d⟩, A_cd = ⟨g^c, g^d⟩, B_cd = ⟨h^c, h^d⟩, S = (M + Mᵀ) / 2.

**No bias.** E_P ⟨P_j v_j, P_j w_j⟩ = (K/r) ⟨v_j, w_j⟩ = (K/r) s_jᵀ M s_j, and E_s sᵀ M s = tr M = Σ_c ⟨g^c, h^c⟩ = T,
so (1/K) Σ_j ⟨P_j v_j, P_j w_j⟩ has mean T.

**Variance.** Signs have E[s_a s_b s_c s_d] = 1 where they pair up, so for symmetric X and Y

    E[(sᵀ X s)(sᵀ Y s)] = tr X tr Y + Q(X, Y),        Q(X, Y) = 2 (tr XY - Σ_c X_cc Y_cc)

and sᵀ M s, which is sᵀ S s, has the variance Q(S, S) (Hutchinson's, over classes). Given s, the product of K/r rows of
P has the variance (‖v‖² ‖w‖² + ⟨v, w⟩²) / (K/r), less for Rademacher entries. Both together, of r independent draws:

    variance = Q(S, S) / r + (tr A tr B + Q(A, B) + T² + Q(S, S)) / K

The layout "mixed" has (tr A tr B + T²) / K. The first term is the price of r backward passes in place of one a class:
it does not fall with K. It is 2 tr A tr B / r at most, where all classes have one gradient, and smaller the more
directions the gradients of the classes have.

**Error bars.** The draws are independent, so their own spread tells all of the variance, the projection's included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradstore.kernels.definitions import Kernel
from gradstore.kernels.projection_error import standard_errors
from gradstore.store.schema import draws_of


def errors_of(a: Tensor, b: Tensor, kernel: Kernel, identity: Mapping[str, Any]) -> Tensor:
    """Standard error of the kernel value of each pair of rows [q, c, K] of stores of this identity, float64 [q]."""
    draws = draws_of(identity)
    return sketched_errors(a, b, draws, normalised=kernel.normalised) if draws else standard_errors(a, b, kernel)


def sketched_errors(a: Tensor, b: Tensor, draws: int, *, normalised: bool) -> Tensor:
    """Standard error of the kernel value of each pair (a[q], b[q]), from the spread of its draws.

    A draw's x_j = ⟨f_j, f'_j⟩, of a cosine x_j / sqrt(S S') - ρ/2 (‖f_j‖²/S + ‖f'_j‖²/S'), to first order; S and S' are
    the means of ‖f_j‖² and ‖f'_j‖². The deviation of r such values over sqrt(r).

    Args:
        a: features [q, 1, K], any float dtype.
        b: features [q, 1, K].
        draws: r, at least 2.
        normalised: whether the kernel is a cosine.

    Returns:
        float64 [q]; 0 for a row with itself under a cosine.
    """
    left, right = (rows.double().reshape(len(rows), draws, -1) for rows in (a, b))
    products = (left * right).sum(2)
    if not normalised:
        return products.std(1) * draws**0.5  # of r x_j, whose mean is the value
    own, other = left.square().sum(2), right.square().sum(2)
    mean_own, mean_other = own.mean(1, keepdim=True), other.mean(1, keepdim=True)
    scale = (mean_own * mean_other).sqrt()
    cosine = products.mean(1, keepdim=True) / scale
    return (products / scale - cosine / 2 * (own / mean_own + other / mean_other)).std(1) / draws**0.5
