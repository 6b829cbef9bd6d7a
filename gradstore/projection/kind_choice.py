"""Which kind of projection `auto` takes: the cheaper one of equal error, by the device and by K."""

from __future__ import annotations

import torch

from gradstore.projection.kinds import BY_DEVICE, DEFAULT, KINDS, kind_of
from gradstore.projection.projection import Projection

__all__ = ["BY_DEVICE", "chosen_kind"]


def chosen_kind(dim: int, device: torch.device) -> tuple[str, str]:
    """Choose a kind for features of `dim` columns, or parts of features, that are computed on a device.

    Returns:
        Its name, and why, in words.
    """
    sparse = next(name for name in KINDS if kind_of(name).sparse is not None)
    multiple = kind_of(sparse).multiple
    if dim % multiple:
        return DEFAULT, f"{dim} columns are no multiple of {multiple}, as {sparse} needs"
    if kind_of(sparse).warning(dim):
        return DEFAULT, f"{dim} columns are too few for {sparse}"
    if Projection(DEFAULT, dim).fused(device):
        return DEFAULT, "its product is as fast as any on this GPU"
    return sparse, f"on this {device.type.upper()} its product takes a small part of the time, at equal error"
