"""One forward pass on a batch that notes every use of a differentiated parameter.

The pass runs under a torch-function mode. A call that a rule covers is made with its parameters detached, so autograd
reaches a parameter only through uses that were *not* noted; such a parameter is known by its having a gradient. The
place of a layer's output in the graph is noted before anything can change the output in place. What is made of
parameters alone, without any example, is noted like a parameter where it is used (`weight_functions`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from gradstore.jacobians.arithmetic_rules import ARITHMETIC
from gradstore.jacobians.contraction_rules import MATRIX_PRODUCTS
from gradstore.jacobians.example_free import ExampleFree, tensors_in
from gradstore.jacobians.last_call import LastCall, last_call
from gradstore.jacobians.row_owners import candidates
from gradstore.jacobians.rules import ARGUMENTS, RULES
from gradstore.jacobians.spelled_out import spelled_out
from gradstore.jacobians.subject import Inputs, Subject, length
from gradstore.jacobians.uses import Use
from gradstore.jacobians.weight_functions import WeightFunction


@dataclass(frozen=True)
class Call:
    """What tells one noted call from others of a pass.

    Attributes:
        names: behind each noted argument, "argument=name" of a parameter or of a function of some.
        spread: whether its input was repeated for every example.
    """

    names: tuple[str, ...]
    spread: bool


@dataclass(frozen=True)
class Calls:
    """The noted calls of a pass, in order, and which constants were repeated for each example."""

    noted: tuple[Call, ...] = ()
    repeats: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Tap:
    """A noted call.

    Attributes:
        use: what its rule said.
        names: the parameter, or function of parameters, behind each of its arguments.
        roots: the parameters behind all of them.
        edge: the call's output in the autograd graph.
        shape: of that output.
        call: what tells it from others.
        versions: version counters of `use.saved` at the call.
    """

    use: Use
    names: dict[str, str]
    roots: tuple[str, ...]
    edge: GradientEdge
    shape: torch.Size
    call: Call
    versions: tuple[int, ...]

    @property
    def stale(self) -> bool:
        """Whether something that the gradient needs was changed in place after the call."""
        return self.versions != tuple(tensor._version for tensor in self.use.saved)


@dataclass(frozen=True)
class Recording:
    """A forward pass.

    Attributes:
        logits: [n, classes], with their graph.
        taps: the noted calls, in order.
        functions: of parameters, by name.
        repeats: which constants were repeated for each example; see `ExampleFree`.
        last: the linear call whose output the logits are, if they are just that.
    """

    logits: Tensor
    taps: list[Tap]
    functions: dict[str, WeightFunction]
    repeats: tuple[bool, ...] = ()
    last: LastCall | None = None

    @property
    def calls(self) -> Calls:
        """What tells the pass from others, and decides for later ones where a call can be read in two ways."""
        return Calls(tuple(tap.call for tap in self.taps), self.repeats)


def record(
    subject: Subject, names: Sequence[str], inputs: Inputs, calls: Calls | None, *, spread: bool = True
) -> Recording:
    """Run the model once and note how it uses parameters; call inside `subject.ready()`.

    Args:
        subject: the model.
        names: the parameters whose uses are noted.
        inputs: n examples.
        calls: those that an earlier pass noted, which decide where a call can be read in two ways; None for the first.
        spread: on the first pass, whether an embedding of something that all examples share (positions, say) is
            computed once per example, without which its gradient has no structure.

    Returns:
        Logits and noted calls. Holds the graph of all n examples.
    """
    recorder = _Recorder(subject, names, inputs, calls, spread)
    with recorder:
        logits = subject.logits(inputs)
    last = recorder.last
    gave = last is not None and last.gave(logits)
    return Recording(logits, recorder.taps, recorder.functions, tuple(recorder.repeats), last if gave else None)


class _Recorder(TorchFunctionMode):
    def __init__(
        self, subject: Subject, names: Sequence[str], inputs: Inputs, calls: Calls | None, spread: bool
    ) -> None:
        super().__init__()
        noted = {id(subject.parameters[name]): name for name in names}
        n, examples = length(inputs), tensors_in(inputs)
        self._free = ExampleFree(subject.model, noted, n, examples, None if calls is None else calls.repeats)
        self._n, self._calls, self._spread = n, None if calls is None else calls.noted, spread
        self.repeats = self._free.repeats
        self._anchor = torch.zeros((), requires_grad=True)
        self.taps: list[Tap] = []
        self.functions: dict[str, WeightFunction] = {}
        self.last: LastCall | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, before = kwargs or {}, len(self.taps)
        output = self._called(func, args, kwargs)
        if func is F.linear and torch.is_grad_enabled():
            noted = len(self.taps) > before
            tap = before if noted else None
            self.last = last_call(args, kwargs, output, tap, lambda value: noted and self._learned(value))
        return output

    def _called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        steps = spelled_out(func, args, kwargs, lambda tensor: bool(self._free.roots(tensor)))
        if steps is not None:
            with self:
                return steps(*args, **kwargs)
        func, args = self._linear(func, args)
        given = tensors_in(*args, kwargs)
        free = all(self._free.holds(tensor) for tensor in given)
        roots = self._free.roots_of(given)
        if torch.is_grad_enabled() and func in RULES and roots:
            output = self._noted(func, args, kwargs, free)
            if output is not None:
                return output
        output = func(*args, **kwargs)
        self._free.follow(func, args, given, output, roots if free else None)
        return output

    def _linear(self, func: Any, args: Any) -> tuple[Any, Any]:
        """The call, as a linear layer where it is a product `x Wᵀ` with the transpose of a parameter."""
        matrix = self._free.transposed(args[1]) if func in MATRIX_PRODUCTS and len(args) == 2 else None
        dense = matrix is not None and args[0].layout == torch.strided
        return (F.linear, (args[0], matrix)) if dense else (func, args)

    def _noted(self, func: Any, args: Any, kwargs: Any, free: bool) -> Any:
        """The call's output where it is noted; None, and nothing was called, where it is not."""
        rule = RULES[func]
        roles = {role: value for role, value in _arguments(rule, args, kwargs) if self._learned(value)}
        names = self._names(roles)
        if not roles or len(set(names.values())) < len(names):
            return None
        spread = func is F.embedding and bool(args) and self._spreads(args[0])
        call = Call(tuple(f"{role}={name}" for role, name in names.items()), spread)
        if free and not (spread or self._may_hold_examples(func, args, call)):
            return None
        if spread:
            args = (args[0].expand(self._n, *args[0].shape[-1:]), *args[1:])
        try:
            use = rule(*args, **kwargs)
        except Exception:  # of a form that the rule does not know: it costs this call's parameters their rule, no more
            return None
        if use is None or not roles.keys() <= use.terms.keys():
            return None
        return self._tapped(func, args, kwargs, use, roles, names, call)

    def _tapped(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        use: Use,
        roles: dict[str, Tensor],
        names: dict[str, str],
        call: Call,
    ) -> Any:
        changes = _changes_in_place(func)
        if changes and not args[0].requires_grad:
            return None  # the anchor would have to be hung on what the caller holds
        if changes and not candidates(args[0].shape, self._n, use.arrangements):
            return None
        output = func(*map(self._detached, args), **{key: self._detached(value) for key, value in kwargs.items()})
        if not isinstance(output, Tensor) or not candidates(output.shape, self._n, use.arrangements):
            return None
        if not output.requires_grad:
            output = output + self._anchor.to(output)  # a first layer has nothing to hang the graph on
        elif output._is_view() and func not in ARITHMETIC:
            output = output.clone()  # what writes to a view would take its place out of the graph
        versions = tuple(tensor._version for tensor in use.saved)
        for role, value in roles.items():
            if names[role].startswith(_FUNCTION):
                self.functions.setdefault(names[role], WeightFunction(value, self._free.roots(value)))
        roots = tuple(dict.fromkeys(root for value in roles.values() for root in self._free.roots(value)))
        self.taps.append(Tap(use, names, roots, get_gradient_edge(output), output.shape, call, versions))
        return output

    def _learned(self, value: Any) -> bool:
        return isinstance(value, Tensor) and bool(self._free.roots(value))

    def _detached(self, value: Any) -> Any:
        return value.detach() if self._learned(value) else value

    def _names(self, roles: dict[str, Tensor]) -> dict[str, str]:
        """Parameters' names; for functions of parameters such by the order in which they were first used."""
        known, names = {id(made.value): name for name, made in self.functions.items()}, {}
        for role, value in roles.items():
            name = self._free.name(value)
            names[role] = name or known.setdefault(id(value), f"{_FUNCTION}{len(known)}")
        return names

    def _may_hold_examples(self, func: Any, args: Any, call: Call) -> bool:
        # A class token is repeated for each example; indices of positions may have been, before they are looked up, and
        # so is the state that a recurrent cell begins with.
        if func in (F.embedding, F.linear):
            repeated = bool(args) and args[0].ndim > 1 and len(args[0]) == self._n
            if repeated and self._calls is None:
                repeated = bool((args[0] == args[0][:1]).all())
        else:
            repeated = func in ARITHMETIC
        if repeated and self._calls is not None:
            return len(self.taps) < len(self._calls) and self._calls[len(self.taps)] == call
        return repeated

    def _spreads(self, indices: Tensor) -> bool:
        """Whether indices are shared by all examples: [1, S], or [S] of another length than the batch."""
        shared = indices.ndim == 1 or (indices.ndim == 2 and len(indices) == 1)
        if not shared or self._calls is None:
            return bool(shared and self._spread and len(indices) != self._n)
        return len(self.taps) < len(self._calls) and self._calls[len(self.taps)].spread


_FUNCTION = "function "


def _arguments(rule: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """The arguments of a call under the rule's names for them."""
    return [*zip(ARGUMENTS[rule], args, strict=False), *kwargs.items()]


def _changes_in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
