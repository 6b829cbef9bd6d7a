"""A sketch of every row, and what it proves about a similarity.

A row's unit feature t is rounded to 8 bits, t = t' + δ, and t' is split by the basis: t' = Q y + t'_⊥. Then for a unit
query q with coordinates y_q and rest q_⊥, by Cauchy and Schwarz,

    |⟨q, t⟩ − ⟨y_q, y⟩| ≤ ‖q_⊥‖ ‖t'_⊥‖ + ‖δ‖.

Kept for a row: y in float16, ‖t'_⊥‖, and ‖δ‖ plus what float16 took from y. Both numbers are rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.arithmetic.int8_digits import Rounded, round_stretches
from gradstore.kernels.feature_map import FeatureMap
from gradstore.search.index.basis import Basis
from gradstore.search.query_batch import QueryGroup
from gradstore.search.streamed import Streamed
from gradstore.store.rows import Rows

# Covers float64 roundings of squares.
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
        rest, error = (torch.from_numpy(np.asarray(part, np.float64)) for part in (rows.rest, rows.error))
        spread = torch.outer(torch.from_numpy(self.rest), rest).add_(error + _ROUNDED)
        # ‖y‖ ≤ ‖t‖ + ‖δ‖ + the rounding of y.
        return estimate, spread.add_(torch.outer(self.error + length * roundings, 1.001 + error))


def sketch_queries(basis: Basis, group: QueryGroup) -> QuerySketch:
    """Coordinates of some queries and what they leave out."""
    coordinates, error = basis.query_coordinates(group)
    length = np.maximum(np.linalg.norm(coordinates, axis=1) - error, 0)
    return QuerySketch(coordinates, np.sqrt(np.maximum(1 - length**2, 0) + _ROUNDED), error)


class SketchBlock:
    """What a worker reuses to sketch block after block of rows.

    Args:
        store: holds the rows.
        phi: the feature map.
        basis: directions.
        block: rows of a block.

    Holds D + 40·r bytes a row, and four megabytes of rows as stored.
    """

    def __init__(self, store: Rows, phi: FeatureMap, basis: Basis, block: int) -> None:
        self.store, self.phi, self.basis = store, phi, basis
        self._streamed = Streamed(store, block, max(1, block // 2))
        self._digits = torch.empty(phi.segments * block * phi.K, dtype=torch.int8)

    def sketch(self, start: int, stop: int) -> RowSketch:
        """The sketch of rows start:stop.

        Returns:
            Of each row its coordinates and what they leave out.

        Raises:
            NonFiniteError: a row has no direction; names it.
        """
        phi, count = self.phi, stop - start
        digits = self._digits[: phi.segments * count * phi.K].view(phi.segments, count, phi.K)
        found, norms, rows = np.empty((phi.segments, count, 4)), np.empty(count), np.empty(count, np.int64)
        for at, features, columns in self._streamed.pieces(start, stop):
            scaled = phi.scaled(features, columns, self.store.where)
            values, factors = scaled.vectors()
            round_stretches(values, factors, digits[:, at], None, found[:, at])
            norms[at], rows[at] = scaled.norms(values), columns["row"]
        rounded = Rounded.of(found, phi.K, two=False)
        finite = np.isfinite(rounded.step).all(axis=0)
        phi.require_direction(np.where(finite, norms, np.nan), rows, self.store.where)
        coordinates = self.basis.coordinates(self.basis.products(digits, rounded.step)) / norms[:, None]
        return _pack(coordinates, *(np.square(part / norms).sum(axis=0) for part in (rounded.norm, rounded.missed)))


def _pack(coordinates: np.ndarray, kept: np.ndarray, missed: np.ndarray) -> RowSketch:
    """From coordinates, and bounds on ‖t'‖² and ‖δ‖², all of unit features."""
    stored = coordinates.astype(np.float16)
    rest = np.sqrt(np.maximum(kept - np.square(coordinates).sum(axis=1), 0) + _ROUNDED)
    error = np.sqrt(missed) + np.linalg.norm(coordinates - stored, axis=1) + _ROUNDED
    return RowSketch(stored, _up(rest), _up(error))


def _up(values: np.ndarray) -> np.ndarray:
    """The next float32 above."""
    return np.nextafter(values.astype(np.float32), np.float32(np.inf))
