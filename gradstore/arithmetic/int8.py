"""Rows rounded to 8-bit integers, which many processors multiply fast and exactly.

A piece of a row is divided by its unit, largest value / 127, and rounded. Products are summed in int32 without an
error, so the same rows give the same bits on every machine, with any number of threads and however the work is cut, up
to the last float32 rounding of a sum.

With e = ‖rounding‖ / ‖row‖ a cosine moves by at most 2e + e² (Cauchy-Schwarz). Rounding errors being independent of one
another, what is seen is near e sqrt(2/D), D values a row: for normal features and D = 10240 about 1e-4, against a
projection noise of 1/sqrt(D) = 1e-2, and a rounding to float16 in the store itself of 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gradstore.arithmetic.names import INT8_ROWS
from gradstore.arithmetic.product import Operand
from gradstore.errors import UsageError

_NORM_COLUMNS = 2048
STEPS = 127
"""The largest integer."""
# Sums of this many products of int8 values stay within int32: 2^17 · 127² < 2^31.
MOST_COLUMNS = 1 << 17
"""Columns that one exact product may have."""
LARGEST_ROUNDING = 0.03
"""The most that rounding may take from a row, over its norm: reached where a row's peak is 13 standard deviations."""


def refusal(where: str) -> UsageError | None:
    """Say why this machine has no right products of 8-bit integers.

    Args:
        where: the option by which they were asked for, such as "--engine".

    Returns:
        The error to raise; None where it has them.
    """
    if integer_products_are_exact():
        return None
    return UsageError(
        "torch's products of 8-bit integers are missing or overflow on this processor",
        where=where,
        got="'int8'",
        hint=f"Use {where} float32",
    )


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """Exact product of int8 a [m, w] and b [w, n], both within ±127; int32, or float64 for w > `MOST_COLUMNS`."""
    if a.shape[1] > MOST_COLUMNS:
        halves = [slice(0, MOST_COLUMNS), slice(MOST_COLUMNS, None)]
        return torch.stack([integer_product(a[:, part], b[part]).double() for part in halves]).sum(dim=0)
    if a.shape[1] == 1:  # for which torch 2.13 gives wrong numbers
        return a.int() * b.int()
    return torch._int_mm(a, b) if integer_products_are_exact() else _product_in_float32(a, b)


def _product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """1024 products of at most 127² add up to less than 2^24, so exactly."""
    out = torch.zeros(len(a), b.shape[1], dtype=torch.int32)
    for i in range(0, a.shape[1], 1024):
        out += (a[:, i : i + 1024].float() @ b[i : i + 1024].float()).int()
    return out


@lru_cache(maxsize=1)
def integer_products_are_exact() -> bool:
    """Whether this torch multiplies int8 matrices, and rightly on this processor: old ones add pairs in 16 bits."""
    rng = torch.Generator().manual_seed(0)
    try:
        return all(_is_exact(m, w, n, rng) for m, w, n in ((3, 2, 17), (33, 515, 65), (16, 64, 1)))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def _is_exact(m: int, w: int, n: int, rng: torch.Generator) -> bool:
    a, b = (torch.randint(-127, 128, (size, w), generator=rng, dtype=torch.int8) for size in (m, n))
    a[0], b[0], b[-1] = 127, 127, -127
    expected = a.long() @ b.T.long()
    return all(torch.equal(torch._int_mm(a, c).long(), expected) for c in (b.T, b.T.contiguous()))


@dataclass(frozen=True, eq=False)
class IntegerOperand(Operand):
    """Rounded rows."""

    choice = INT8_ROWS

    @classmethod
    def refusal(cls) -> UsageError | None:
        """See `Operand`."""
        return refusal("--arithmetic")

    @classmethod
    def held_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """See `Operand`."""
        return torch.int8

    @classmethod
    def piece_columns(cls, K: int) -> int:
        """See `Operand`."""
        return MOST_COLUMNS

    def fill(self, start: int, phi: Tensor, factors: Tensor, rows: Sequence[int]) -> None:
        """See `Operand`."""
        self.set_worth(start, _round_rows(phi, factors, self.places(start, phi.shape), rows, self.normalised))

    def write_product(self, b: Operand, out: Tensor, diagonal: int | None) -> None:
        """Holds two values of 4 bytes for each of `out`."""
        out, first = out.zero_(), max(0, diagonal or 0)
        for i, piece in enumerate(b.pieces):
            part = integer_product(self.values[:, piece], b.values[first:, piece].T).float()
            out[:, first:].addcmul_(part.mul_(self.worth[i][:, None]), b.worth[i][first:])


def _round_rows(phi: Tensor, factors: Tensor, out: Tensor, rows: Sequence[int], normalised: bool) -> Tensor:
    """Round rows, each class by a unit of its own.

    Args:
        phi: float32 [n, c, K]; overwritten.
        factors: float64 [n, c], what a value of phi is worth.
        out: int8 [n, c, K], written.
        rows: their n indices, for messages.
        normalised: the rows phi · factors have norm 1, and so shall have the rounded ones: their matrix is then, up to
            float32, one of cosines, positive semidefinite, and 1 where two rows are equal.

    Returns:
        What one unit is worth, float32 [n, c]. Holds one array of phi's size.

    Raises:
        UsageError: rounding would take more than `LARGEST_ROUNDING` of a row's norm; the row is named.
    """
    peak = torch.maximum(phi.amax(dim=2), phi.amin(dim=2).neg_())
    units = peak.clamp_min_(torch.finfo(torch.float32).tiny * STEPS) / STEPS
    _require_little_lost(phi, units, factors, rows, normalised)
    phi.mul_((1 / units)[..., None]).round_()
    worth = units * factors
    if normalised:
        norms = _norms(phi) * worth
        worth /= torch.linalg.vector_norm(norms, dim=1, keepdim=True)
    out.copy_(phi)
    return worth.float()


def _norms(values: Tensor) -> Tensor:
    """Norms of [n, c, K] over K, float64 [n, c], added up in float32 over few values at a time: right and fast."""
    parts = [torch.linalg.vector_norm(part, dim=2) for part in values.split(_NORM_COLUMNS, dim=2)]
    return torch.linalg.vector_norm(torch.stack(parts), dim=0, dtype=torch.float64)


def _require_little_lost(phi: Tensor, units: Tensor, factors: Tensor, rows: Sequence[int], normalised: bool) -> None:
    """Measure what rounding takes only where half a unit in every place would be too much."""
    whole = torch.ones(len(phi), dtype=torch.float64)
    if not normalised:
        whole = torch.linalg.vector_norm(_norms(phi) * factors, dim=1)
    most = torch.linalg.vector_norm(units * factors, dim=1) * (math.sqrt(phi.shape[2]) / 2)
    if bool((most <= LARGEST_ROUNDING * whole).all()):
        return
    scaled = phi / units[..., None]
    lost = torch.linalg.vector_norm(torch.linalg.vector_norm(scaled.round() - scaled, dim=2) * units * factors, dim=1)
    share = lost / whole
    bad = torch.nonzero((share > LARGEST_ROUNDING) & (whole > 0))
    if len(bad):
        i = int(bad[0])
        raise UsageError(
            f"int8 loses too much of row {rows[i]}",
            where="--arithmetic",
            expected=f"at most {LARGEST_ROUNDING:.2%} of its norm",
            got=f"{share[i].item():.2%}",
            hint="Its features hold a few very large values; use another arithmetic",
        )
