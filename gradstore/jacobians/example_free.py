"""Which tensors of a forward pass hold nothing of its examples: parameters, buffers, and what was made of them alone.

A parameter may be used through a function of it: normalised, reparametrised, gathered from a table, reshaped. As no
example takes part, the per-example gradient of the function's value can be found as if the value were a parameter, and
be pulled back to the parameter afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Made:
    """A tensor that holds nothing of the examples.

    Attributes:
        tensor: it, kept so that no other takes its identity.
        version: of it when it was seen last; another one means that something else wrote to it.
        roots: the noted parameters that its gradient reaches.
        name: the parameter of which it is a view or a copy with the elements in the same order, if it is one.
        transposed: the matrix of parameters of which it is the transpose, if it is one.
    """

    tensor: Tensor
    version: int
    roots: tuple[str, ...]
    name: str | None
    transposed: Tensor | None = None


class ExampleFree:
    """Follows a forward pass, call by call.

    Args:
        model: its parameters, buffers and other tensors hold nothing of the examples.
        names: the noted parameters, by id.
        n: number of examples.
        examples: the tensors of the examples.
        repeats: of an earlier pass, whose decisions hold; None for the first.

    Attributes:
        repeats: for each constant that was repeated, in order, whether it was for each example: it then holds something
            for each of them, and is like any tensor of theirs.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[int, str],
        n: int,
        examples: Iterable[Tensor],
        repeats: Sequence[bool] | None,
    ) -> None:
        self._names, self._made = names, {}  # type: ignore[var-annotated]
        self._n, self._decided = n, repeats
        self.repeats: list[bool] = []
        self._examples = {id(tensor) for tensor in examples}
        self._this = object()  # of this pass; a mark that holds nothing, on tensors that may outlive it
        self._parameters = {id(parameter) for parameter in model.parameters()}
        for module in model.modules():
            for value in (*module._buffers.values(), *vars(module).values()):
                if isinstance(value, Tensor) and id(value) not in self._parameters:
                    self._keep(value, (), None)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor holds nothing of the examples."""
        if id(tensor) in self._parameters or self._entry(tensor) is not None:
            return True
        # What nobody has seen come into being, and counts something, is a constant from elsewhere: indices in a cache.
        seen = id(tensor) in self._made or id(tensor) in self._examples or getattr(tensor, _SEEN, None) is self._this
        return not (seen or tensor.is_floating_point() or tensor.is_complex())

    def roots(self, tensor: Tensor) -> tuple[str, ...]:
        """The noted parameters that a tensor was made of and passes a gradient to."""
        if id(tensor) in self._names:
            return (self._names[id(tensor)],)
        entry = self._entry(tensor)
        return () if entry is None else entry.roots

    def roots_of(self, tensors: Iterable[Tensor]) -> tuple[str, ...]:
        """Those of several tensors."""
        return tuple(dict.fromkeys(name for tensor in tensors for name in self.roots(tensor)))

    def name(self, tensor: Tensor) -> str | None:
        """The noted parameter that a tensor is, or has the elements of in the same order."""
        if id(tensor) in self._names:
            return self._names[id(tensor)]
        entry = self._entry(tensor)
        return None if entry is None else entry.name

    def transposed(self, tensor: Any) -> Tensor | None:
        """The parameter, or matrix with the elements of one in order, of which a tensor is the transpose."""
        entry = self._entry(tensor) if isinstance(tensor, Tensor) else None
        return None if entry is None else entry.transposed

    def follow(
        self, func: Any, args: tuple[Any, ...], given: list[Tensor], output: Any, roots: tuple[str, ...] | None
    ) -> None:
        """Learn from a call that was made.

        Args:
            func: what was called.
            args: with what.
            given: all tensors among its arguments.
            output: what it returned.
            roots: those of `given` before the call, which may have written to them; None where some of `given` held
                something of the examples.
        """
        for tensor in given:
            entry = self._made.get(id(tensor))
            if entry is not None and entry.version != _version(tensor):  # written to
                self._made.pop(id(tensor))
                if roots is not None:
                    self._keep(tensor, roots if tensor.requires_grad else (), None)
        if roots is None or (func in _REPEATS and not roots and self._for_each_example(args[0], output)):
            for tensor in tensors_in(output):
                self._made.pop(id(tensor), None)
                if not tensor.is_floating_point():
                    setattr(tensor, _SEEN, self._this)
            return
        for tensor in tensors_in(output):
            if id(tensor) in self._parameters or (id(tensor) in self._made and any(tensor is one for one in given)):
                continue
            own = tuple(roots) if tensor.requires_grad else ()
            same = own and _keeps_order(func, args) and tensor.numel() == args[0].numel()
            turned = own and func in _TRANSPOSES and args and self.name(args[0]) and _is_transpose(tensor, args[0])
            self._keep(tensor, own, self.name(args[0]) if same else None, args[0] if turned else None)

    def _for_each_example(self, once: Tensor, repeated: Tensor) -> bool:
        """Whether a constant was repeated for each example; where that cannot be told, the first pass decides."""
        place, new = len(self.repeats), repeated.ndim - once.ndim
        sizes = (1,) * new + tuple(once.shape)
        found = any(now == self._n and was == 1 for was, now in zip(sizes, repeated.shape, strict=True))
        if self._decided is not None:
            found = place < len(self._decided) and self._decided[place]
        self.repeats.append(found)
        return found

    def _keep(self, tensor: Tensor, roots: tuple[str, ...], name: str | None, transposed: Tensor | None = None) -> None:
        self._made[id(tensor)] = Made(tensor, _version(tensor), roots, name, transposed)

    def _entry(self, tensor: Tensor) -> Made | None:
        entry = self._made.get(id(tensor))
        return entry if entry is not None and entry.version == _version(tensor) else None


_SEEN = "_gradstore_seen"


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors of nested lists, tuples and dicts, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
        elif isinstance(value, dict) and value:
            found += tensors_in(*value.values())
    return found


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _functions(names: Iterable[str]) -> set[Any]:
    return {getattr(owner, name) for name in names for owner in (torch, Tensor) if hasattr(owner, name)}


_REPEATS = _functions(("expand", "expand_as", "broadcast_to", "repeat", "tile"))
_SHAPES = _functions(("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as", "reshape_as"))
_TRANSPOSES = _functions(("t", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint"))
_TRANSPOSES |= {Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]
_COPIES = _functions(("contiguous", "clone", "to", "float", "double", "half", "bfloat16", "type_as"))


def _keeps_order(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call returns its first argument's elements in the same order, if it returns as many."""
    if func is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(part is None or part is Ellipsis or _is_whole(part) for part in index)
    if func is Tensor.view and isinstance(args[1], torch.dtype):
        return False
    return bool(args) and (func in _SHAPES or func in _COPIES)


def _is_transpose(tensor: Tensor, of: Tensor) -> bool:
    """Whether a view of a matrix, of all of its elements, is its transpose."""
    return tensor.ndim == of.ndim == 2 and tensor.stride() == of.stride()[::-1] and tensor.shape == of.shape[::-1]


def _is_whole(part: Any) -> bool:
    return isinstance(part, slice) and part.start is None and part.stop is None and part.step is None
