"""Composite functions of torch, run step by step so that the calls inside them are seen."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradstore.jacobians.recurrent import steps_of


def spelled_out(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], learned: Callable[[Tensor], bool]
) -> Callable[..., Any] | None:
    """The steps of a composite function that may use a parameter inside.

    Args:
        func: what was called.
        args: with what.
        kwargs: likewise.
        learned: whether a tensor is a parameter or was made of some.

    Returns:
        A function of the same arguments; None where the call is to be made as it is.
    """
    if func is F.multi_head_attention_forward:
        return _multi_head_attention
    if func is F.scaled_dot_product_attention:
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        if isinstance(mask, Tensor) and learned(mask):
            return attention
    return steps_of(func, args, kwargs)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention in eval mode, to whose scores something is added.

    Returns:
        softmax(q kᵀ · scale + mask) v, [..., queries, width].
    """
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores, -1) @ value


def _inside(function: Any) -> Callable[..., Any]:
    """A composite function of torch whose inner calls the mode sees: the original passes itself to the mode instead."""
    scope = dict(function.__globals__, has_torch_function=lambda *_: False)
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_multi_head_attention = _inside(F.multi_head_attention_forward)
