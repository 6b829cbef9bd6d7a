"""How far a kernel value estimated from projected features is from the exact one, as far as theory can say.

Let g^1 … g^c be the Jacobian rows of one example and h^1 … h^c those of another, all projected by one K × p matrix P of
independent entries of mean 0 and variance 1. A kernel value is a function of quadratic forms r_k' M r_k, averaged over
the K rows r_k of P. To first order it deviates by (1/K) Σ_k (r_k' N r_k - tr N), where N = V A V' with
V = [g^1 … g^c, h^1 … h^c] [p, 2c] and A [2c, 2c] the derivative of the value by the entries of V'V:

    Σ_c ⟨g^c, h^c⟩ = T           A = 1/2 [[0, I], [I, 0]]
    cosine ρ = T / sqrt(S S')    A = 1/2 [[-ρ I / S, I / sqrt(S S')], [I / sqrt(S S'), -ρ I / S']]

with S = Σ_c ‖g^c‖², S' = Σ_c ‖h^c‖². For Gaussian entries Var(r' N r) = 2 ‖N‖², hence, with G = V'V [2c, 2c],

    variance = 2 tr((A G)²) / K            (less 2 Σ_p N_pp² / K for Rademacher, whose fourth moment is 1 and not 3)

The sparse projection, with whole blocks, has the variance of Rademacher, though its rows are not independent: of p ≠ q
the product r_kp r_kq is ±B in one row of a block with a chance of 1/B, so that Σ_k r_k' N r_k over the s B = K rows has
the variance s B² · 2 Σ_(p≠q) N_pq² / B. Its tails are heavier: a kurtosis of 3 for gradients of many like entries, and
B / s + 3 (s - 1) / s for the inner product of two gradients of one entry each, which is ±1/s where they meet in one of
the s blocks; docs/sparse.md has what was measured.

With a single row (sum over classes, layout mixed) this is (⟨g, h⟩² + ‖g‖² ‖h‖²) / K and, for the cosine, the familiar
(1 - ρ²)² / K. With c rows it defines K_eff by (1 - ρ²)² / K_eff: K if the rows of an example are parallel, up to c K if
they are orthogonal, since each class then adds information of its own. The Rademacher correction needs the Jacobians
themselves and is left out: what is reported is an upper bound there, and a tight one where gradients are spread out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradstore.kernels.definitions import Kernel


def standard_errors(a: Tensor, b: Tensor, kernel: Kernel) -> Tensor:
    """Standard error of the kernel value of each pair (a[q], b[q]), estimated from the features themselves.

    G is estimated by the features' own Gram matrix; the bias of order 1/K that this brings is removed (moments of a
    Wishart matrix). Holds the pairs' features once in float64.

    Args:
        a: features [q, c, K], any float dtype.
        b: features [q, c, K].
        kernel: a kernel on stored features.

    Returns:
        float64 [q]; 0 for a row with itself under a cosine.
    """
    if kernel.sums_classes:
        a, b = a.sum(dim=1, keepdim=True), b.sum(dim=1, keepdim=True)
    c, K = a.shape[1:]
    both = torch.cat([a, b], dim=1).double()
    gram = both @ both.transpose(1, 2)
    product = _derivative(gram, c, kernel.normalised) @ gram
    square = torch.einsum("qij,qji->q", product, product)
    trace = torch.einsum("qii->q", product)
    unbiased = (square - trace.square() / K) / (1 + 1 / K - 2 / K**2) if K > 1 else square
    return (2 * unbiased.clamp_min(0) / K).sqrt()


def effective_dimension(similarity: Tensor, standard_error: Tensor) -> Tensor:
    """K_eff of cosines: the dimension that a projection of single rows would need for the same standard error."""
    return ((1 - similarity.double().square()) / standard_error).square()


def _derivative(gram: Tensor, c: int, normalised: bool) -> Tensor:
    """A [q, 2c, 2c]."""
    eye = torch.eye(c, dtype=gram.dtype, device=gram.device)
    own, other = (torch.einsum("qii->q", gram[:, s, s]) for s in (slice(0, c), slice(c, 2 * c)))
    cross = torch.einsum("qii->q", gram[:, :c, c:])
    if normalised:
        norm = (own * other).sqrt()
        weights = (-cross / norm / own, 1 / norm, -cross / norm / other)
    else:
        weights = (torch.zeros_like(own), torch.ones_like(own), torch.zeros_like(own))
    first, mixed, last = (0.5 * weight[:, None, None] * eye for weight in weights)
    return torch.cat([torch.cat([first, mixed], 2), torch.cat([mixed, last], 2)], 1)
