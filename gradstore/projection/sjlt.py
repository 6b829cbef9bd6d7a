"""The sparse Johnson-Lindenstrauss transform: one non-zero, +32 or -32, in each column and block of 1024 rows.

Of the four words of a counter, word ``j mod 4`` serves block j: its upper ten bits are the row within the block, and
its bit 0 is the sign; 1 is +32, 0 is -32.

So every entry has mean 0 and variance 1, and with whole blocks an inner product of
features has the variance that signs give it, ``(‖x‖² ‖y‖² + ⟨x, y⟩² - 2 Σ x_p² y_p²) / K`` (Kane and Nelson 2014, the
block construction). Only the tails are heavier, the more so the fewer blocks K has; see `norm_bands.sparse_band`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradstore.projection.kind_record import AuditCost, Grid, Kind, Sparse
from gradstore.projection.norm_bands import sparse_band

BLOCK = 1024
_SIZE = 32.0  # the root of BLOCK, which makes the variance 1
_BLOCKS_OF_COUNTER = 4  # a word each
_ENOUGH_BLOCKS = 4
_FIRST_ROW = 2**31  # third words from here on are no k of a dense kind


def _counter_row(k: Tensor) -> Tensor:
    return _FIRST_ROW + k.div(BLOCK * _BLOCKS_OF_COUNTER, rounding_mode="floor")


def _nonzero(word: Tensor) -> tuple[Tensor, Tensor]:
    return word >> 22, (word & 1).double().mul_(2 * _SIZE).sub_(_SIZE)


def _norm_band(K: int) -> tuple[float, float]:
    return sparse_band(K // BLOCK, BLOCK)


def _warning(K: int) -> str:
    blocks = K // BLOCK
    if blocks >= _ENOUGH_BLOCKS:
        return ""
    return (
        f"with K = {K} the sparse projection has {blocks} non-zero{'s' * (blocks > 1)} a column, so that a few large "
        f"gradient entries that meet move a similarity far; from K = {_ENOUGH_BLOCKS * BLOCK} on that is rare"
    )


def _entries(words: Tensor, k: Tensor) -> Tensor:
    place = k.div(BLOCK, rounding_mode="floor").remainder(_BLOCKS_OF_COUNTER).expand(words.shape[:-1])
    row, value = _nonzero(words.gather(-1, place.unsqueeze(-1)).squeeze(-1))
    return torch.where(row == k.remainder(BLOCK), value, 0.0).unsqueeze(-1)


KIND = Kind(
    name="sjlt",
    code=0,
    period=1,
    entries=_entries,
    row=_counter_row,
    multiple=BLOCK,
    integers=True,
    sparse=Sparse(block=BLOCK, nonzero=_nonzero),
    grid=Grid(unit=_SIZE, depth=4096, limb_bits=40, limbs=1),
    pace=40.0,
    norm_band=_norm_band,
    warning=_warning,
    audit=AuditCost(columns=1 << 14, entry=1.2e3, block=2e7, rows=_BLOCKS_OF_COUNTER * BLOCK),
    compiled=0,
    shares_layers=True,
)
