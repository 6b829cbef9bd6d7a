"""What the ten-class experiments on CIFAR-10 have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradstore as gs
from benchmarks.paper.loaders import cifar10
from benchmarks.paper.recipes.weights import trained_weights
from benchmarks.paper.training import train

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def normalised(images: Tensor) -> Tensor:
    """Each channel less its mean over its deviation."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


def cifar10_project(name: str, build: Callable[[], nn.Module], data: str, seed: int, epochs: int) -> gs.Project:
    """All of CIFAR-10; SGD with momentum 0.9, rate 0.1, decay 5e-4, batches of 128."""
    folder = Path(data)
    splits = {}
    for split in ("train", "test"):
        images, labels = cifar10(folder, split)
        splits[split] = TensorDataset(normalised(images), labels)
    x, y = splits["train"].tensors
    sgd = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4)  # noqa: E731
    return gs.Project(
        model=build(),
        weights=trained_weights(
            folder, name, seed, epochs, lambda: train(build, x, y, seed, optimizer=sgd, epochs=epochs, batch=128)
        ),
        splits=splits,
        classes=CLASSES,
        show=gs.image(mean=MEAN, std=STD),
    )
