"""What the two-class experiments have in common: two classes of a data set, one logit, 100 seeds by `-o seed`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import gradstore as gs
from benchmarks.paper.loaders import Split, two_of
from benchmarks.paper.recipes.weights import trained_weights
from benchmarks.paper.training import Loss, train


def binary_project(
    name: str,
    build: Callable[[], nn.Module],
    load: Callable[[Path, str], Split],
    data: str,
    seed: int,
    epochs: int,
    *,
    loss: Loss,
    optimizer: Callable[[object], torch.optim.Optimizer],
    batch: int,
    test: int,
) -> gs.Project:
    """Classes 0 and 1: the first 5,000 training and `test` test images of each."""
    folder = Path(data)
    splits = {split: two_of(load(folder, split), (0, 1), n) for split, n in (("train", 5000), ("test", test))}
    x, y = splits["train"]

    def make() -> nn.Module:
        return train(build, x, y, seed, loss=loss, optimizer=optimizer, epochs=epochs, batch=batch)

    return gs.Project(
        model=build(),
        weights=trained_weights(folder, name, seed, epochs, make),
        splits={split: TensorDataset(*part) for split, part in splits.items()},
        show=gs.image(mean=0, std=1),
    )
