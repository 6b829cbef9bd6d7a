"""A sketch of every row, and what it proves about a similarity.

A row's unit feature t is rounded to 8 bits, t = t' + δ, and t' is split by the basis: t' = Q y + t'_⊥. Then for a unit
query q with coordinates y_q and rest q_⊥, by Cauchy and Schwarz,

    |⟨q, t⟩ − ⟨y_q, y⟩| ≤ ‖q_⊥‖ ‖t'_⊥‖ + ‖δ‖.

Kept for a row: y in float16, ‖t'_⊥‖, and ‖δ‖ plus what float16 took from y. Both numbers are rounded up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.search.basis import Basis, integer_product, piece_rows
from gradstore.search.phi import Phi, Scaled
from gradstore.search.query_batch import QueryGroup

# Covers float32 sums of squares within a piece and every float64 rounding: 2 · (2048 + 16) · 2^-24 and some.
_SLACK = 3e-4
_ROUNDED = 1e-9


@dataclass(frozen=True)
class RowSketch:
    """What is kept of n rows.

    Attributes:
        coordinates: float16 [n, r], of the unit feature.
        rest: float32 [n], at least ‖t'_⊥‖.
        error: float32 [n], at least ‖δ‖ plus the rounding of the coordinates.
    """

    coordinates: np.ndarray
    rest: np.ndarray
    error: np.ndarray

    def __len__(self) -> int:
        """Rows."""
        return len(self.rest)

    def rows(self, start: int, stop: int) -> RowSketch:
        """A range of rows."""
        return RowSketch(self.coordinates[start:stop], self.rest[start:stop], self.error[start:stop])


@dataclass(frozen=True)
class QuerySketch:
    """Coordinates float64 [m, r] of unit queries, at least ‖q_⊥‖ [m], and at least the coordinates' Euclidean error."""

    coordinates: np.ndarray
    rest: np.ndarray
    error: float

    def bounds(self, rows: RowSketch) -> tuple[Tensor, Tensor]:
        """(estimate, spread) float64 [m, n]: every cosine lies within estimate ± spread."""
        y = torch.from_numpy(np.asarray(rows.coordinates)).float()
        q = torch.from_numpy(self.coordinates.astype(np.float32))
        estimate = (q @ y.T).double()
        length = q.norm(dim=1).double() * 1.001
        roundings = (y.shape[1] + 16) * 2.0**-24
        fixed = 1.06 * (self.error + length * roundings) + _ROUNDED  # ‖y‖ ≤ 1 + ‖δ‖ + its rounding ≤ 1.06
        spread = torch.outer(torch.from_numpy(self.rest), torch.from_numpy(np.asarray(rows.rest, np.float64)))
        spread += torch.from_numpy(np.asarray(rows.error, np.float64)) + fixed[:, None]
        return estimate, spread


def sketch_queries(basis: Basis, group: QueryGroup) -> QuerySketch:
    """Coordinates of some queries and what they leave out."""
    coordinates, error = basis.query_coordinates(group)
    length = np.maximum(np.linalg.norm(coordinates, axis=1) - error, 0)
    return QuerySketch(coordinates, np.sqrt(np.maximum(1 - length**2, 0) + _ROUNDED), error)


def sketch_rows(basis: Basis, phi: Phi, columns: Mapping[str, np.ndarray], where: object) -> RowSketch:
    """Sketch a block of rows; holds a piece of them in float32 at a time.

    Raises:
        NonFiniteError: a row has no direction; names it.
    """
    scaled = Scaled.of(phi, columns, where)
    features = torch.from_numpy(columns["features"])
    n = len(features)
    products = torch.zeros(n, basis.size, dtype=torch.float64)
    squares, rounded, missed = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
    out, spare = torch.empty(n * phi.width), torch.empty(n * phi.width if phi.weights is not None else 0)
    for j in range(phi.pieces):
        piece = phi.write_piece(j, features, scaled.factors, out, spare)
        if scaled.norms is None:
            squares += torch.linalg.vector_norm(piece, dim=1, dtype=torch.float64).square()
        integers, step = _to_8_bits(piece)
        rounded += (torch.linalg.vector_norm(integers.float(), dim=1).double() * step).square()
        missed += (torch.linalg.vector_norm(piece, dim=1).double() * step).square()
        columns_of_piece = torch.from_numpy(basis.columns[piece_rows(phi, j)])
        products += integer_product(integers, columns_of_piece).double() * step[:, None]
    norms = squares.sqrt().numpy() if scaled.norms is None else scaled.norms
    phi.require_direction(norms, columns["row"], where)
    coordinates = basis.coordinates(products.numpy()) / norms[:, None]
    return _pack(coordinates, rounded.numpy() / norms**2, missed.numpy() / norms**2)


def _to_8_bits(piece: Tensor) -> tuple[Tensor, Tensor]:
    """Integers int8 [n, w] and steps float64 [n], the row being step · integers; `piece` becomes (rest) / step."""
    peak = torch.maximum(piece.amax(dim=1), piece.amin(dim=1).neg_())
    step = torch.where(peak > 0, peak / 127, torch.ones_like(peak))
    piece.div_(step[:, None])
    nearest = piece.round()
    piece.sub_(nearest)
    return nearest.to(torch.int8), step.double()


def _pack(coordinates: np.ndarray, rounded: np.ndarray, missed: np.ndarray) -> RowSketch:
    """From coordinates, ‖t'‖² and ‖δ‖², all of unit features; the squares may be 1e-4 of themselves too small."""
    stored = coordinates.astype(np.float16)
    kept = np.square(coordinates).sum(axis=1)
    rest = np.sqrt(np.maximum(rounded * (1 + _SLACK) - kept, 0) + _ROUNDED)
    # 1e-6 covers the float32 division by the step.
    error = np.sqrt(missed * (1 + _SLACK)) * 1.001 + np.linalg.norm(coordinates - stored, axis=1) + 1e-6
    return RowSketch(stored, _up(rest), _up(error))


def _up(values: np.ndarray) -> np.ndarray:
    """The next float32 above."""
    return np.nextafter(values.astype(np.float32), np.float32(np.inf))
