"""Bounds on similarities from products in float32.

The bound holds for any order of summation (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., §3.1):
products are added up within a piece of columns, and the pieces one after another, so each passes through at most
N = width + pieces roundings, and |computed − ⟨q, t⟩| ≤ γ Σ|q_i t_i| ≤ γ ‖q‖ ‖t‖, γ = N u / (1 − N u), u = 2^-24.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradstore.rows import Rows
from gradstore.search.engines import Engine
from gradstore.search.phi import Scaled
from gradstore.search.query_batch import QueryGroup

_UNIT = 2.0**-24
# Roundings beside those of the sum: scaling, normalising, and underflow of entries below 2^-100 of the norm.
_EXTRA = 16
# Scaled vectors have norms around 1, unless their terms cancel; nothing is said of products of smaller ones than this.
_TINY = 2.0**-40


class FloatBlock:
    """What a worker reuses to bound block after block of rows.

    Args:
        train: the training store.
        groups: queries.
        engine: multiplies.
        block: rows of a block.

    Holds the block as stored, a piece of it in float32 (two where classes are summed), and 32 bytes a row and query.
    """

    def __init__(self, train: Rows, groups: Sequence[QueryGroup], engine: Engine, block: int) -> None:
        self.train, self.groups, self.engine = train, groups, engine
        device, width = engine.device, max(group.phi.width for group in groups)
        summed = any(group.phi.weights is not None for group in groups)
        self._columns = train.schema.empty(block)
        self._piece = torch.empty(block * width, device=device)
        self._spare = torch.empty(block * width if summed else 0, device=device)
        self._pieces = [group.pieces.to(device) for group in groups]

    def bounds(self, start: int, stop: int) -> list[tuple[QueryGroup, Tensor, Tensor]]:
        """As `IntegerBlock.bounds`."""
        columns = self.train.read(start, stop, out=self._columns)
        features = torch.from_numpy(columns["features"]).to(self.engine.device)
        found = []
        for group, pieces in zip(self.groups, self._pieces, strict=True):
            scaled = Scaled.of(group.phi, columns, self.train.where)
            center, norms = self._product(group, pieces, features, scaled)
            group.phi.require_direction(norms, columns["row"], self.train.where)
            error = error_bound(group.phi.width, group.phi.pieces)
            found.append((group, *bounds_within(group, center, norms, scaled.exponent, error)))
        return found

    def _product(
        self, group: QueryGroup, pieces: Tensor, features: Tensor, scaled: Scaled
    ) -> tuple[Tensor, np.ndarray]:
        """Inner products float64 [g, B] of scaled vectors, and the norms of the rows' float64 [B]."""
        phi, factors = group.phi, scaled.factors.to(features.device)
        out = torch.zeros(pieces.shape[1], len(features), device=features.device)
        squares = torch.zeros(len(features), dtype=torch.float64, device=features.device)
        for j in range(phi.pieces):
            piece = phi.write_piece(j, features, factors, self._piece, self._spare)
            self.engine.add_product(pieces[j, :, : piece.shape[1]], piece, out)
            if scaled.norms is None:
                squares += torch.linalg.vector_norm(piece, dim=1, dtype=torch.float64).square_()
        norms = squares.sqrt_().cpu().numpy() if scaled.norms is None else scaled.norms
        return out.double().cpu(), norms


def error_bound(width: int, pieces: int) -> float:
    """γ: the error of an inner product in float32, in units of ‖q‖ ‖t‖."""
    roundings = (width + pieces + _EXTRA) * _UNIT
    return roundings / (1 - roundings)


def bounds_within(
    group: QueryGroup, center: Tensor, norms: np.ndarray, exponent: np.ndarray, error: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Similarities and their largest errors, float64 [g, B]; infinite where nothing can be said.

    Args:
        group: the queries.
        center: float64 [g, B], inner products of scaled vectors; becomes the similarities.
        norms: float64 [B], of the rows' scaled vectors.
        exponent: int [B], of the rows.
        error: of the inner products, in units of ‖q‖ ‖t‖; one for all, or [g, B].
    """
    normalised = group.phi.kernel.normalised
    row_scale = torch.from_numpy(1 / norms if normalised else np.ldexp(1.0, exponent))
    query_scale = torch.from_numpy(group.scale)
    center.mul_(query_scale[:, None]).mul_(row_scale)
    sizes = torch.outer(query_scale * torch.from_numpy(group.norms), row_scale * torch.from_numpy(norms))
    spread = sizes.mul_(error)
    spread[torch.from_numpy(_vague(group.norms))] = torch.inf
    spread[:, torch.from_numpy(_vague(norms))] = torch.inf
    return center, spread


def _vague(norms: np.ndarray) -> np.ndarray:
    """Which vectors are so small beside what they are a sum of that products of their entries may vanish."""
    return (norms > 0) & (norms < _TINY)
