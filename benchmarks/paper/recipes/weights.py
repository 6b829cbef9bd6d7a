"""Weights of a recipe's network: trained once for each seed, kept beside the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import nn


def trained_weights(data: Path, name: str, seed: int, epochs: int, make: Callable[[], nn.Module]) -> Path:
    """The safetensors file of a network, made by `make` if it is not there."""
    path = (data / f"{name}-seed{seed}-epochs{epochs}.safetensors").absolute()
    if not path.exists():
        state = {key: value.contiguous() for key, value in make().state_dict().items()}
        temporary = path.with_suffix(".tmp")
        save_file(state, temporary)
        temporary.replace(path)
    return path
