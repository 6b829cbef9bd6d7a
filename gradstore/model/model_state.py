"""Calling a user's model without leaving a trace in it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Within: the model may be called; on leaving, what its calls wrote is as before.

    That is its buffers, replaced or written to (counters, statistics of its own), what `attributes_kept` keeps, and
    weights that `max_norm` shrinks as they are looked up. Buffers that were made in inference mode, which autograd
    refuses, are copies within. Compiled parts run as the code that they were compiled from, whose calls can be seen and
    which can be differentiated twice.

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
        with uncompiled(), attributes_kept(model):
            yield
    finally:
        for buffers, name, tensor, version, value in saved:
            buffers[name] = tensor
            if _version(tensor) != version:
                _write(tensor, value)
        for weight, version, value in shrunk:
            if weight._version != version:
                _write(weight, value)


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Within: the model may be called; on leaving, its modules have the attributes that they had.

    So have the lists, dicts and sets among them. What a model keeps from one call for the next, such as biases that it
    has gathered, is a constant in the next one, and its gradient would be lost. A module that goes into train mode
    stays there, which others look for and refuse.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    holders = [holder for module in modules for holder in _holders(module)]
    before = [holder.copy() for holder in holders]
    try:
        yield
    finally:
        modes = [module.training for module in modules]
        for holder, content in zip(holders, before, strict=True):
            _put_back(holder, content)
        for module, mode in zip(modules, modes, strict=True):
            if module.training != mode:
                module.training = mode


def uncompiled() -> AbstractContextManager[object]:
    """Within: what `torch.compile` made runs as plain code; torch before 2.6 cannot, and goes on as it is.

    Where the compiler has not been imported, it has made nothing. It takes two seconds to import.

    Returns:
        The context.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None or "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = set_stance("force_eager")
    return stance


class WrittenBuffers:
    """The buffers that a model writes to as it is called, each call from the same value on.

    Which they are is found out by the first call, of which all buffers are copied; later only these are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: list[tuple[dict[str, Any], str]] | None = None

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Within: the model may be called once; what it wrote to is as before, and the call can be differentiated."""
        asked = _buffers(self._model) if self._found is None else self._found
        before = [(holder, name, holder[name]) for holder, name in asked]
        copies = [tensor.detach().clone() for _, _, tensor in before]
        versions = [_version(copy) for copy in copies]
        for (holder, name, _), copy in zip(before, copies, strict=True):
            holder[name] = copy
        try:
            yield
        finally:
            for holder, name, tensor in before:
                holder[name] = tensor
            if self._found is None:
                changed = [_version(copy) != version for copy, version in zip(copies, versions, strict=True)]
                self._found = [(holder, name) for (holder, name, _), new in zip(before, changed, strict=True) if new]


def _buffers(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    return [
        (module._buffers, name)
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]


_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"_buffers"}


def _holders(module: nn.Module) -> list[Any]:
    own = [value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]
    return [vars(module), *(value for value in own if type(value) in (dict, list, set))]


def _put_back(holder: Any, content: Any) -> None:
    """Give a dict, list or set its content again; nothing is written where nothing has changed."""
    if isinstance(holder, dict):
        if not (_same_objects(holder, content) and _same_objects(holder.values(), content.values())):
            holder.clear()
            holder.update(content)
    elif isinstance(holder, list):
        if not _same_objects(holder, content):
            holder[:] = content
    elif holder != content:
        holder.clear()
        holder.update(content)


def _same_objects(some: Iterable[Any], others: Iterable[Any]) -> bool:
    return list(map(id, some)) == list(map(id, others))


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; of one made in inference mode nobody counts, and nothing outside writes."""
    return 0 if tensor.is_inference() else tensor._version


def _write(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)
