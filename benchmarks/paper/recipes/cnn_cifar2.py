"""CNN on two classes of CIFAR-10."""

from __future__ import annotations

import torch

import gradstore as gs
from benchmarks.paper.loaders import cifar10
from benchmarks.paper.networks import SmallCNN
from benchmarks.paper.recipes.binary import binary_project
from benchmarks.paper.training import binary_cross_entropy


def project(data: str = "", seed: int = 0, epochs: int = 200) -> gs.Project:
    """Trained as in the published script: cross-entropy, Adam at 1e-3, batches of 64."""
    return binary_project(
        "cnn_cifar2",
        lambda: SmallCNN(channels=3, side=32, repeats=2),
        cifar10,
        data,
        seed,
        epochs,
        loss=binary_cross_entropy,
        optimizer=lambda p: torch.optim.Adam(p, 1e-3),
        batch=64,
        test=1000,
    )
