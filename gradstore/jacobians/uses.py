"""What one call does with its parameters, in the form that every rule returns it, and how output gradients are read.

Deltas, the gradients of some classes' logits with respect to the call's output, reach terms as [n, f, channels,
positions] of f classes; those of arithmetic and products keep the output's own axes, [n, f, rows, …].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradstore.jacobians.row_owners import FIRST, FOLDED, FOLDED_LAST, deltas_by_example
from gradstore.jacobians.terms import SHRINKS, KeptTerm, ReducedTerm, Term

View = Callable[[Tensor, int, str], Tensor]
CHANNELS_SECOND = (FIRST, FOLDED, FOLDED_LAST)  # where the second axis holds channels it cannot hold examples


@dataclass(frozen=True)
class Batch:
    """What a term needs to know of the batch: examples, classes, arrangement of rows, elements of the call's output."""

    n: int
    classes: int
    arrangement: str
    outputs: int


@dataclass(frozen=True)
class Use:
    """One call of a function with parameters.

    Attributes:
        route: the kind of layer, for people.
        view: (deltas [f, …], n, arrangement) -> the form that the terms take, [n, f, …].
        arrangements: how the rows of the output may belong to examples, the likeliest first.
        terms: for each argument that may be a parameter, the maker of its term.
        saved: the tensors that those makers will read, which must not change before.
        multiplies: whether the weight is multiplied by the first of them as it is.
    """

    route: str
    view: View
    arrangements: tuple[str, ...]
    terms: dict[str, Callable[[Batch], Term]]
    saved: tuple[Tensor, ...] = ()
    multiplies: bool = False


def channels_last(deltas: Tensor, n: int, arrangement: str) -> Tensor:
    """[f, …, channels] to [n, f, channels, positions]."""
    rows = deltas_by_example(deltas, n, arrangement)
    return rows.reshape(n, len(deltas), -1, deltas.shape[-1]).transpose(2, 3)


def channels_second(deltas: Tensor, n: int, arrangement: str) -> Tensor:
    """[f, b, channels, …] to [n, f, channels, positions]."""
    positions = deltas.flatten(3) if deltas.ndim > 3 else deltas[..., None]
    return deltas_by_example(positions, n, arrangement).transpose(2, 3).flatten(3)


def positions_of(view: View, tensor: Tensor, n: int, arrangement: str) -> Tensor:
    """What a view makes of a tensor without classes, [n, channels, positions]."""
    return view(tensor[None], n, arrangement)[:, 0]


def wide(tensor: Tensor) -> Tensor:
    """In float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def positions_summed(size: int) -> Callable[[Batch], Term]:
    """The maker of a bias's term: Σ_t δ_t of [n, f, size, positions]."""
    return reduced((size,), lambda delta, _: wide(delta).sum(-1))


def reduced(shape: tuple[int, ...], reduce: Callable[[Tensor, Batch], Tensor]) -> Callable[[Batch], Term]:
    """The maker of a term that is reduced from each delta at once.

    Args:
        shape: of the parameter.
        reduce: (deltas, batch) to [n, f, …] with as many elements a row as the parameter has.

    Returns:
        It.
    """
    return lambda batch: ReducedTerm(batch.n, batch.classes, shape, lambda delta: reduce(delta, batch))


def kept_or_reduced(batch: Batch, shape: tuple[int, ...], make: Callable[[Tensor, int, int], Tensor]) -> Term:
    """A term whose deltas are kept, or reduced at once where that is much smaller.

    Args:
        batch: that it is for.
        shape: of the parameter.
        make: (deltas [n, c, …], first, last) to rows [first, last) of the gradient, [n, c, (last − first) · width].

    Returns:
        It.
    """
    rows = shape[0] if shape else 1
    if batch.outputs < SHRINKS * batch.n * math.prod(shape):
        return KeptTerm(batch.classes, rows, math.prod(shape) // rows, make)
    return ReducedTerm(batch.n, batch.classes, shape, lambda deltas: make(deltas, 0, rows))
