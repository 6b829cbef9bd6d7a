"""Products in bfloat16 limbs, which the processor's matrix unit multiplies.

A value is the sum of two bfloat16 limbs, x = h + l + rest. A limb has 8 bits, so |x − h| ≤ 2^-8 |x| and, as l has a
sign of its own, |rest| ≤ 2^-17 |x|: nothing of a float16. Three products, h · h', h · l' and l · h', leave out l · l'
and the rests, two of 2^-17 and one of 2^-16:

    |computed − ⟨x, y⟩| ≤ (2^-15 + N u / (1 − N u)) Σ |x_i y_i|,   N = 82 + D / 512, u = 2^-24,

with 2^-16 where both sides are float16 (`error_bound`). Where what limbs leave of each row is measured, `limb_error`
says more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.arithmetic import matrix_unit
from gradstore.arithmetic.names import BFLOAT16X2
from gradstore.arithmetic.product import Operand, equal_shares
from gradstore.errors import UsageError

LIMB = 2.0**-8
"""The most that one limb leaves of a value; two leave at most `LIMB`² / 2, and nothing of a float16."""
_UNIT = 2.0**-24
# Covers rows' factors, which are applied to products by some and to entries by others, and what vanishes from products
# and squares below 2^-126: the norms of scaled vectors are around 1.
_EXTRA = 2.0**-20


def error_bound(width: int, *, exact_values: bool) -> float:
    """Bound the error of an inner product with two limbs a side.

    Args:
        width: D.
        exact_values: both sides are float16, or any other values of at most 16 bits.

    Returns:
        The most that it is off, in units of Σ |x_i y_i| ≤ ‖x‖ ‖y‖.
    """
    left_out = (1 if exact_values else 2) * LIMB**2
    return (left_out + rounding_bound(width)) * (1 + 4 * LIMB)  # since limbs may be that much larger than values


def rounding_bound(width: int, products: int = 1) -> float:
    """Bound the part of the error that float32 sums have in it.

    Args:
        width: D of a product.
        products: of that width, which are added to one result.

    Returns:
        The most that they are off, in units of Σ |x_i y_i| over the limbs that are taken.
    """
    roundings = (matrix_unit.ROUNDINGS + products * -(-width // matrix_unit.DEPTH)) * _UNIT
    return roundings / (1 - roundings)


def limb_error(query_rest: Tensor, row_rest: Tensor, added: float) -> Tensor:
    """Bound the errors of inner products of which some limbs are left out.

    Args:
        query_rest: float64 [g], ‖δ_q‖ / ‖q‖, δ being what the limbs that are taken leave.
        row_rest: float64 [B], ‖δ_t‖ / ‖t‖.
        added: what sums are off, and products that are left out, in units of ‖q'‖ ‖t'‖.

    Returns:
        The most that each is off, in units of ‖q‖ ‖t‖, float64 [g, B].
    """
    query_side = query_rest + added * (1 + query_rest)
    return torch.outer(query_side, 1 + row_rest).add_(row_rest + _EXTRA)


def relative_rests(squares: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Measured ‖δ‖², such as `Strips.rests`, in units of norms, rounded up; 0 for a vector that is zero."""
    rests = np.sqrt(squares) * (1 + matrix_unit.REST_ERROR)
    return np.divide(rests, norms, out=np.zeros_like(rests), where=norms > 0)


@dataclass(frozen=True, eq=False)
class LimbOperand(Operand):
    """Rows as they are stored, each value to be cut into two limbs."""

    choice = BFLOAT16X2
    as_stored = True

    @classmethod
    def refusal(cls) -> UsageError | None:
        """See `Operand`."""
        return matrix_unit.refusal(cls.choice.name, "--arithmetic")

    @classmethod
    def held_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """See `Operand`."""
        return dtype

    @classmethod
    def piece_columns(cls, K: int) -> int:
        """See `Operand`."""
        return K

    @classmethod
    def workspace_bytes(cls, width: int) -> tuple[int, int]:
        """See `Operand`."""
        return matrix_unit.workspace_bytes(width)

    def fill(self, start: int, phi: Tensor, factors: Tensor, rows: Sequence[int]) -> None:
        """See `Operand`."""
        self.places(start, phi.shape).copy_(phi)
        self.set_worth(start, factors)

    def shares(self, columns: int, diagonal: int | None, workers: int) -> list[tuple[int, int]]:
        """A share a worker: the matrix unit gains by long ones."""
        return equal_shares(len(self), columns, diagonal, workers)

    def write_product(self, b: Operand, out: Tensor, diagonal: int | None) -> None:
        """See `Operand`."""
        out.zero_()
        for i, piece in enumerate(b.pieces):
            sides, factors = (self.values[:, piece], b.values[:, piece]), (self.worth[i], b.worth[i])
            matrix_unit.add_product(*sides, out, left_factors=factors[0], right_factors=factors[1], diagonal=diagonal)


def sample_product(queries: int, rows: int, width: int, dtype: torch.dtype) -> Callable[[], object]:
    """As `gradstore.arithmetic.float32.sample_product`, of one limb a side."""
    packed, stored = matrix_unit.pack(torch.ones(queries, width), 1), torch.ones(rows, width).to(dtype)
    out, factors = torch.zeros(rows, queries), torch.ones(rows)

    def multiply() -> None:
        values = stored.float() if dtype == torch.int8 else stored
        matrix_unit.add_product(values, packed, out, left_factors=factors, limbs=(1, 1))

    return multiply
