"""Rows rounded to one or two integers, x = step · (high + low / finer) + rest, and how much the rest can be.

Both are within ±largest, and half a step is as many of the finer ones. Products of integers are exact, so what a
product of rounded rows says about the rows themselves follows from norms alone, by Cauchy and Schwarz: with x' = x −
rest and y' alike, and x_l, y_l the parts of the lower digits,

    |⟨x, y⟩ − (⟨x', y'⟩ − ⟨x_l, y_l⟩)| ≤ ‖x‖ ‖y − y'‖ + ‖x − x'‖ ‖y'‖ + ‖x_l‖ ‖y_l‖.

For normal entries the higher digits leave a rest of 0.009 of the norm where they are within ±127, 0.018 within ±63;
both digits 0.00004 and 0.00014.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.arithmetic import compiled_loops
from gradstore.arithmetic.int8 import MOST_COLUMNS, STEPS
from gradstore.arithmetic.seven_bits import MOST, LeftRows
from gradstore.native import library

# Sums of squares are added up in float32, in eight lanes or more; what is added is rounded a few times.
_LANES, _UNIT, _EXTRA = 8, 2.0**-24, 64
# A rest is off by a few float32 roundings of its row's largest entry, at most 127 steps.
_ENTRY = 2.0**-22 * STEPS
# Squares of entries smaller than this may underflow; rows of interest have norms around 1.
_UNDERFLOW = 1e-18
# Sums of so many products of integers up to 127 stay below 2^31; those of a scan are added up in pairs.
MAX_WIDTH = MOST_COLUMNS // 2


@dataclass(frozen=True)
class Rounded:
    """What is known of rows of some width, rounded; every array of the same shape.

    Attributes:
        step: float64; infinite where a row is not finite.
        norm: float64, at least the norm of the digits' part.
        low: float64, at least the norm of the lower digit's part; 0 where there is none.
        missed: float64, at least ‖rest‖.
    """

    step: np.ndarray
    norm: np.ndarray
    low: np.ndarray
    missed: np.ndarray

    @classmethod
    def of(cls, found: np.ndarray, width: int, *, two: bool) -> Rounded:
        """From what `round_stretches` found, float64 [..., 4]: about both digits, or about the higher alone."""
        sums = (width / _LANES + _EXTRA) * _UNIT
        with np.errstate(invalid="ignore"):
            step = found[..., 0]
            first, second, missed = np.moveaxis(np.sqrt(found[..., 1:]), -1, 0) * (1 + sums)
            missed = missed if two else second
            slack = np.sqrt(width) * (step * _ENTRY + _UNDERFLOW)
            low = second + missed + slack if two else np.zeros(step.shape)
            norm = np.where(np.isfinite(step), first * step + low, np.inf)
        return cls(step, norm, low, missed + slack)


def round_stretches(
    values: Tensor,
    factors: Tensor,
    high: Tensor,
    low: Tensor | None,
    found: np.ndarray,
    simd: str | None = None,
    *,
    largest: int = STEPS,
) -> None:
    """Round every stretch of some rows to integers within ±largest, by a step of its own.

    Args:
        values: float16 or float32 [n, segments, w], adjacent within a row, on the CPU, w ≤ 2^16.
        factors: float32 [n, segments]; what is rounded is each value times its stretch's factor, a float32.
        high: int8 [segments, n, w], adjacent within a segment; overwritten.
        low: the same, `high.stride()` apart, for a second digit; None for one digit.
        found: float64 [segments, n, 4], spaced as `high`: overwritten with what `Rounded.of` takes.
        simd: a level of the compiled loops, or "" for torch, which holds 12 bytes a value; default the fastest.
        largest: the largest integer, at most 127.
    """
    simd = library.level() if simd is None else simd
    if simd:
        compiled_loops.round_rows(values, factors.contiguous(), high, low, found, largest, simd)
        return
    for s in range(values.shape[1]):
        x = values[:, s].float() * factors[:, s, None]
        found[s] = _by_torch(x, high[s], None if low is None else low[s], largest)


def round_rows(
    values: Tensor,
    factors: Tensor,
    high: Tensor,
    low: Tensor | None = None,
    simd: str | None = None,
    *,
    largest: int = STEPS,
) -> Rounded:
    """The same for rows of one stretch: values [n, w], factors [n], high and low [n, w]; arrays [n]."""
    found = np.empty((1, len(values), 4))
    digits = (high[None], None if low is None else low[None])
    round_stretches(values[:, None], factors[:, None], *digits, found, simd, largest=largest)
    return Rounded.of(found[0], values.shape[1], two=low is not None)


def _by_torch(x: Tensor, high: Tensor, low: Tensor | None, largest: int) -> np.ndarray:
    """(step, ‖high‖², ‖x − step · high‖², ‖rest‖²) float64 [n, 4]; `x` is overwritten."""
    peak = torch.maximum(x.amax(dim=1), x.amin(dim=1).neg_())
    step = torch.where((peak >= 2.0**-100) & torch.isfinite(peak), peak / largest, torch.ones_like(peak))
    found = [step, *_take_digit(x, step, high, largest)]
    found.append(found[-1] if low is None else _take_digit(x, step / (2 * largest), low, largest)[1])
    out = torch.stack([part.double() for part in found], dim=1)
    out[~torch.isfinite(peak)] = torch.tensor([torch.inf, 0, torch.inf, torch.inf], dtype=torch.float64)
    return out.numpy()


def _take_digit(x: Tensor, step: Tensor, out: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Take the nearest multiples of a step away from `x`; squared norms of the integers and of what is left."""
    nearest = (x / step[:, None]).round_().nan_to_num_(0, 0, 0).clamp_(-largest, largest)
    out.copy_(nearest)
    x.sub_(nearest * step[:, None])
    return nearest.square().sum(dim=1, dtype=torch.float64), x.square().sum(dim=1, dtype=torch.float64)


def add_integer_product(queries: LeftRows, query_steps: Tensor, digits: Tensor, steps: Tensor, out: Tensor) -> None:
    """Add inner products of the higher digits of rows rounded to ±`MOST` to float32 `out` [m, B].

    The integer products are exact; what is added is off by 8 · 2^-24 of the norms' product.

    Args:
        queries: higher digits of m rows.
        query_steps: float32 [m].
        digits: int8 [B, w], contiguous: those of B others.
        steps: float32 [B].
        out: contiguous.
    """
    products, simd = queries.times(digits), library.level()
    if simd:
        compiled_loops.add_scaled(products, query_steps, steps, out, simd)
    else:
        out.add_(products.float().mul_(query_steps[:, None]).mul_(steps))


def pair_products(
    queries: Sequence[LeftRows],
    query_steps: Tensor,
    digits: Sequence[Tensor],
    steps: Tensor,
    pairs: tuple[Tensor, Tensor],
    *,
    lower: bool,
) -> Tensor:
    """What `add_integer_product` adds for some pairs, or what the lower digits add to it.

    Args:
        queries: both digits of m rows, the higher first.
        query_steps: float32 [m].
        digits: both digits of B rows, int8 [B, w], contiguous.
        steps: float32 [B].
        pairs: (which of the m rows, which of the B rows), int64 [pairs] each; equal ones of the B follow one another.
        lower: asks for low · high and high · low; low · low is left out.

    Returns:
        float32 [pairs], as far off.
    """
    places, columns = pairs
    if lower:
        low = queries[1].times_pairs(digits[0], places, columns) + queries[0].times_pairs(digits[1], places, columns)
        total = low.float().div_(2 * MOST)
    else:
        total = queries[0].times_pairs(digits[0], places, columns).float()
    return total.mul_(query_steps[places]).mul_(steps[columns])


def sample_product(queries: int, rows: int, width: int, dtype: torch.dtype) -> Callable[[], object]:
    """As `gradstore.arithmetic.float32.sample_product`, of the higher digits."""
    stored, factors, out = torch.ones(rows, width).to(dtype), torch.ones(rows), torch.zeros(queries, rows)
    digits = torch.empty(2, rows, width, dtype=torch.int8)
    left = LeftRows(torch.full((queries, width), MOST, dtype=torch.int8))

    def multiply() -> None:
        values = stored.float() if dtype == torch.int8 else stored
        round_rows(values, factors, *digits, largest=MOST)
        add_integer_product(left, torch.ones(queries), digits[0], factors, out)

    return multiply
