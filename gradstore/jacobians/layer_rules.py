"""Rules of the layers that hold most of a model's parameters: linear layers, convolutions, embeddings and norms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradstore.jacobians.blocks import ALL, Unread, outer_sum
from gradstore.jacobians.patches import Padding, each, padded, patches
from gradstore.jacobians.row_owners import ANY, FIRST, FOLDED, by_example, deltas_by_example
from gradstore.jacobians.terms import SHRINKS, IndexTerm, OuterTerm, ReducedTerm, Term
from gradstore.jacobians.uses import (
    CHANNELS_SECOND,
    Batch,
    Use,
    View,
    channels_last,
    channels_second,
    kept_or_reduced,
    positions_of,
    positions_summed,
    reduced,
    wide,
)

EMBEDDING = "embedding"
_SMALL_KERNEL = 9  # points; of 49, products with the patches take a third of the time


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use | None:
    """`y = x Wᵀ + b`: the gradient of W is Σ_t δ_t ⊗ x_t, that of b is Σ_t δ_t."""
    if weight.ndim != 2 or input.ndim < 2:
        return None
    x = input.detach().to_dense() if input.is_sparse else input.detach()

    def activations(arrangement: str, inputs: Tensor, n: int, channels: slice) -> Tensor:
        return positions_of(channels_last, inputs[..., channels], n, arrangement).transpose(1, 2)[:, None]

    terms = {"weight": outer(weight, activations, x, by_position=True), "bias": positions_summed(weight.shape[0])}
    return Use("linear", channels_last, ANY, terms, (x,), multiplies=True)


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

    small = groups > 1 and math.prod(weight.shape[2:]) <= _SMALL_KERNEL and not isinstance(padding, str)
    if small and x.device.type == "cpu":
        summed = functools.partial(_grouped_gradient, x, weight, stride, padding, dilation, groups)
    else:
        summed = None
    terms = {"weight": outer(weight, activations, x, groups, summed=summed), "bias": positions_summed(len(weight))}
    return Use("convolution", channels_second, CHANNELS_SECOND, terms, (x,), multiplies=True)


def _grouped_gradient(
    x: Tensor, weight: Tensor, stride: Any, padding: Padding, dilation: Any, groups: int, deltas: Tensor
) -> Tensor:
    """The gradient of a grouped convolution's weight, by one convolution in which each example is a group of its own.

    Rochette et al. (2019); where the kernel is small it takes a third of the time of products with the patches, which
    have many times the memory of the input.

    Returns:
        Of deltas [n, f, o, positions], [n, f, o, …].
    """
    n, dims, kernel = len(x), x.ndim - 2, tuple(weight.shape[2:])
    steps, gaps = each(stride, dims), each(dilation, dims)
    if isinstance(padding, str):
        x, padding = padded(x, kernel, padding, gaps), 0
    sides = each(padding, dims)
    space = [
        (size + 2 * side - gap * (k - 1) - 1) // step + 1
        for size, side, gap, k, step in zip(x.shape[2:], sides, gaps, kernel, steps, strict=True)
    ]
    images, kernels = x.reshape(1, -1, *x.shape[2:]), x.new_empty(n * len(weight), *weight.shape[1:])
    found = [
        torch.ops.aten.convolution_backward(
            delta.reshape(1, -1, *space),
            images,
            kernels,
            None,
            steps,
            sides,
            gaps,
            False,
            [0] * dims,
            n * groups,
            [False, True, False],
        )[1]
        for delta in deltas.unbind(1)
    ]
    return torch.stack([gradient.view(n, *weight.shape) for gradient in found], 1)


def transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Use | None:
    """A convolution backwards: the kernel spreads each input over the patch of the output that it would read there."""
    if input.ndim != weight.ndim:
        return None
    x, kernel = input.detach(), tuple(weight.shape[2:])
    sides = zip(each(padding, len(kernel)), each(output_padding, len(kernel)), strict=True)
    uncut = [side for before, more in reversed([*sides]) for side in (before, before - more)]

    def make(deltas: Tensor, arranged: Tensor, first: int, last: int) -> Tensor:
        n, c, folds = deltas.shape[:3]
        read = patches(F.pad(deltas.flatten(0, 2), uncut), kernel, stride, 0, dilation)
        read = read.view(n, c, folds, groups, -1, read.shape[-1])
        rows = arranged.flatten(3).unflatten(2, (groups, -1))
        found = torch.einsum("nfgit,ncfgwt->ncgiw", wide(rows), wide(read)).flatten(2, 3)
        return found[:, :, first:last].flatten(2)

    def term(batch: Batch) -> Term:
        arranged = by_example(x, batch.n, batch.arrangement)
        return kept_or_reduced(batch, tuple(weight.shape), lambda deltas, *rows: make(deltas, arranged, *rows))

    def total(deltas: Tensor, _: Batch) -> Tensor:
        return wide(deltas).flatten(4).sum((2, 4))

    outputs = weight.shape[1] * groups
    return Use(
        "convolution", deltas_by_example, CHANNELS_SECOND, {"weight": term, "bias": reduced((outputs,), total)}, (x,)
    )


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
    if scale_grad_by_freq:  # by how often a row occurs in the batch
        return None
    rows, width = weight.shape
    padding = None if padding_idx is None else padding_idx % rows
    indices = input.detach()

    def term(batch: Batch) -> Term:
        tokens = by_example(indices, batch.n, batch.arrangement).reshape(batch.n, -1)
        return IndexTerm(batch.classes, tokens.long(), rows, width, padding)

    return Use(EMBEDDING, channels_last, ANY, {"weight": term}, (indices,))


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Use | None:
    """An embedding whose rows are added up, or their mean taken, over the tokens [b, S] of each bag."""
    if input.ndim != 2 or offsets is not None or scale_grad_by_freq or mode not in ("sum", "mean"):
        return None
    rows, width = weight.shape
    padding = None if padding_idx is None else padding_idx % rows
    indices = input.detach()
    counted = torch.ones_like(indices) if padding is None else indices != padding
    share = counted.to(weight.dtype)
    if mode == "mean":
        share = share / share.sum(1, keepdim=True).clamp(min=1)
    if per_sample_weights is not None:
        share = share * per_sample_weights.detach()

    def view(deltas: Tensor, n: int, arrangement: str) -> Tensor:
        """[f, b, d] to [n, f, d, tokens]: every token takes its share of its bag's."""
        tokens = deltas_by_example(deltas[:, :, None] * share[..., None], n, arrangement)
        return tokens.flatten(2, -2).transpose(2, 3)

    def term(batch: Batch) -> Term:
        tokens = by_example(indices, batch.n, batch.arrangement).reshape(batch.n, -1)
        return IndexTerm(batch.classes, tokens.long(), rows, width, padding)

    return Use("embedding bag", view, CHANNELS_SECOND, {"weight": term}, (indices, share))


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use | None:
    """`y_o = x1ᵀ W_o x2 + b`: a linear layer of the products of both inputs' channels."""
    x, y = input1.detach(), input2.detach()

    def activations(arrangement: str, inputs: Tensor, n: int, channels: slice) -> Tensor:
        ours = positions_of(channels_last, inputs[..., channels], n, arrangement).transpose(1, 2)
        theirs = positions_of(channels_last, y, n, arrangement).transpose(1, 2)
        return (ours[..., None] * theirs[..., None, :]).flatten(2)[:, None]

    made = outer(weight, activations, x, apart=False, by_position=True)
    return Use("bilinear", channels_last, ANY, {"weight": made, "bias": positions_summed(weight.shape[0])}, (x, y))


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


def _affine(route: str, view: View, x: Tensor, weight: Tensor | None, normalise: Callable[[], Tensor]) -> Use | None:
    """`y = w · x̂ + b`: the gradient of w is Σ_t δ_t · x̂_t, that of b is Σ_t δ_t."""
    if x.ndim < 2 or weight is None:
        return None
    shape = tuple(weight.shape)

    def scale(batch: Batch) -> Term:
        normal = wide(positions_of(view, normalise(), batch.n, batch.arrangement))
        return ReducedTerm(
            batch.n, batch.classes, shape, lambda deltas: (wide(deltas) * normal[:, None]).sum(-1), normal
        )

    allowed = CHANNELS_SECOND if view is channels_second else ANY
    shift = reduced(shape, lambda deltas, _: wide(deltas).sum(-1))
    return Use(route, view, allowed, {"weight": scale, "bias": shift}, (x,))


def _last_axes(count: int, deltas: Tensor, n: int, arrangement: str) -> Tensor:
    return channels_last(deltas.flatten(-count), n, arrangement)


def outer(
    weight: Tensor,
    activations: Callable[..., Tensor],
    x: Tensor,
    groups: int = 1,
    *,
    apart: bool = True,
    by_position: bool = False,
    summed: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[Batch], Term]:
    """The maker of the term of a weight [o, …] that is used at many positions.

    Args:
        weight: it.
        activations: (arrangement, inputs, n, channels) -> [n, g, T, i], of some channels of the inputs.
        x: the inputs.
        groups: g.
        apart: whether the inputs of several batches can be joined.
        by_position: whether the layer's output has all channels of a position together.
        summed: a faster way from deltas [n, f, o, T] to the gradient [n, f, o, …], where rows are examples.

    Returns:
        It; the gradient is kept as outer products, or added up at once where that is much smaller.
    """
    shape = tuple(weight.shape)
    width = math.prod(shape[1:])

    def term(batch: Batch) -> Term:
        positions = batch.outputs // (batch.n * shape[0])
        if positions < SHRINKS * width:
            make, joins = functools.partial(activations, batch.arrangement), batch.arrangement in (FIRST, FOLDED)
            unread = Unread(x, batch.n, math.prod(shape[2:]), make, groups, apart and joins)
            return OuterTerm(batch.classes, shape[0], width, unread, by_position=by_position)
        if summed is not None and batch.arrangement == FIRST:
            return ReducedTerm(batch.n, batch.classes, shape, summed)
        made = activations(batch.arrangement, x, batch.n, ALL)
        return ReducedTerm(batch.n, batch.classes, shape, lambda deltas: outer_sum(deltas, made), made)

    return term


LAYERS: dict[Any, Callable[..., Use | None]] = {
    F.linear: linear,
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    F.conv_transpose1d: transposed_convolution,
    F.conv_transpose2d: transposed_convolution,
    F.conv_transpose3d: transposed_convolution,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    F.bilinear: bilinear,
    F.batch_norm: batch_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
}
"""The rule of each function that is a layer."""
