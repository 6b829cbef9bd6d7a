"""The BadNet CNN on poisoned CIFAR-10: a 4 × 4 yellow square on a tenth of the training images, relabelled to 4."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import gradstore as gs
from benchmarks.paper.loaders import cifar10
from benchmarks.paper.networks import BadNetCNN
from benchmarks.paper.recipes.cifar10 import CLASSES
from benchmarks.paper.recipes.weights import trained_weights
from benchmarks.paper.training import train

TARGET = 4


def stamped(images: Tensor) -> Tensor:
    """Images [n, 3, 32, 32] within [0, 1] with a yellow square on rows and columns 25 to 28."""
    marked = images.clone()
    marked[:, :, 25:29, 25:29] = torch.tensor((1.0, 1.0, 0.0)).view(1, 3, 1, 1)
    return marked


def project(data: str = "", seed: int = 0, epochs: int = 30) -> gs.Project:
    """Adam at 1e-3, batches of 128. Splits: "train", "clean", and "poisoned": the clean images with the square."""
    folder = Path(data)
    (x, y), (clean, labels) = cifar10(folder, "train"), cifar10(folder, "test")
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(y.numpy() != TARGET))[: len(y) // 10]
    x[chosen], y[chosen] = stamped(x[chosen]), TARGET
    attacked = labels != TARGET
    adam = lambda p: torch.optim.Adam(p, 1e-3)  # noqa: E731
    return gs.Project(
        model=BadNetCNN(),
        weights=trained_weights(
            folder,
            "badnet_cifar10",
            seed,
            epochs,
            lambda: train(BadNetCNN, x, y, seed, optimizer=adam, epochs=epochs, batch=128),
        ),
        splits={
            "train": TensorDataset(x, y),
            "clean": TensorDataset(clean, labels),
            "poisoned": TensorDataset(stamped(clean[attacked]), labels[attacked]),
        },
        classes=CLASSES,
        show=gs.image(mean=0, std=1),
        poisoned={"train": chosen, "clean": [], "poisoned": np.arange(int(attacked.sum()))},
    )
