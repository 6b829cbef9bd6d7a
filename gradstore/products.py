"""Inner products of feature rows, in float32 or with rows rounded to int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import UsageError

ARITHMETICS = ("float32", "int8")

# Sums of this many products of int8 values stay within int32: 2^17 · 127² < 2^31.
_INT8_COLUMNS = 1 << 17
_LARGEST_ROUNDING = 0.03


@dataclass(frozen=True)
class Operand:
    """Rows of a feature map Φ, ready to be multiplied.

    Attributes:
        values: float32 [n, D], or int8 [n, D].
        scale: float32 [n, pieces], what one unit of `values` is worth in each piece of columns; None for float32.
        pieces: the columns that share a scale.
        normalised: the kernel is a cosine.
    """

    values: Tensor
    scale: Tensor | None
    pieces: tuple[slice, ...]
    normalised: bool


def operand(phi: Tensor, norms: Tensor, rows: range, *, normalised: bool, arithmetic: str, width: int) -> Operand:
    """Prepare rows for multiplication.

    "int8" rounds each piece of a row to multiples of its largest value / 127, as do int8 stores, and sums products
    exactly. With e = ‖rounding‖ / ‖row‖, at most 3 % in any row or the row is refused, a cosine moves by at most
    2e + e² (Cauchy-Schwarz); rounding errors being independent of one another, what is seen is near e sqrt(2/D), some
    1e-4 for D = 10240, hundred times less than the projection's own noise of 1/sqrt(D).

    Args:
        phi: float32 [n, D]; overwritten.
        norms: float64 [n], by which rows are divided, so that products neither overflow nor underflow.
        rows: their indices, for messages.
        normalised: the kernel is a cosine.
        arithmetic: "float32" or "int8".
        width: columns of Φ that were scaled together, K.

    Raises:
        UsageError: int8 would lose more than 3 % of a row.
    """
    phi /= norms[:, None].float()
    if arithmetic == "float32":
        return Operand(phi, None, (slice(0, phi.shape[1]),), normalised)
    step = min(width, _INT8_COLUMNS)
    ends = range(width, phi.shape[1] + 1, width)
    pieces = tuple(slice(at, min(at + step, end)) for end in ends for at in range(end - width, end, step))
    values = torch.empty(phi.shape, dtype=torch.int8)
    scale = torch.empty(len(phi), len(pieces))
    lost, whole = torch.zeros(len(phi)), torch.linalg.vector_norm(phi, dim=1)
    for i, piece in enumerate(pieces):
        part = phi[:, piece]
        unit = part.abs().amax(dim=1).clamp_min_(torch.finfo(torch.float32).tiny) / 127
        part /= unit[:, None]
        rounded = part.round()
        values[:, piece] = rounded
        lost += (torch.linalg.vector_norm(part.sub_(rounded), dim=1) * unit).square_()
        scale[:, i] = unit
    _require_small(lost.sqrt_() / whole, rows)
    return Operand(values, scale, pieces, normalised)


def multiply(a: Sequence[Operand], b: Operand) -> np.ndarray:
    """Inner products of prepared rows, float32 [Σ n_a, n_b]; the columns' operand may be one of the rows'."""
    out = torch.empty(sum(len(rows.values) for rows in a), len(b.values))
    at = 0
    for rows in a:
        tile = out[at : at + len(rows.values)]
        if b.scale is None:
            torch.mm(rows.values, b.values.T, out=tile)
        else:
            _multiply_int8(rows, b, tile)
        if rows is b:
            tile.copy_(tile.triu() + tile.triu(1).T)  # symmetric to the last bit
            if b.normalised:
                tile.fill_diagonal_(1.0)
        at += len(rows.values)
    return out.numpy()


def _multiply_int8(a: Operand, b: Operand, out: Tensor) -> None:
    assert a.scale is not None
    assert b.scale is not None
    out.zero_()
    for i, piece in enumerate(b.pieces):
        product = torch._int_mm(a.values[:, piece], b.values[:, piece].T)
        out += product * a.scale[:, i : i + 1] * b.scale[:, i]


def _require_small(rounding: Tensor, rows: range) -> None:
    bad = torch.nonzero(~(rounding <= _LARGEST_ROUNDING))
    if len(bad):
        i = int(bad[0])
        raise UsageError(
            f"int8 loses too much of row {rows[i]}",
            where="--arithmetic",
            expected=f"at most {_LARGEST_ROUNDING:.0%} of its norm",
            got=f"{rounding[i].item():.1%}",
            hint="Its features hold a few very large values; use float32",
        )
