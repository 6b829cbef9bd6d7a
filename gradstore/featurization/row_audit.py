"""Checks on what is about to be stored: a silently wrong row is worse than a stopped run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import NonFiniteError, ProjectError
from gradstore.projection.kinds import DEFAULT, kind_of

_WIDENED = 1 << 19  # values that are held in float64 at once
_ROUNDED_AWAY = 1e-10  # of a squared norm, by sums in float32: a hundred times what is usual, squared


def require_finite_block(sq_norm: Tensor, rows: Sequence[int], parameter: str, split: str) -> None:
    """Refuse a block of Jacobians [n, c, p] whose squared norms [n, c] are not finite.

    Raises:
        NonFiniteError: names the first row, its class and the parameter.
    """
    if bool(torch.isfinite(sq_norm).all()):
        return
    i, c = torch.nonzero(~torch.isfinite(sq_norm))[0].tolist()
    raise NonFiniteError(
        f"the gradient of row {rows[i]}, class {c} is not finite",
        where=f"split {split!r}, parameter {parameter}",
        expected="finite values",
        got=f"squared norm {sq_norm[i, c].item()}",
        hint="Look at this row's input and logits; a NaN input, a log of zero or an overflow are the usual causes; "
        "featurize --on-bad-row skip leaves such rows out",
    )


def require_finite(sq_norm: Tensor, parts: Mapping[str, Tensor], rows: Sequence[int], split: str) -> None:
    """Refuse Jacobians whose squared norms are not finite; `require_finite_block` says which.

    Args:
        sq_norm: the sum over parameters. One look at it is enough where all is well, so that a GPU need not be waited
            for after every block.
        parts: the squared norms [n, c] of each parameter.
        rows: which rows they are.
        split: their split, for the message.
    """
    if bool(torch.isfinite(sq_norm).all()):
        return
    for parameter, part in parts.items():
        require_finite_block(part, rows, parameter, split)
    require_finite_block(sq_norm, rows, "all together", split)


def require_preserved(
    features: Tensor,
    sq_norm: Tensor,
    rows: Sequence[int],
    split: str,
    scale: float = 1.0,
    added_up: Tensor | None = None,
    *,
    kind: str = DEFAULT,
    norms: np.ndarray | None = None,
) -> None:
    """Refuse scale · features [n, c, K] whose squared norms are not those of the gradients, within the kind's band.

    See `norm_bands`. A class may have no gradient where others have one, as in a net that ends in ReLU: its features
    are zeros. Where features are sums of others (`LoweredFeatures`), of squared norms `added_up` [n, c], a class may be
    so much smaller than these that its features and its norm are their rounding errors, and different ones. Norms
    of scale · features that are known, float64 [n, c], are not taken again.

    Raises:
        NonFiniteError: names the first row whose gradient is zero for all classes, or whose norm was not kept.
    """
    zero = torch.nonzero((sq_norm == 0).all(dim=1))
    if len(zero):
        raise NonFiniteError(
            f"the gradient of row {rows[int(zero[0])]} is zero" + (" for every class" if sq_norm.shape[1] > 1 else ""),
            where=f"split {split!r}",
            expected="a gradient, of which a cosine can be taken",
            got="‖g‖² = 0",
            hint="Where the logits have gone through a ReLU, return those before it by forward=, or use --layout mixed "
            "if some classes have a gradient; otherwise widen parameters=; featurize --on-bad-row skip leaves such "
            "rows out",
        )
    low, high = kind_of(kind).norm_band(features.shape[-1])
    norm = _norms(features).cpu() * scale if norms is None else torch.from_numpy(norms)
    exact = sq_norm.cpu().double()
    ratio = torch.where((exact == 0) & (norm == 0), 1.0, norm.square() / exact)
    if added_up is not None:
        lost = _ROUNDED_AWAY * added_up.cpu().double()
        ratio = torch.where((exact <= lost) & (norm.square() <= lost), 1.0, ratio)
    bad = torch.nonzero(~((ratio >= low) & (ratio <= high)))
    if len(bad):
        i, c = bad[0].tolist()
        raise NonFiniteError(
            f"the projection of row {rows[i]}, class {c} did not keep its norm",
            where=f"split {split!r}",
            expected=f"‖features‖² / ‖g‖² between {low:.3f} and {high:.3f}",
            got=f"{ratio[i, c].item():.4g}",
            hint="This is a fault of the projection, not of the data: compare with backend='reference' and report it",
        )


def require_draws_preserved(
    features: Tensor, parts: Mapping[str, Tensor], rows: Sequence[int], split: str, draws: int, *, kind: str = DEFAULT
) -> None:
    """Refuse features [n, 1, K] of the layout "sketched" of which a draw did not keep its norm, as `require_preserved`.

    Args:
        features: P_j v_j, K / draws columns a draw.
        parts: by parameter, the squared norms [n, draws] of v_j.
        rows: which rows they are.
        split: their split.
        draws: r.
        kind: of the projection.

    Raises:
        NonFiniteError: names the first row and its draw, as a class.
    """
    each = features.reshape(len(rows), draws, -1)
    squares = torch.stack([*parts.values()]).sum(0)
    require_preserved(each, squares, rows, split, each.shape[2] ** -0.5, kind=kind)


def _norms(features: Tensor) -> Tensor:
    """Norms [n, c] of features [n, c, K], in float64; on a CPU some at a time, as torch widens all it is given."""
    step = max(1, _WIDENED // features.shape[2] if features.device.type == "cpu" else features[..., 0].numel())
    parts = features.flatten(0, 1).split(step)
    return torch.cat([torch.linalg.vector_norm(p, dim=-1, dtype=torch.float64) for p in parts]).view(features.shape[:2])


def require_labels(labels: np.ndarray, classes: int, split: str, first: int = 0) -> None:
    """Refuse labels outside -1 … classes - 1 (a single logit has the classes 0 and 1) of rows from `first` on.

    Raises:
        ProjectError: names the first row.
    """
    top = max(classes, 2)
    bad = np.flatnonzero((labels < -1) | (labels >= top))
    if bad.size:
        raise ProjectError(
            f"the label of row {first + bad[0]} is no class",
            where=f"split {split!r}",
            expected=f"0 to {top - 1}, or -1 for none",
            got=int(labels[bad[0]]),
            hint=f"{bad.size} of {len(labels)} labels are out of range",
        )
