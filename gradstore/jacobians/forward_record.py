"""One forward pass on a batch that notes every use of a differentiated parameter.

The pass runs under a torch-function mode. A call that a rule covers is made with its parameters detached, so autograd
reaches a parameter only through uses that were *not* noted; such a parameter is known by its having a gradient. The
place of a layer's output in the graph is noted before anything can change the output in place.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from gradstore.jacobians.last_call import LastCall, last_call
from gradstore.jacobians.row_owners import candidates
from gradstore.jacobians.rules import RULES, Use
from gradstore.jacobians.subject import Inputs, Subject, length


@dataclass(frozen=True)
class Tap:
    """A noted call.

    Attributes:
        use: what its rule said.
        names: the parameter behind each of its arguments.
        edge: the call's output in the autograd graph.
        shape: of that output.
        spread: whether its input was repeated for every example.
        versions: version counters of `use.saved` at the call.
    """

    use: Use
    names: dict[str, str]
    edge: GradientEdge
    shape: torch.Size
    spread: bool
    versions: tuple[int, ...]

    @property
    def stale(self) -> bool:
        """Whether something that the gradient needs was changed in place after the call."""
        return self.versions != tuple(tensor._version for tensor in self.use.saved)


@dataclass(frozen=True)
class Recording:
    """Logits [n, classes] with their graph, the noted calls in order, and the linear call whose output they are."""

    logits: Tensor
    taps: list[Tap]
    last: LastCall | None = None


def record(subject: Subject, names: Sequence[str], inputs: Inputs, spread: Sequence[bool] | bool) -> Recording:
    """Run the model once and note how it uses parameters; call inside `subject.ready()`.

    Args:
        subject: the model.
        names: the parameters whose uses are noted.
        inputs: n examples.
        spread: whether an embedding of something that all examples share (positions, say) is computed once per example,
            without which its gradient could not be told apart; by tap, or one decision for all by shape.

    Returns:
        Logits and noted calls. Holds the graph of all n examples.
    """
    recorder = _Recorder({id(subject.parameters[name]): name for name in names}, length(inputs), spread)
    with recorder:
        logits = subject.logits(inputs)
    last = recorder.last
    return Recording(logits, recorder.taps, last if last is not None and last.gave(logits) else None)


class _Recorder(TorchFunctionMode):
    def __init__(self, names: dict[int, str], n: int, spread: Sequence[bool] | bool) -> None:
        super().__init__()
        self._names, self._n, self._spread = names, n, spread
        self._anchor = torch.zeros((), requires_grad=True)
        self.taps: list[Tap] = []
        self.last: LastCall | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, before = kwargs or {}, len(self.taps)
        output = self._called(func, args, kwargs)
        if func is F.linear and torch.is_grad_enabled():
            noted = len(self.taps) > before
            tap = before if noted else None
            self.last = last_call(args, kwargs, output, tap, lambda p: noted and id(p) in self._names)
        return output

    def _called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func in _ENTERED:
            with self:
                return _ENTERED[func](*args, **kwargs)
        rule = RULES.get(func)
        if rule is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        roles = {role: self._names[id(value)] for role, value in _named(rule, args, kwargs) if id(value) in self._names}
        if not roles or len(set(roles.values())) < len(roles):
            return func(*args, **kwargs)
        return self._tapped(func, rule, roles, args, kwargs)

    def _tapped(self, func: Any, rule: Callable[..., Use | None], roles: dict[str, str], args: Any, kwargs: Any) -> Any:
        plain = args, kwargs
        spread = func is F.embedding and bool(args) and self._spreads(args[0])
        if spread:
            args = (args[0].expand(self._n, *args[0].shape[-1:]), *args[1:])
        use = rule(*args, **kwargs)
        if use is None or not roles.keys() <= use.terms.keys():
            return func(*plain[0], **plain[1])
        output = func(*map(self._detached, args), **{key: self._detached(value) for key, value in kwargs.items()})
        if not candidates(output.shape, self._n, use.arrangements):
            return func(*plain[0], **plain[1])
        if not output.requires_grad:
            output = output + self._anchor.to(output)  # a first layer has nothing to hang the graph on
        versions = tuple(tensor._version for tensor in use.saved)
        self.taps.append(Tap(use, roles, get_gradient_edge(output), output.shape, spread, versions))
        return output

    def _detached(self, value: Any) -> Any:
        return value.detach() if id(value) in self._names else value

    def _spreads(self, indices: Tensor) -> bool:
        """Whether indices are shared by all examples: [1, S], or [S] of another length than the batch."""
        shared = indices.ndim == 1 or (indices.ndim == 2 and len(indices) == 1)
        if not shared or isinstance(self._spread, bool):
            return bool(shared and self._spread and len(indices) != self._n)
        return len(self.taps) < len(self._spread) and self._spread[len(self.taps)]


def _named(rule: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """The arguments of a call under the rule's names for them."""
    return [*zip(_arguments(rule), args, strict=False), *kwargs.items()]


def _arguments(rule: Callable[..., Any]) -> list[str]:
    return _ARGUMENTS[rule]


_ARGUMENTS = {rule: list(inspect.signature(rule).parameters) for rule in RULES.values()}


def _inside(function: Any) -> Callable[..., Any]:
    """A composite function of torch whose inner calls the mode sees: the original passes itself to the mode instead."""
    scope = dict(function.__globals__, has_torch_function=lambda *_: False)
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_ENTERED = {F.multi_head_attention_forward: _inside(F.multi_head_attention_forward)}
