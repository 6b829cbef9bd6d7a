"""Rules of parameters in plain arithmetic: added, multiplied, repeated, or taken element by element in any other way.

A parameter has no axis of examples, so its gradient is the output's gradient times the partial derivative, added up
over all axes along which the parameter was broadcast, but for the examples'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradstore.jacobians.row_owners import FIRST, FOLDED, FOLDED_LAST, SECOND, deltas_by_example
from gradstore.jacobians.terms import ReducedTerm, Term
from gradstore.jacobians.uses import Batch, Use, reduced, wide

Rule = Callable[..., Use | None]
Factor = Callable[[], Tensor | float]  # the partial derivative, of the output's shape, which deltas are multiplied by

ROUTE = "arithmetic"


def add(input: Any, other: Any, *, alpha: float = 1) -> Use | None:
    """A parameter added to every example, such as a learned position."""
    return _use({"input": input, "other": other}, {"input": _constant(1), "other": _constant(alpha)})


def subtract(input: Any, other: Any, *, alpha: float = 1) -> Use | None:
    """A parameter from which every example is subtracted, or that is subtracted from it."""
    return _use({"input": input, "other": other}, {"input": _constant(1), "other": _constant(-alpha)})


def multiply(input: Any, other: Any) -> Use | None:
    """A parameter that every example is multiplied by, such as a layer scale or a hand-written norm's gain."""
    if not (isinstance(input, Tensor) and isinstance(other, Tensor)):
        return None
    x, y = input.detach(), other.detach()
    return _use({"input": x, "other": y}, {"input": lambda: y, "other": lambda: x}, (x, y))


def prelu(input: Tensor, weight: Tensor) -> Use | None:
    """The slope of negative values, one or one a channel: its gradient is Σ δ · min(x, 0)."""
    x, channels = input.detach(), (1,) * (input.ndim > 1)
    aligned = weight.detach().view(*channels, -1, *(1,) * max(0, input.ndim - 2)) if weight.numel() > 1 else weight
    return _use({"weight": aligned}, {"weight": lambda: x.clamp(max=0)}, (x,), x.shape)


def expand(input: Tensor, *sizes: Any) -> Use | None:
    """A parameter repeated for every example, such as a class token."""
    wanted = _sizes(sizes)
    padded = (1,) * (len(wanted) - input.ndim) + tuple(input.shape)
    shape = torch.Size(have if size == -1 else size for have, size in zip(padded, wanted, strict=True))
    return _use({"input": input}, {"input": _constant(1)}, (), shape)


def expand_as(input: Tensor, other: Tensor) -> Use | None:
    """The same, to another tensor's shape."""
    return expand(input, *other.shape)


def repeat(input: Tensor, *repeats: Any) -> Use | None:
    """The same, by copies; each axis may be repeated."""
    counts = _sizes(repeats)
    padded = (1,) * (len(counts) - input.ndim) + tuple(input.shape)
    pairs = [*zip(counts, padded, strict=True)]

    def reduce(deltas: Tensor, batch: Batch) -> Tensor:
        rows = deltas_by_example(wide(deltas), batch.n, batch.arrangement)
        lead = padded[0]
        others = [pairs[0], *pairs[2:]] if batch.arrangement == SECOND else [(rows.shape[2] // lead, lead), *pairs[1:]]
        apart = rows.reshape(*rows.shape[:2], *(size for pair in others for size in pair))
        return apart.sum([*range(2, apart.ndim, 2)])

    possible = _arrangements(padded, len(padded)) or (FOLDED,)  # an example's copies lie together
    return Use(ROUTE, _as_they_are, possible, {"input": reduced(tuple(input.shape), reduce)})


def elementwise(function: Callable[..., Tensor], *, in_place: bool = False) -> Rule:
    """The rule of a function that takes its tensors element by element; autograd gives the partial derivatives.

    Args:
        function: makes a new tensor.
        in_place: the rule is for its twin that writes to the first argument, whose old value is kept.

    Returns:
        It.
    """

    def rule(input: Any, other: Any = None, third: Any = None, **options: Any) -> Use | None:
        given = {"input": input, "other": other, "third": third}
        while list(given.values())[-1] is None:
            given.popitem()
        tensors = {role: value.detach() for role, value in {**given, **options}.items() if isinstance(value, Tensor)}
        if in_place:
            tensors["input"] = tensors["input"].clone()
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors.values()))

        def derivative(role: str) -> Tensor:
            own = tensors[role].expand(shape).requires_grad_()
            now = {**given, **options, **tensors, role: own}
            in_order = [now.pop(name) for name in given]
            with torch.enable_grad():
                output = function(*in_order, **now)
            return torch.autograd.grad(output, own, torch.ones_like(output))[0]

        factors = {role: partial(derivative, role) for role, value in tensors.items() if value.is_floating_point()}
        return _use(tensors, factors, tuple(tensors.values()), shape)

    return rule


def summed(deltas: Tensor, shape: Sequence[int], batch: Batch) -> Tensor:
    """Sum deltas [f, …] over the axes along which a parameter of this shape was broadcast; the examples stay apart.

    Returns:
        [n, f, …] in float32 or wider.
    """
    padded = (1,) * (deltas.ndim - 1 - len(shape)) + tuple(shape)
    rows = deltas_by_example(wide(deltas), batch.n, batch.arrangement)
    kept = (padded[0], *padded[2:]) if batch.arrangement == SECOND else (1, *padded[1:])
    axes = [axis for axis, size in enumerate(kept, 2) if size == 1]
    return rows.sum(axes, keepdim=True) if axes else rows


def _use(
    tensors: Mapping[str, Any],
    factors: Mapping[str, Factor],
    saved: tuple[Tensor, ...] = (),
    shape: torch.Size | None = None,
) -> Use | None:
    """The use of those arguments that have no axis of examples."""
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        return None
    if shape is None:
        shape = torch.broadcast_shapes(*(value.shape for value in tensors.values()))
    found: dict[str, tuple[str, ...]] = {}
    for role in factors:
        possible = _arrangements(tensors[role].shape, len(shape))
        if possible:
            found[role] = possible
    terms = {role: _maker(tuple(tensors[role].shape), factors[role]) for role in found}
    order = [how for how in (FIRST, SECOND, FOLDED, FOLDED_LAST) if any(how in possible for possible in found.values())]
    return Use(ROUTE, _as_they_are, tuple(order), terms, saved) if terms else None


def _maker(shape: tuple[int, ...], factor: Factor) -> Callable[[Batch], Term]:
    """The maker of a term that multiplies deltas by a factor and sums them to a parameter's shape."""

    def term(batch: Batch) -> Term:
        by = factor()

        def reduce(deltas: Tensor) -> Tensor:
            return summed(deltas if isinstance(by, (int, float)) and by == 1 else wide(deltas) * by, shape, batch)

        return ReducedTerm(batch.n, batch.classes, shape, reduce, by if isinstance(by, Tensor) else None)

    return term


def _as_they_are(deltas: Tensor, n: int, arrangement: str) -> Tensor:
    return deltas


def _arrangements(shape: Sequence[int], ndim: int) -> tuple[str, ...]:
    """Where a parameter of this shape leaves room for the examples in an output of so many axes."""
    padded = (1,) * (ndim - len(shape)) + tuple(shape)
    first = (FIRST, FOLDED, FOLDED_LAST) if padded and padded[0] == 1 else ()
    return first + ((SECOND,) if len(padded) > 2 and padded[1] == 1 else ())


def _constant(factor: float) -> Factor:
    return lambda: factor


def _sizes(given: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(given[0]) if given and isinstance(given[0], Sequence) else given


def _both(name: str) -> list[Any]:
    """A function of torch and the method of the same name, where there are any."""
    return [getattr(owner, name) for owner in (torch, Tensor) if hasattr(owner, name)]


_BY_AUTOGRAD = ("div", "true_divide", "pow", "maximum", "minimum", "lerp", "addcmul", "addcdiv", "clamp")
_CHANGING = ("mul", "multiply", "div", "true_divide", "pow", "lerp", "addcmul", "addcdiv")
_PLAIN = {"add": add, "sub": subtract, "subtract": subtract, "mul": multiply, "multiply": multiply}

ARITHMETIC: dict[Any, Rule] = {
    Tensor.__add__: add,
    Tensor.__radd__: add,
    Tensor.__iadd__: add,
    Tensor.__sub__: subtract,
    Tensor.__isub__: subtract,
    Tensor.__mul__: multiply,
    Tensor.__rmul__: multiply,
    Tensor.__truediv__: elementwise(torch.div),
    torch.where: elementwise(torch.where),
    Tensor.where: elementwise(lambda input, condition, other: torch.where(condition, input, other)),
    torch.prelu: prelu,
    Tensor.prelu: prelu,
    Tensor.expand: expand,
    Tensor.expand_as: expand_as,
    torch.broadcast_to: expand,
    Tensor.broadcast_to: expand,
    Tensor.repeat: repeat,
    Tensor.__pow__: elementwise(torch.pow),
    Tensor.__rpow__: elementwise(lambda input, other: torch.pow(other, input)),
    Tensor.__rsub__: elementwise(lambda input, other: other - input),
    Tensor.__rtruediv__: elementwise(lambda input, other: other / input),
    **{function: rule for name, rule in _PLAIN.items() for function in _both(name)},
    **{function: elementwise(getattr(torch, name)) for name in _BY_AUTOGRAD for function in _both(name)},
    **{getattr(Tensor, f"{name}_"): _PLAIN[name] for name in ("add", "sub", "subtract")},
    **{getattr(Tensor, f"{name}_"): elementwise(getattr(torch, name), in_place=True) for name in _CHANGING},
}
"""The rule of each function of plain arithmetic."""
