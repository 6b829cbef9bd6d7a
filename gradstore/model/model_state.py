"""Calling a user's model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Within: the model may be called; on leaving, what its calls wrote is as before.

    That is its buffers, replaced or written to (counters, statistics of its own), and weights that `max_norm` shrinks
    as they are looked up. Buffers that were made in inference mode, which autograd refuses, are copies within. Compiled
    parts run as the code that they were compiled from, whose calls can be seen and which can be differentiated twice.

    Holds a copy of all buffers and of such weights.
    """
    saved = [
        (module._buffers, name, tensor, _version(tensor), tensor.detach().clone())
        for module in model.modules()
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]
    shrunk = [
        (weight, weight._version, weight.detach().clone())
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
        for weight in [module.weight]
        if not weight.is_inference()
    ]
    try:
        for buffers, name, tensor, _, value in saved:
            if tensor.is_inference():
                buffers[name] = value
        with uncompiled():
            yield
    finally:
        for buffers, name, tensor, version, value in saved:
            buffers[name] = tensor
            if _version(tensor) != version:
                _write(tensor, value)
        for weight, version, value in shrunk:
            if weight._version != version:
                _write(weight, value)


def uncompiled() -> AbstractContextManager[object]:
    """Within: what `torch.compile` made runs as plain code; torch before 2.6 cannot, and goes on as it is."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if set_stance is None else set_stance("force_eager")


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; of one made in inference mode nobody counts, and nothing outside writes."""
    return 0 if tensor.is_inference() else tensor._version


def _write(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)
