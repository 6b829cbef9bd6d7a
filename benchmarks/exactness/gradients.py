"""The gradients of a few examples, computed once, and their kernels under many P.

A block of 1024 rows of P is independent of every other, whatever the kind, and a kernel before it is normalised is the
sum of what each block adds. So what is kept of a seed is the Gram matrix of each of its blocks, and a projection to
K = 1024 m is any m of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import gradstore as gs
from gradstore.jacobians import JacobianEngine
from gradstore.model.parameters import parameter_blocks

BLOCK = 1024
KERNELS = ("proj-trntk", "proj-pntk")
_TILE, _WIDENED = 128, 1 << 17


@dataclass(frozen=True)
class Gradients:
    """The Jacobian rows of n examples and c classes.

    Attributes:
        n: examples.
        classes: c.
        pieces: (first flat index, values float32 [n c, width]) wherever some row is not zero.
        exact: kernel -> float64 [n, n], before it is normalised.
    """

    n: int
    classes: int
    pieces: tuple[tuple[int, Tensor], ...]
    exact: dict[str, np.ndarray]


def gradients(project: gs.Project, n: int) -> Gradients:
    """Those of the first n examples of "train"; holds them all, 4 n c p bytes."""
    project.prepare()
    inputs, _ = project.examples("train").read(range(n))
    engine = JacobianEngine(project.model, parameter_blocks(project.model), example=inputs[:1])
    pieces: list[tuple[int, Tensor]] = []
    trace, summed = (torch.zeros(n, n, dtype=torch.float64) for _ in KERNELS)
    classes = 0
    for block in engine(inputs):
        values = block.dense()
        classes = values.shape[1]
        for part in values.split(_WIDENED, dim=2):
            wide = part.double()
            trace += wide.flatten(1) @ wide.flatten(1).T
            summed += wide.sum(1) @ wide.sum(1).T
        pieces += [(block.start + at, found.clone()) for at, found in _occurring(values.flatten(0, 1))]
        block.forget()
    return Gradients(n, classes, tuple(pieces), dict(zip(KERNELS, (trace.numpy(), summed.numpy()), strict=True)))


def block_grams(found: Gradients, kind: str, K: int, seed: int) -> np.ndarray:
    """What each block of 1024 rows of one P adds to each kernel, float64 [kernels, K / 1024, n, n]."""
    projection = gs.Projection(kind, K, seed=seed)
    features = torch.zeros(found.n * found.classes, K)
    for start, values in found.pieces:
        projection.accumulate(features, values, start)
    split = features.double().view(found.n, found.classes, K // BLOCK, BLOCK).permute(2, 0, 1, 3)
    rows = (split.flatten(2), split.sum(2))  # all classes side by side, and added up
    return torch.stack([side @ side.transpose(1, 2) for side in rows]).numpy()


def kept_grams(found: Gradients, kind: str, K: int, seeds: int, folder: Path) -> np.ndarray:
    """The same of many seeds, float64 [kernels, seeds K / 1024, n, n], each computed once and kept in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        path = folder / f"{kind}-{K}-{seed}.npy"
        if not path.exists():
            np.save(path, block_grams(found, kind, K, seed))
    return np.concatenate([np.load(folder / f"{kind}-{K}-{seed}.npy") for seed in range(seeds)], axis=1)


def _occurring(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first column, its values) of every run of columns, 128 at a time, that are not zero in some row."""
    columns = torch.nn.functional.pad((values != 0).any(0), (0, -values.shape[1] % _TILE))
    there = torch.nn.functional.pad(columns.view(-1, _TILE).any(1).int(), (1, 1))
    starts, stops = ((there.diff() == step).nonzero().flatten() * _TILE for step in (1, -1))
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        yield start, values[:, start:stop]
