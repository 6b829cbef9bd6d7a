"""The kernels: each is a feature map Φ plus a normalisation, κ(x, x') = ⟨Φ(x), Φ(x')⟩ / (‖Φ(x)‖ ‖Φ(x')‖).

A name means the same in Python, on the command line and in files. `proj-` kernels are computed from stores; the others
exactly, from a project. Each is one entry here: options, help, errors and README name what is listed, and
`gradstore.kernels.feature_map` does on stored rows what an entry of `PROJECTED` says. It imports no torch, so that help
needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradstore.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from gradstore.kernels.feature_map import FeatureMap
    from gradstore.store.rows import Rows

    Weights = Callable[[Mapping[str, np.ndarray]], np.ndarray]
    State = Mapping[str, np.ndarray]
    Fit = Callable[[Rows, FeatureMap, int], State]
    Apply = Callable[[Tensor, State], Tensor]


@dataclass(frozen=True)
class Kernel:
    """One kernel (Engel et al., ICLR 2024).

    Attributes:
        name: the same in Python, on the command line and in files.
        formula: what it computes.
        sums_classes: Φ is Σ_c φ^c [K] rather than all φ^c side by side [c·K].
        normalised: the kernel is a cosine.
        averages: the value is divided by the number of classes.
        pairs_classes: there is one value for each pair of classes.
        note: of a kernel on stored features, a few words for help.
        exact: of a kernel on stored features, the exact one that it estimates; "" where there is none.
        weights: w of Φ = Σ_c w_c φ^c as a function of what a store knows of some rows (`Rows.read` without the
            features: label, logits, …), float64 [n, c]; None for 1. For kernels that sum classes.
        fit: what Φ depends on beside the row, by name, from the training rows, their map without it, and a budget in
            bytes; None where it depends on nothing. A surrogate keeps it in its file.
        apply: with `fit`: Φ float32 [n, D], which it may overwrite, and what was fitted -> the kernel's Φ float32
            [n, D], the same row whatever its company. Called from several threads at once.
    """

    name: str
    formula: str
    sums_classes: bool
    normalised: bool
    averages: bool = False
    pairs_classes: bool = False
    note: str = ""
    exact: str = ""
    weights: Weights | None = None
    fit: Fit | None = None
    apply: Apply | None = None


PROJECTED = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "proj-trntk",
            "cosine of Σ_c ⟨P g_i^c, P g_j^c⟩ (eq. 8)",
            sums_classes=False,
            normalised=True,
            note="eq. 8",
            exact="trntk",
        ),
        Kernel(
            "proj-pntk",
            "cosine of ⟨P Σ_c g_i^c, P Σ_c g_j^c⟩ (eq. 7)",
            sums_classes=True,
            normalised=True,
            note="eq. 7",
            exact="pntk-cosine",
        ),
        Kernel(
            "proj-trntk0",
            "Σ_c ⟨P g_i^c, P g_j^c⟩, not normalised",
            sums_classes=False,
            normalised=False,
            note="not normalised",
            exact="trntk0",
        ),
    )
}
"""On stored features; the first is the default."""


JACOBIAN = {
    kernel.name: kernel
    for kernel in (
        Kernel("trntk", "cosine of Σ_c ⟨g_i^c, g_j^c⟩ (eq. 5)", sums_classes=False, normalised=True),
        Kernel("trntk0", "Σ_c ⟨g_i^c, g_j^c⟩, not normalised", sums_classes=False, normalised=False),
        Kernel("pntk", "⟨Σ_c g_i^c, Σ_c g_j^c⟩ / C (eq. 6)", sums_classes=True, normalised=False, averages=True),
        Kernel("pntk-cosine", "cosine of ⟨Σ_c g_i^c, Σ_c g_j^c⟩", sums_classes=True, normalised=True),
        Kernel(
            "entk", "⟨g_i^c, g_j^d⟩ at [i C + c, j C + d]", sums_classes=False, normalised=False, pairs_classes=True
        ),
    )
}
REPRESENTATION = {
    kernel.name: kernel
    for kernel in (
        Kernel("ck", "cosine of the inputs of the final linear layer", sums_classes=True, normalised=True),
        Kernel("embedding", "cosine by the diagonal of Σ_l ⟨h_i^l, h_j^l⟩", sums_classes=True, normalised=True),
        Kernel(
            "embedding-layerwise",
            "Σ_l ⟨h_i^l, h_j^l⟩ / sqrt(Σ_l ‖h_i^l‖² ‖h_j^l‖²) (App. B)",
            sums_classes=True,
            normalised=False,
        ),
    )
}
EXACT = {**JACOBIAN, **REPRESENTATION}
"""From a project; the first is the default."""


def projected_kernel(name: str) -> Kernel:
    """The kernel of a name, on stored features.

    Returns:
        Its entry.

    Raises:
        UsageError: there is none; lists those there are.
    """
    return _named(name, PROJECTED, EXACT, "needs a project, not a store")


def exact_kernel(name: str) -> Kernel:
    """The kernel of a name, computed exactly.

    Returns:
        Its entry.

    Raises:
        UsageError: there is none; lists those there are.
    """
    return _named(name, EXACT, PROJECTED, "needs stores, not a project")


def _named(name: str, here: Mapping[str, Kernel], elsewhere: Mapping[str, Kernel], instead: str) -> Kernel:
    if name in here:
        return here[name]
    what = f"{name} {instead}" if name in elsewhere else "unknown kernel"
    raise UsageError(what, where="--kernel", expected=f"one of {', '.join(here)}", got=repr(name))
