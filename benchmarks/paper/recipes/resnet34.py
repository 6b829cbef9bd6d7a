"""ResNet34 on CIFAR-10."""

from __future__ import annotations

import gradstore as gs
from benchmarks.paper.networks import resnet
from benchmarks.paper.recipes.cifar10 import cifar10_project


def project(data: str = "", seed: int = 0, epochs: int = 100) -> gs.Project:
    """21.3 million parameters."""
    return cifar10_project("resnet34", lambda: resnet((3, 4, 6, 3)), data, seed, epochs)
