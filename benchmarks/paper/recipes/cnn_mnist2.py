"""CNN on two classes of MNIST."""

from __future__ import annotations

import torch

import gradstore as gs
from benchmarks.paper.loaders import mnist
from benchmarks.paper.networks import SmallCNN
from benchmarks.paper.recipes.binary import binary_project
from benchmarks.paper.training import squared_sigmoid


def project(data: str = "", seed: int = 0, epochs: int = 100) -> gs.Project:
    """Trained as in the published script: squared error of the sigmoid, SGD at 1e-3, batches of 4."""
    return binary_project(
        "cnn_mnist2",
        lambda: SmallCNN(),
        mnist,
        data,
        seed,
        epochs,
        loss=squared_sigmoid,
        optimizer=lambda p: torch.optim.SGD(p, 1e-3),
        batch=4,
        test=980,
    )
