"""How far projected similarities are from exact ones: stored features against exact Jacobians on sampled pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradstore.jacobians import JacobianEngine
from gradstore.kernels.definitions import PROJECTED, projected_kernel
from gradstore.kernels.feature_map import FeatureMap
from gradstore.model.parameters import parameter_blocks
from gradstore.model.project import Project
from gradstore.store.rows import Rows

KERNELS = tuple(name for name, kernel in PROJECTED.items() if kernel.normalised and kernel.exact)
_FIT_BYTES = 1 << 30


def residuals(project: Project, train: Rows, queries: Sequence[Rows], rows: int = 64) -> dict[str, Tensor]:
    """Projected minus exact cosine of pairs of a training and a query example.

    Args:
        project: the model that both kinds were made with, prepared.
        train: the training store.
        queries: query stores.
        rows: the first this many rows of each store are paired; the demo's splits are shuffled.

    Returns:
        Kernel -> float64 [queries * rows, rows]. Holds the Jacobian of one parameter for all these examples twice.
    """
    stores = [train, *queries]
    inputs = [project.examples(store.split).read(range(min(rows, len(store))))[0] for store in stores]
    exact = exact_cosines(project, torch.cat(inputs))  # type: ignore[arg-type]
    first = len(inputs[0])
    return {
        kernel: projected_cosines(kernel, stores, rows)[first:, :first] - exact[kernel][first:, :first]
        for kernel in KERNELS
    }


def projected_cosines(kernel: str, stores: Sequence[Rows], rows: int) -> Tensor:
    """Cosines between the first rows of some stores, as top-k and forensics compute them; float64 [N, N]."""
    phi_of = FeatureMap.of(projected_kernel(kernel), stores[0], _FIT_BYTES)
    maps = [phi_of.rows(store.read(0, min(rows, len(store))), store.where) for store in stores]
    phi, norms = (torch.cat(part).double() for part in zip(*maps, strict=True))
    return phi @ phi.T / torch.outer(norms, norms)


def exact_cosines(project: Project, inputs: Tensor) -> dict[str, Tensor]:
    """Exact trNTK (eq. 5) and the cosine of pNTK (eq. 7 without its projection), named as their projected kin.

    Args:
        project: a prepared project; the model may be on any device.
        inputs: N examples.

    Returns:
        Kernel -> float64 [N, N].
    """
    blocks = parameter_blocks(project.model, project.parameters)
    inputs = inputs.to(next(project.model.parameters()).device)  # a GPU, where the stores were just made by one
    engine = JacobianEngine(project.model, blocks, forward=project.forward, example=inputs[:1])
    trace, summed = (torch.zeros(len(inputs), len(inputs), dtype=torch.float64) for _ in range(2))
    for block in engine(inputs):
        g = block.dense().double()
        trace += (g.flatten(1) @ g.flatten(1).T).cpu()
        summed += (g.sum(1) @ g.sum(1).T).cpu()
    return {name: _cosine(summed if PROJECTED[name].sums_classes else trace) for name in KERNELS}


def _cosine(gram: Tensor) -> Tensor:
    norms = gram.diagonal().sqrt()
    return gram / torch.outer(norms, norms)
