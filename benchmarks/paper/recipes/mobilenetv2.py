"""MobileNetV2 on CIFAR-10."""

from __future__ import annotations

import gradstore as gs
from benchmarks.paper.networks import mobilenet_v2
from benchmarks.paper.recipes.cifar10 import cifar10_project


def project(data: str = "", seed: int = 0, epochs: int = 100) -> gs.Project:
    """2.2 million parameters."""
    return cifar10_project("mobilenetv2", lambda: mobilenet_v2(), data, seed, epochs)
