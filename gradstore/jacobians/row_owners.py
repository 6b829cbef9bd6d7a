"""Which rows of a layer's output belong to which example, and a proof that they do.

Models fold, transpose and reorder their batch. A layer's rows are therefore assigned to examples by one of a few
arrangements, guessed from shapes, and the guess is audited on every batch with one extra backward pass: weighting
example i's logits by `w_i` must weight exactly its own rows of every layer's output gradient by `w_i`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FIRST, SECOND, FOLDED, FOLDED_LAST = "first", "second", "folded", "folded-last"
ANY = (FIRST, SECOND, FOLDED, FOLDED_LAST)

# Relative disagreement that rounding may cause between two backward passes, by the coarsest dtype involved.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def rounding_of(model: nn.Module, logits: Tensor) -> float:
    """Relative difference that rounding may make between two passes, by the coarsest dtype on the way."""
    dtypes = {logits.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    return max(ROUNDING.get(dtype, 0.0) for dtype in dtypes)


def candidates(shape: torch.Size, n: int, allowed: tuple[str, ...]) -> list[str]:
    """Those of the arrangements that a layer's output of this shape may have in a batch of n, the likeliest first."""
    return [how for how in allowed if fits(shape, n, how)]


def by_example(tensor: Tensor, n: int, arrangement: str) -> Tensor:
    """Bring a tensor of rows to [n, rows per example, …]."""
    if arrangement == FIRST:
        return tensor.unsqueeze(1)
    if arrangement == SECOND:
        return tensor.movedim(1, 0)
    if arrangement == FOLDED:
        return tensor.unflatten(0, (n, -1))
    return tensor.unflatten(0, (-1, n)).movedim(1, 0)


def deltas_by_example(deltas: Tensor, n: int, arrangement: str) -> Tensor:
    """The same of some classes' gradients [f, …] of a tensor of rows: [n, f, rows per example, …]."""
    if arrangement == FIRST:
        return deltas.unsqueeze(2).transpose(0, 1)
    if arrangement == SECOND:
        return deltas.movedim(2, 0)
    if arrangement == FOLDED:
        return deltas.unflatten(1, (n, -1)).transpose(0, 1)
    return deltas.unflatten(1, (-1, n)).movedim(2, 0)


def fits(shape: torch.Size, n: int, arrangement: str) -> bool:
    """Whether a tensor of this shape can be arranged so at all."""
    if arrangement == SECOND:
        return len(shape) > 2 and shape[1] == n
    return shape[0] == n if arrangement == FIRST else shape[0] % n == 0


def weights(count: int, like: Tensor) -> Tensor:
    """Distinct fixed weights in ±[0.5, 1.5), [count]; the golden ratio spreads them for any count."""
    steps = torch.arange(1, count + 1, dtype=torch.float64) * 0.6180339887498949
    values = (steps % 1.0) + 0.5
    values[1::2] *= -1
    return values.to(like.dtype).to(like.device)


def row_errors(weighted: Tensor, total: Tensor, factors: Tensor, arrangement: str) -> tuple[Tensor, Tensor]:
    """How far `weighted` is from `total` with each example's rows scaled by that example's weight.

    Args:
        weighted: gradient of `Σ_i w_i Σ_c u_c logits[i, c]` with respect to a layer's output.
        total: gradient of `Σ_i Σ_c u_c logits[i, c]`, the same shape.
        factors: w [n], in the gradients' dtype.
        arrangement: the assignment of rows to be proved.

    Returns:
        Of each example's rows, the norms of `total` and of the difference, [n] in float32 or wider, on the device.
    """
    n = len(factors)
    ours = by_example(total, n, arrangement).flatten(1)
    theirs = by_example(weighted, n, arrangement).flatten(1)
    difference = torch.addcmul(theirs, factors[:, None], ours, value=-1)
    dtype = torch.promote_types(ours.dtype, torch.float32)
    scale, error = (torch.linalg.vector_norm(rows, dim=1, dtype=dtype) for rows in (ours, difference))
    return scale, error


def owned(scales: Tensor, errors: Tensor, tolerance: float, wholes: Tensor) -> Tensor:
    """The audit: of which layers each row belongs to its example.

    Of an example whose rows hold NaN or infinity nothing is asked: it is refused or left out by itself, and must not
    change how its neighbours are computed.

    Args:
        scales: norms of each example's rows, [layers, n].
        errors: how far they are from what they have to be, the same shape.
        tolerance: relative difference that rounding may make.
        wholes: [layers], the norm of a layer's gradient that would make its parameters' that of the model's largest.
            What is below a hundredth of it is rounding, as a query's weight may be, where attention is all but uniform.

    Returns:
        bool [layers], on the device.
    """
    typical = scales.nan_to_num(0, 0, 0).amax(1)
    allowed = tolerance * (scales + 1e-2 * torch.maximum(typical, wholes)[:, None])
    return ((errors <= allowed) | ~scales.isfinite()).all(1)
