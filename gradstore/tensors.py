"""Tensors told from other values by code that needs no torch, whose import takes longer than most commands."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    import torch


def is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    """Whether a value is a tensor; where nobody has imported torch nothing is, so that this does not import it."""
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ()))
