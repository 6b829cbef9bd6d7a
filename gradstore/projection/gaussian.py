"""Gaussian projections: entries are standard normals, four for each counter by Box-Muller from its four words."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradstore.projection.kind_record import Fused, Kind


def _normals(words: Tensor, k: Tensor) -> Tensor:
    uniform = (words.double() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))
    angle = (2.0 * math.pi) * uniform[..., 1::2]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(-2)


KIND = Kind(
    name="gaussian",
    code=1,
    period=4,
    entries=_normals,
    compiled=1,
    fused=Fused(number=1, tiles=1, rows={"fast": 256, "exact": 64}),
)
