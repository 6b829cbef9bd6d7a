"""ResNet18 on CIFAR-10."""

from __future__ import annotations

import gradstore as gs
from benchmarks.paper.networks import resnet
from benchmarks.paper.recipes.cifar10 import cifar10_project


def project(data: str = "", seed: int = 0, epochs: int = 100) -> gs.Project:
    """11.2 million parameters."""
    return cifar10_project("resnet18", lambda: resnet((2, 2, 2, 2)), data, seed, epochs)
