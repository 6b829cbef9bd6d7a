"""What each torch function does with a parameter: its gradient from the function's input and output gradient.

A rule has the signature of the function it stands for and returns a `Use`, or None where the call is not of a kind that
it covers; the parameter is then left to a generic route. Rules look at functions, not at modules, so a weight used
through `torch.nn.functional`, by two modules, or inside multi-head attention is seen like any other.

Deltas reach terms as [n, channels, positions], except for broadcast parameters, which see the output's own shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradstore.jacobians.blocks import ALL, Unread, outer_sum
from gradstore.jacobians.patches import Padding, patches
from gradstore.jacobians.row_owners import ANY, FIRST, FOLDED, FOLDED_LAST, by_example
from gradstore.jacobians.terms import SHRINKS, IndexTerm, OuterTerm, ReducedTerm, Term

EMBEDDING = "embedding"
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
        view: brings an output gradient to the form that the terms take.
        arrangements: how the rows of the output may belong to examples, the likeliest first.
        terms: for each argument that may be a parameter, the maker of its term.
        saved: the tensors that those makers will read, which must not change before.
    """

    route: str
    view: View
    arrangements: tuple[str, ...]
    terms: dict[str, Callable[[Batch], Term]]
    saved: tuple[Tensor, ...] = ()


def channels_last(tensor: Tensor, n: int, arrangement: str) -> Tensor:
    """[…, channels] to [n, channels, positions]."""
    return by_example(tensor, n, arrangement).reshape(n, -1, tensor.shape[-1]).transpose(1, 2)


def channels_second(tensor: Tensor, n: int, arrangement: str) -> Tensor:
    """[b, channels, …] to [n, channels, positions]."""
    return by_example(tensor.flatten(2), n, arrangement).transpose(1, 2).flatten(2)


def as_it_is(tensor: Tensor, n: int, arrangement: str) -> Tensor:
    """[n, …] unchanged."""
    return tensor


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use | None:
    """`y = x Wᵀ + b`: the gradient of W is Σ_t δ_t ⊗ x_t, that of b is Σ_t δ_t."""
    if weight.ndim != 2 or input.ndim < 2:
        return None
    x = input.detach()

    def activations(arrangement: str, inputs: Tensor, n: int, channels: slice) -> Tensor:
        return channels_last(inputs[..., channels], n, arrangement).transpose(1, 2)[:, None]

    terms = {"weight": _outer(weight, activations, x), "bias": _positions_summed(weight.shape[0])}
    return Use("linear", channels_last, ANY, terms, (x,))


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Use | None:
    """A convolution is a linear layer used at every position, on the patch that the kernel covers there."""
    if input.ndim != weight.ndim:
        return None
    x = input.detach()

    def activations(arrangement: str, inputs: Tensor, n: int, channels: slice) -> Tensor:
        read = by_example(patches(inputs[:, channels], weight.shape[2:], stride, padding, dilation), n, arrangement)
        split = read.unflatten(2, (groups, -1))  # [n, t, g, width, positions]
        return split.permute(0, 2, 1, 4, 3).flatten(2, 3)

    terms = {"weight": _outer(weight, activations, x, groups), "bias": _positions_summed(weight.shape[0])}
    return Use("convolution", channels_second, CHANNELS_SECOND, terms, (x,))


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use | None:
    """Row `input[s]` of the matrix receives δ_s; the padding row receives nothing."""
    if max_norm is not None or scale_grad_by_freq:
        return None
    rows, width = weight.shape
    padding = None if padding_idx is None else padding_idx % rows
    indices = input.detach()

    def term(batch: Batch) -> Term:
        tokens = by_example(indices, batch.n, batch.arrangement).reshape(batch.n, -1)
        return IndexTerm(batch.classes, tokens.long(), rows, width, padding)

    return Use(EMBEDDING, channels_last, ANY, {"weight": term}, (indices,))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Use | None:
    """In eval mode a batch norm is affine per channel."""
    if training or running_mean is None or running_var is None:
        return None
    mean, variance, x = running_mean, running_var, input.detach()
    return _affine(
        "batch norm", channels_second, x, weight, lambda: F.batch_norm(x, mean, variance, training=False, eps=eps)
    )


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Use | None:
    """Affine per channel after normalising within groups of channels."""
    x = input.detach()
    return _affine("group norm", channels_second, x, weight, lambda: F.group_norm(x, num_groups, eps=eps))


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Use | None:
    """Affine per channel after normalising each channel, by its own statistics or by fixed ones."""
    if use_input_stats and running_mean is not None:  # would move the running statistics
        return None
    x = input.detach()
    return _affine(
        "instance norm",
        channels_second,
        x,
        weight,
        lambda: F.instance_norm(x, running_mean, running_var, use_input_stats=use_input_stats, eps=eps),
    )


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Use | None:
    """Affine per element of the last axes after normalising over them."""
    x, shape = input.detach(), list(normalized_shape)
    view = functools.partial(_last_axes, len(shape))
    return _affine("layer norm", view, x, weight, lambda: F.layer_norm(x, shape, eps=eps))


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Use | None:
    """Scale per element of the last axes after dividing by their root mean square."""
    x, shape = input.detach(), list(normalized_shape)
    view = functools.partial(_last_axes, len(shape))
    return _affine("RMS norm", view, x, weight, lambda: F.rms_norm(x, shape, eps=eps))


def add(input: Any, other: Any, *, alpha: float = 1) -> Use | None:
    """A parameter added to every example, such as a learned position."""
    return _broadcast(input, other, lambda delta, _: delta) if alpha == 1 else None


def multiply(input: Any, other: Any) -> Use | None:
    """A parameter that every example is multiplied by, such as a layer scale or a hand-written norm's gain."""
    return _broadcast(input, other, lambda delta, factor: delta * factor)


def expand(input: Tensor, *sizes: Any) -> Use | None:
    """A parameter repeated for every example, such as a class token."""
    ndim = len(sizes[0]) if sizes and isinstance(sizes[0], Sequence) else len(sizes)
    shape = tuple(input.shape)
    if not _free_of_examples(shape, ndim):
        return None
    return Use("broadcast", as_it_is, (FIRST,), {"input": _reduced(shape, lambda delta: _sum_to(delta, shape))})


def _broadcast(input: Any, other: Any, partial: Callable[[Tensor, Tensor], Tensor]) -> Use | None:
    if not (isinstance(input, Tensor) and isinstance(other, Tensor)):
        return None
    ndim, terms = max(input.ndim, other.ndim), {}
    for role, parameter, factor in (("input", input, other.detach()), ("other", other, input.detach())):
        shape = tuple(parameter.shape)
        if _free_of_examples(shape, ndim):
            terms[role] = _reduced(shape, functools.partial(_summed_product, partial, factor, shape))
    return Use("broadcast", as_it_is, (FIRST,), terms, (input.detach(), other.detach())) if terms else None


def _summed_product(
    partial: Callable[[Tensor, Tensor], Tensor], factor: Tensor, shape: tuple[int, ...], delta: Tensor
) -> Tensor:
    return _sum_to(partial(_wide(delta), factor), shape)


def _free_of_examples(shape: tuple[int, ...], ndim: int) -> bool:
    return len(shape) < ndim or (bool(shape) and shape[0] == 1)


def _sum_to(delta: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum [n, …] over the axes along which a parameter of this shape was broadcast; the examples stay apart."""
    padded = (1,) * (delta.ndim - len(shape)) + shape
    axes = [axis for axis in range(1, delta.ndim) if padded[axis] == 1]
    return _wide(delta).sum(axes, keepdim=True) if axes else _wide(delta)


def _affine(route: str, view: View, x: Tensor, weight: Tensor | None, normalise: Callable[[], Tensor]) -> Use | None:
    """`y = w · x̂ + b`: the gradient of w is Σ_t δ_t · x̂_t, that of b is Σ_t δ_t."""
    if x.ndim < 2 or weight is None:
        return None
    shape = tuple(weight.shape)

    def scale(batch: Batch) -> Term:
        normal = _wide(view(normalise(), batch.n, batch.arrangement))
        return ReducedTerm(batch.n, batch.classes, shape, lambda delta: (_wide(delta) * normal).sum(-1), normal)

    allowed = CHANNELS_SECOND if view is channels_second else ANY
    return Use(
        route, view, allowed, {"weight": scale, "bias": _reduced(shape, lambda delta: _wide(delta).sum(-1))}, (x,)
    )


def _last_axes(count: int, tensor: Tensor, n: int, arrangement: str) -> Tensor:
    return channels_last(tensor.flatten(-count), n, arrangement)


def _outer(weight: Tensor, activations: Callable[..., Tensor], x: Tensor, groups: int = 1) -> Callable[[Batch], Term]:
    shape = tuple(weight.shape)
    width = math.prod(shape[1:])

    def term(batch: Batch) -> Term:
        positions = batch.outputs // (batch.n * shape[0])
        if positions < SHRINKS * width:
            make, apart = functools.partial(activations, batch.arrangement), batch.arrangement in (FIRST, FOLDED)
            unread = Unread(x, batch.n, math.prod(shape[2:]), make, groups, apart)
            return OuterTerm(batch.classes, shape[0], width, unread)
        made = activations(batch.arrangement, x, batch.n, ALL)
        return ReducedTerm(batch.n, batch.classes, shape, lambda delta: outer_sum(delta[:, None], made), made)

    return term


def _positions_summed(size: int) -> Callable[[Batch], Term]:
    return _reduced((size,), lambda delta: _wide(delta).sum(-1))


def _reduced(shape: tuple[int, ...], reduce: Callable[[Tensor], Tensor]) -> Callable[[Batch], Term]:
    return lambda batch: ReducedTerm(batch.n, batch.classes, shape, reduce)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


RULES: dict[Any, Callable[..., Use | None]] = {
    F.linear: linear,
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    F.embedding: embedding,
    F.batch_norm: batch_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.add: add,
    torch.mul: multiply,
    Tensor.add: add,
    Tensor.mul: multiply,
    Tensor.__add__: add,
    Tensor.__radd__: add,
    Tensor.__mul__: multiply,
    Tensor.__rmul__: multiply,
    Tensor.expand: expand,
}
"""The rule of each function that may take a parameter."""
