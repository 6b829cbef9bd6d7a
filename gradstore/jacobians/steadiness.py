"""How far a gradient is moved by roundings alone, and so how far two right ones may be apart.

A gradient is not a continuous function. Where a unit of a ReLU is within rounding of zero, or two values of a maximum
within rounding of each other, it jumps by that unit's share, up to 2 % of a ResNet18's, whichever way the same example
is computed: alone or in a batch, by one kernel or another. So two right gradients of one example may differ by as much
as one of them moves when inputs and weights are moved by little more than roundings, and by no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gradstore.jacobians.subject import Inputs, Subject

Gradients = Callable[[Subject, Inputs], Mapping[str, Tensor]]
Norm = TypeVar("Norm", float, Tensor)

VALUES = 1 << 22
"""Weights that are moved, the smallest parameters first: what moves in one layer moves in all that follow."""

_FLOOR = 1e-2  # a parameter's share of the whole below which a difference cannot be told from cancellation
_SHARES = tuple(2.0**-e for e in range(8, 2, -1))  # of the tolerance; in float32 from 3 to 105 roundings
_DRAWS = 4  # of each


def allowed(norm: Norm, whole: Norm, tolerance: float, moved: Norm) -> Norm:
    """The largest difference of a parameter's gradient that is no fault.

    Args:
        norm: of that gradient.
        whole: norm of all parameters' gradient.
        tolerance: relative difference that rounding may make.
        moved: how far `spread` saw it move.

    Returns:
        A norm; of NaN, NaN, which no difference is below.
    """
    return tolerance * (norm + _FLOOR * whole) + 2 * moved


def spread(
    subject: Subject,
    inputs: Inputs,
    gradients: Gradients,
    tolerance: float,
    enough: Callable[[Mapping[str, float]], bool],
) -> dict[str, float]:
    """Move inputs and weights by ever larger shares of the tolerance, up to an eighth, and see how far gradients go.

    Args:
        subject: the model; call inside `subject.ready()`.
        inputs: of the gradients.
        gradients: (model, inputs) -> gradient by name, always of the same names.
        tolerance: relative difference that rounding may make.
        enough: whether they have been moved so far that no more needs to be known.

    Returns:
        By name, the largest norm of a gradient's change; 0 for one that changes by itself. Takes at most 26 times what
        `gradients` does. Holds the gradients twice, and `VALUES` weights, or the smallest parameter.
    """
    still = gradients(subject, inputs)
    norms = {name: _norm(values) for name, values in still.items()}
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    itself = _distances(gradients(subject, inputs), still)
    found = dict.fromkeys(still, 0.0)
    for moved in _moved(subject, inputs, gradients, tolerance):
        for name, distance in _distances(moved, still).items():
            if itself[name] <= allowed(norms[name], whole, tolerance, 0.0):
                found[name] = max(found[name], distance)
        if enough(found):
            break
    return found


def _moved(subject: Subject, inputs: Inputs, gradients: Gradients, tolerance: float) -> Iterator[Mapping[str, Tensor]]:
    """Gradients where inputs and weights are moved, further and further."""
    chosen: list[str] = []
    total = 0
    for name, parameter in sorted(subject.parameters.items(), key=lambda item: item[1].numel()):
        total += parameter.numel()
        if chosen and total > VALUES:
            break
        chosen.append(name)
    for draw in range(len(_SHARES) * _DRAWS):
        torch.manual_seed(draw)  # inside `subject.ready()`, which sets the random state back
        nudged = partial(_nudged, by=tolerance * _SHARES[draw // _DRAWS])
        values = {name: nudged(subject.parameters[name]).requires_grad_() for name in chosen}
        yield _with_either(subject, values, tree_map(nudged, inputs), gradients)


def _with_either(
    subject: Subject, values: Mapping[str, Tensor], inputs: Inputs, gradients: Gradients
) -> Mapping[str, Tensor]:
    """Gradients at other weights and inputs, or where a module's weights cannot be exchanged at other inputs."""
    try:
        return subject.with_parameters(values, lambda other: gradients(other, inputs))
    except Exception:  # of a scripted module, say
        return gradients(subject, inputs)


def _nudged(value: Tensor, by: float) -> Tensor:
    """Each value moved by at most this share of it; indices stay."""
    if not value.is_floating_point():
        return value
    value = value.detach()
    noise = torch.empty_like(value, dtype=torch.promote_types(value.dtype, torch.float32)).uniform_(-by, by)
    return (value + value * noise).to(value.dtype)


def _distances(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: _norm(ours[name] - theirs[name]) for name in theirs}


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
