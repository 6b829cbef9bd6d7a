"""One model of the zoo: how it is built, what it takes, and how its logits are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 10
Forward = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: unique in the zoo.
        source: "hand", or the library whose model it is.
        build: makes the module with random weights, the same at each call with one seed.
        inputs: makes a batch (Tensor or dict of Tensors, first axis n) from a number of examples.
        forward: how to call the model where `model(inputs)` does not do.
        dtype: of the weights.
    """

    name: str
    source: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    forward: Forward | None = None
    dtype: torch.dtype = torch.float32

    @property
    def library(self) -> str:
        """Where the model is from, with its version."""
        return "hand-written" if self.source == "hand" else f"{self.source} {version(self.source)}"

    def model(self, seed: int = 0, wide: bool = False) -> nn.Module:
        """The module in eval mode; as float64 of the very same values where `wide`.

        Nothing is left at a start that would hide its gradient or another's: constant parameters (zero heads, norms,
        layer scales) and statistics of norms are moved.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.build()
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.is_floating_point() and parameter.min() == parameter.max():
                        parameter.add_(0.1 * torch.randn_like(parameter))
                for name, buffer in module.named_buffers():
                    if name.endswith(("running_mean", "running_var")):
                        buffer.add_(0.2 * torch.rand_like(buffer))
        module = module.to(self.dtype).eval()
        return module.double() if wide else module

    def batch(self, n: int, seed: int = 1, wide: bool = False) -> Any:
        """A batch of n different examples."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inputs = self.inputs(n)
        cast = partial(_cast, dtype=self.dtype, wide=wide)
        return cast(inputs) if isinstance(inputs, Tensor) else {key: cast(value) for key, value in inputs.items()}


def images(n: int, size: int = 32, channels: int = 3) -> Tensor:
    """Square images of noise."""
    return torch.randn(n, channels, size, size)


def rows(n: int, *shape: int) -> Tensor:
    """Examples of normal values."""
    return torch.randn(n, *shape)


def tokens(n: int, length: int = 12, vocabulary: int = 100) -> Tensor:
    """Token numbers that no model of the zoo takes for padding or for a special one."""
    return torch.randint(5, vocabulary, (n, length))


def _cast(tensor: Tensor, dtype: torch.dtype, wide: bool) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype).double() if wide else tensor.to(dtype)
