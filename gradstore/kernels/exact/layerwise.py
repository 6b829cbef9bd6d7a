"""The embedding kernel as it is written in Engel et al. (ICLR 2024, App. B): normalised by the norms in each layer.

    E(x_i, x_j) = Σ_l ⟨h_i^l, h_j^l⟩ / sqrt(Σ_l ‖h_i^l‖² ‖h_j^l‖²)

The denominator couples the layers of the two examples, so it is no product of two norms: E is not a cosine, and its
diagonal, Σ_l ‖h^l‖² / sqrt(Σ_l ‖h^l‖⁴), lies between 1 and the square root of the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.arithmetic.product import Operand, multiply
from gradstore.errors import NonFiniteError


@dataclass(frozen=True, eq=False)
class Layered:
    """Representations of some examples, all layers side by side, and the squared norm of each.

    Attributes:
        side_by_side: the layers of each example, not normalised.
        squares: ‖h^l‖², float64 [n, layers].
        rows: the examples' indices in their split, int64 [n].
    """

    side_by_side: Operand
    squares: Tensor
    rows: np.ndarray

    def __len__(self) -> int:
        """Examples."""
        return len(self.rows)


def multiply_layered(a: Sequence[Layered], b: Layered) -> np.ndarray:
    """E between the rows of several operands and those of one, float32 [Σ n_a, n_b]; see `multiply`.

    Returns:
        float32 [Σ n_a, n_b].

    Raises:
        NonFiniteError: two examples share no layer in which both have a direction.
    """
    values = multiply([rows.side_by_side for rows in a], b.side_by_side)
    norms = (torch.cat([rows.squares for rows in a]) @ b.squares.T).sqrt()
    if a[-1] is b:
        own = norms[len(norms) - len(b) :]
        own.copy_(own.triu() + own.triu(1).T)  # symmetric to the last bit
    bad = torch.nonzero(~(torch.isfinite(norms) & (norms > 0)))
    if len(bad):
        i, j = (int(place) for place in bad[0])
        pair = np.concatenate([rows.rows for rows in a])[i], b.rows[j]
        raise NonFiniteError(
            f"the representations of rows {pair[0]} and {pair[1]} have no layer in common that is not zero, so "
            "embedding-layerwise is undefined",
            expected="a finite norm above zero",
            got=f"{norms[i, j].item()}",
            hint="Choose layers with --layers, or use the kernel embedding",
        )
    values /= norms.numpy()
    return values
