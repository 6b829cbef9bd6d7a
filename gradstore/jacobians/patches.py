"""The patches that a convolution reads, so that it becomes a linear layer used at many positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

Padding = str | int | Sequence[int]


def patches(
    inputs: Tensor,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
) -> Tensor:
    """Unfold inputs in one, two or three spatial dimensions.

    Args:
        inputs: [b, channels, *space].
        kernel: the kernel's extent per spatial dimension.
        stride: as `torch.nn.functional.conv2d` takes it; so are padding ("same" and "valid" too) and dilation.
        padding: zeros added around the inputs.
        dilation: distance between the kernel's points.

    Returns:
        [b, channels · prod(kernel), positions], its second axis in the order of a flattened weight row.
    """
    dims = len(kernel)
    steps, gaps = each(stride, dims), each(dilation, dims)
    extended = padded(inputs, kernel, padding, gaps)
    spans = [gap * (k - 1) + 1 for gap, k in zip(gaps, kernel, strict=True)]
    space = [(size - span) // step + 1 for size, span, step in zip(extended.shape[2:], spans, steps, strict=True)]
    strides = extended.stride()
    view = extended.as_strided(
        (*extended.shape[:2], *kernel, *space),
        (*strides[:2], *_scaled(strides[2:], gaps), *_scaled(strides[2:], steps)),
    )
    return view.flatten(1, 1 + dims).flatten(2)


def padded(inputs: Tensor, kernel: Sequence[int], padding: Padding, gaps: Sequence[int]) -> Tensor:
    """Inputs as a convolution without padding would take them.

    Args:
        inputs: [b, channels, *space].
        kernel: the kernel's extent per spatial dimension.
        padding: as for `patches`.
        gaps: the dilation per spatial dimension.

    Returns:
        [b, channels, *space], with zeros around it.
    """
    if padding == "valid":
        return inputs
    if padding == "same":
        totals = [gap * (k - 1) for gap, k in zip(gaps, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        assert not isinstance(padding, str)
        sides = [(width, width) for width in each(padding, len(kernel))]
    if not any(map(any, sides)):
        return inputs
    return F.pad(inputs, [width for side in reversed(sides) for width in side])


def each(value: int | Sequence[int], dims: int) -> list[int]:
    """A value per spatial dimension, of a convolution's argument that may be one for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _scaled(strides: Sequence[int], factors: Sequence[int]) -> list[int]:
    return [stride * factor for stride, factor in zip(strides, factors, strict=True)]
