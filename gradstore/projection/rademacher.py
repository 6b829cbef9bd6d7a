"""Rademacher projections: entries +1 and -1 with equal chances, a bit each.

Of the four words of a counter, bit ``p mod 32`` of word ``(p div 32) mod 4``; 1 is +1, 0 is -1.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from gradstore.projection.kind_record import AuditCost, Fused, Grid, Kind

_SIGNS_OF_BYTE = (((torch.arange(256)[:, None] >> torch.arange(8)) & 1) * 2 - 1).double()


def _signs(words: Tensor, k: Tensor) -> Tensor:
    """Each byte looked up in a 256 x 8 table of signs."""
    bytes_ = (words.unsqueeze(-1) >> torch.arange(0, 32, 8, device=words.device)) & 255
    return torch.nn.functional.embedding(bytes_, _signs_of_byte(words.device)).flatten(-3)


@cache
def _signs_of_byte(device: torch.device) -> Tensor:
    return _SIGNS_OF_BYTE.to(device)


def _sign(words: Tensor, k: Tensor, place: Tensor) -> Tensor:
    word = words.gather(-1, (place >> 5).unsqueeze(-1)).squeeze(-1)
    return ((word >> (place & 31)) & 1).double() * 2 - 1


KIND = Kind(
    name="rademacher",
    code=0,
    period=128,
    entries=_signs,
    entry=_sign,
    integers=True,
    grid=Grid(unit=1.0, depth=4096, limb_bits=40, limbs=1),
    audit=AuditCost(columns=1 << 14, entry=4e3, block=8e8),
    compiled=0,
    shares_layers=True,
    fused=Fused(number=0, tiles=2, rows={"fast": 128, "exact": 64}),
    triton=True,
)
