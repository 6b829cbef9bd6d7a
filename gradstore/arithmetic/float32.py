"""Products in float32, by BLAS.

The bound holds for any order of summation (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 3.1):
products are added up within a piece of columns, and the pieces one after another, so each passes through at most
N = width + pieces roundings, and |computed − ⟨q, t⟩| ≤ γ Σ|q_i t_i| ≤ γ ‖q‖ ‖t‖, γ = N u / (1 − N u), u = 2^-24.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradstore.arithmetic.names import FLOAT32
from gradstore.arithmetic.product import Operand

_UNIT = 2.0**-24
# Roundings beside those of the sum: scaling, normalising, and underflow of entries below 2^-100 of the norm.
_EXTRA = 16


def error_bound(width: int, pieces: int) -> float:
    """Bound the error of an inner product in float32.

    Args:
        width: columns of a piece.
        pieces: whose products are added up.

    Returns:
        γ, the most that it is off in units of ‖q‖ ‖t‖.
    """
    roundings = (width + pieces + _EXTRA) * _UNIT
    return roundings / (1 - roundings)


@dataclass(frozen=True, eq=False)
class Float32Operand(Operand):
    """Rows in float32, times their factors."""

    choice = FLOAT32
    on_gpu = True

    @classmethod
    def held_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """See `Operand`."""
        return torch.float32

    @classmethod
    def piece_columns(cls, K: int) -> int:
        """See `Operand`."""
        return 0

    def fill(self, start: int, phi: Tensor, factors: Tensor, rows: Sequence[int]) -> None:
        """See `Operand`."""
        torch.mul(phi, factors.float()[..., None], out=self.places(start, phi.shape))

    def write_product(self, b: Operand, out: Tensor, diagonal: int | None) -> None:
        """See `Operand`."""
        first = max(0, diagonal or 0)
        torch.mm(self.values, b.values[first:].T, out=out[:, first:])


def sample_product(queries: int, rows: int, width: int, dtype: torch.dtype) -> Callable[[], object]:
    """Make a product of a search's shape, of rows as stored, to be timed.

    Args:
        queries: of the product.
        rows: of the product.
        width: columns.
        dtype: of the rows.

    Returns:
        A function that multiplies once.
    """
    q, stored, factors = torch.ones(queries, width), torch.ones(rows, width).to(dtype), torch.ones(rows)
    out, piece = torch.zeros(queries, rows), torch.empty(rows, width)
    return lambda: out.addmm_(q, piece.copy_(stored).mul_(factors[:, None]).T)
