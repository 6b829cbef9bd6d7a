"""The kernels: each is a feature map Φ plus a normalisation, κ(x, x') = ⟨Φ(x), Φ(x')⟩ / (‖Φ(x)‖ ‖Φ(x')‖).

A name means the same in Python, on the command line and in files. `proj-` kernels are computed from stores; the others
exactly, from a project.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import NonFiniteError, UsageError
from gradstore.store.files.encoding import decode
from gradstore.store.rows import Rows


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
    """

    name: str
    formula: str
    sums_classes: bool
    normalised: bool
    averages: bool = False
    pairs_classes: bool = False


PROJECTED = {
    kernel.name: kernel
    for kernel in (
        Kernel("proj-trntk", "cosine of Σ_c ⟨P g_i^c, P g_j^c⟩ (eq. 8)", sums_classes=False, normalised=True),
        Kernel("proj-pntk", "cosine of ⟨P Σ_c g_i^c, P Σ_c g_j^c⟩ (eq. 7)", sums_classes=True, normalised=True),
        Kernel("proj-trntk0", "Σ_c ⟨P g_i^c, P g_j^c⟩, not normalised", sums_classes=False, normalised=False),
    )
}


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


def projected_kernel(name: str) -> Kernel:
    """The kernel of a name, on stored features.

    Raises:
        UsageError: there is none; lists those there are.
    """
    return _named(name, PROJECTED, {**JACOBIAN, **REPRESENTATION}, "needs a project, not a store")


def exact_kernel(name: str) -> Kernel:
    """The kernel of a name, computed exactly.

    Raises:
        UsageError: there is none; lists those there are.
    """
    return _named(name, {**JACOBIAN, **REPRESENTATION}, PROJECTED, "needs stores, not a project")


def _named(name: str, here: Mapping[str, Kernel], elsewhere: Mapping[str, Kernel], instead: str) -> Kernel:
    if name in here:
        return here[name]
    what = f"{name} {instead}" if name in elsewhere else "unknown kernel"
    raise UsageError(what, where="--kernel", expected=f"one of {', '.join(here)}", got=repr(name))


def require_served(kernel: Kernel, store: Rows) -> None:
    """Refuse a kernel that the layout of some rows cannot serve.

    Raises:
        UsageError: per-class features are needed and there is only a sum over classes.
    """
    if store.identity["layout"] == "mixed" and store.schema.classes > 1 and kernel.sums_classes:
        raise UsageError(
            f"{kernel.name} needs P Σ_c g^c, and this store projects every class by a P of its own",
            where=store.where,
            expected="layout per-class or sum",
            got="layout mixed",
            hint="Use --kernel proj-trntk, or featurize with another --layout",
        )
    if store.identity["layout"] == "sum" and store.schema.classes > 1 and not kernel.sums_classes:
        raise UsageError(
            f"{kernel.name} needs the features of each class, and this store holds only P Σ_c g^c",
            where=store.where,
            expected="layout per-class",
            got="layout sum",
            hint="Use --kernel proj-pntk, or featurize with --layout per-class",
        )


def feature_map(kernel: Kernel, columns: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """Φ of some rows of a store.

    Args:
        kernel: which kernel.
        columns: what `Rows.read` returns: features [n, c, K] with their scale, norm and row.

    Returns:
        (Φ float32 [n, D], its norms float64 [n]); D is c·K, or K where classes are summed. The norms are 1 for a kernel
        that is not normalised. Holds Φ and, where classes are summed, the features beside it.

    Raises:
        NonFiniteError: a row's Φ is zero or not finite, so that a cosine is undefined; names the row.
    """
    features = decode(columns["features"], columns["scale"])
    phi = features.sum(dim=1) if kernel.sums_classes else features.flatten(1)
    return phi, _norms(kernel, phi, columns)


def stored_feature_map(kernel: Kernel, columns: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """Φ of some rows, divided by its norm where the kernel is normalised, as values and the factors that they lack.

    Returns:
        (values [n, c, K], factors float64 [n, c]): the stored digits themselves, not copied, and what one of them is
        worth; where classes are summed float32 with 1 in place of c. Holds the latter, and the features beside them.

    Raises:
        NonFiniteError: as `feature_map`.
    """
    if kernel.sums_classes:
        phi, norms = feature_map(kernel, columns)
        return phi[:, None], 1 / norms[:, None]
    values = torch.from_numpy(columns["features"])
    return values, torch.from_numpy(columns["scale"]).double() / _norms(kernel, values, columns)[:, None]


def _norms(kernel: Kernel, phi: Tensor, columns: Mapping[str, np.ndarray]) -> Tensor:
    """What rows are divided by, float64 [n]."""
    if kernel.sums_classes:
        norms = torch.linalg.vector_norm(phi, dim=1, dtype=torch.float64)
    else:
        norms = torch.linalg.vector_norm(torch.from_numpy(columns["norm"]), dim=1)
    if not kernel.normalised:
        norms = torch.where(torch.isfinite(norms), torch.ones_like(norms), norms)
    bad = torch.nonzero(~(torch.isfinite(norms) & (norms > 0)))
    if len(bad):
        i = int(bad[0])
        raise NonFiniteError(
            f"the features of row {columns['row'][i]} have no direction, so {kernel.name} is undefined",
            expected="a finite norm above zero",
            got=f"norm {norms[i].item()}",
            hint="Run `gradstore verify` on the store",
        )
    return norms
