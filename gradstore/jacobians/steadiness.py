"""How far a gradient is moved by roundings alone.

A gradient is not a continuous function. Where a unit of a ReLU is within rounding of zero, or two values of a maximum
within rounding of each other, it jumps by that unit's share, 1 % of a ResNet18's, whichever way the same example is
computed: alone or in a batch, by one kernel or another. So two right gradients of one example may differ by as much as
one of them moves when inputs and weights are moved by a few roundings, and by no more.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from gradstore.jacobians.subject import Inputs, Subject

Gradients = Callable[[Subject, Inputs], Mapping[str, Tensor]]

VALUES = 1 << 22
"""Weights that are moved, the smallest parameters first: what moves in one layer moves in all that follow."""

_ROUNDINGS = (4, 8, 16, 32, 64, 128)  # by how many a value is moved at most
_DRAWS = 4  # of each


def spread(
    subject: Subject,
    inputs: Inputs,
    gradients: Gradients,
    tolerance: float,
    enough: Callable[[Mapping[str, float]], bool],
) -> dict[str, float]:
    """Move inputs and weights by ever more roundings, and see how far gradients go.

    Args:
        subject: the model; call inside `subject.ready()`.
        inputs: of the gradients.
        gradients: (model, inputs) -> gradient by name.
        tolerance: relative difference beyond which gradients that differ from call to call are not rounding's doing.
        enough: whether it has been moved so far that no more needs to be known.

    Returns:
        By name, the largest norm of a gradient's change; 0 for one that changes by itself. Holds the gradients twice,
        and `VALUES` weights, or the smallest parameter.
    """
    still = gradients(subject, inputs)
    itself = _distances(gradients(subject, inputs), still)
    steady = {name for name, moved in itself.items() if moved <= tolerance * _norm(still[name])}
    found = dict.fromkeys(still, 0.0)
    for moved in _moved(subject, inputs, gradients):
        distances = _distances(moved, still)
        found = {name: max(most, distances[name]) if name in steady else 0.0 for name, most in found.items()}
        if enough(found):
            break
    return found


def _moved(subject: Subject, inputs: Inputs, gradients: Gradients) -> Iterator[Mapping[str, Tensor]]:
    """Gradients where inputs and weights are moved, further and further."""
    chosen: list[str] = []
    total = 0
    for name, parameter in sorted(subject.parameters.items(), key=lambda item: item[1].numel()):
        total += parameter.numel()
        if chosen and total > VALUES:
            break
        chosen.append(name)
    for draw in range(len(_ROUNDINGS) * _DRAWS):
        torch.manual_seed(draw)  # inside `subject.ready()`, which sets the random state back
        roundings = _ROUNDINGS[draw // _DRAWS]
        example = tree_map(partial(_nudged, roundings=roundings), inputs)
        weights = {name: _nudged(subject.parameters[name], roundings).requires_grad_() for name in chosen}
        try:
            found = _with_weights(subject, weights, gradients, example)
        except RuntimeError:  # a scripted module, say, whose weights cannot be exchanged
            found = gradients(subject, example)
        yield found


def _nudged(value: Tensor, roundings: int) -> Tensor:
    if not value.is_floating_point():
        return value
    value = value.detach()
    noise = torch.empty_like(value, dtype=torch.promote_types(value.dtype, torch.float32)).uniform_(-1, 1)
    return (value * (1 + roundings * torch.finfo(value.dtype).eps * noise)).to(value.dtype)


def _with_weights(
    subject: Subject, weights: Mapping[str, Tensor], gradients: Gradients, inputs: Inputs
) -> Mapping[str, Tensor]:
    """Gradients of a model whose weights are others for as long as this takes."""
    other = copy.copy(subject)
    other.parameters = {**subject.parameters, **weights}
    values = {f"model.{name}": value for name, value in weights.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # cuDNN's, of recurrent layers whose weights lie apart
        return functional_call(_Around(subject.model), values, (partial(gradients, other, inputs),))


class _Around(nn.Module):
    """Calls anything at all while `functional_call` has the model's weights exchanged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        return work()


def _distances(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: _norm(ours[name] - theirs[name]) for name in theirs}


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
