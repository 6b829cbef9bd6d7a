"""Queries as a search holds them: float32 pieces of Φ, grouped by feature map, with their norms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.kernels.feature_map import FeatureMap, not_finite
from gradstore.machine.threads import Workers
from gradstore.search.request import Request
from gradstore.store.rows import Rows

# Rows read together where wanted rows follow one another.
_RUN = 16
_ROOM = 8 << 20  # bytes of rows that suffice for that


@dataclass(frozen=True)
class QueryGroup:
    """Queries that share one feature map.

    Attributes:
        phi: the feature map.
        members: int64 [g], places of the queries in their batch.
        pieces: float32 [pieces, g, width], Φ · 2^-exponent, a shorter last piece padded with zeros.
        norms: float64 [g], ‖Φ‖ / 2^exponent.
        exponent: int [g].
    """

    phi: FeatureMap
    members: np.ndarray
    pieces: Tensor
    norms: np.ndarray
    exponent: np.ndarray

    def vectors(self) -> Tensor:
        """Φ · 2^-exponent float32 [g, D], a copy."""
        phi, count = self.phi, len(self.members)
        return self.pieces.transpose(0, 1).reshape(count, phi.segments, -1)[..., : phi.K].reshape(count, phi.length)

    def segment(self, index: int) -> Tensor:
        """Stretch `index` of K of every query, float32 [g, K]; a copy where it is more than one piece."""
        each = len(self.pieces) // self.phi.segments
        part = self.pieces[index * each : (index + 1) * each]
        return part.transpose(0, 1).reshape(len(self.members), -1)[:, : self.phi.K].contiguous()

    @property
    def scale(self) -> np.ndarray:
        """float64 [g], what turns an inner product of scaled vectors into the query's part of a similarity."""
        return self.phi.unscaled(self.norms, self.exponent)


def load_queries(request: Request, part: slice = slice(None), workers: int = 1, room: int = _ROOM) -> list[QueryGroup]:
    """Read queries of a request.

    Args:
        request: says where they are.
        part: which of them.
        workers: threads that read; each holds 4·D bytes, and rows as stored.
        room: bytes of these rows that each of them holds; or one row.

    Returns:
        One group for each distinct feature map. Holds 4·D bytes a query.

    Raises:
        NonFiniteError: a query has no direction; names the row.
    """
    groups, rows, phis = [], request.rows[part], request.phis[part]
    for phi in dict.fromkeys(phis):
        members = np.array([i for i, other in enumerate(phis) if other == phi], dtype=np.int64)
        groups.append(_load_group(request.queries, rows[members], members, phi, workers, room))
    return groups


def _load_group(
    store: Rows, rows: np.ndarray, members: np.ndarray, phi: FeatureMap, workers: int, room: int
) -> QueryGroup:
    pieces = torch.zeros(phi.pieces, len(rows), phi.width)
    norms, exponents = np.empty(len(rows)), np.empty(len(rows), dtype=np.int64)

    def load(span: tuple[int, int]) -> None:
        columns, (padded, vector) = store.read(*span), phi.padded()
        scaled = phi.scaled(torch.from_numpy(columns["features"]), columns, store.where)
        for i, row in enumerate(range(*span)):
            norm = scaled.row(i, vector)
            phi.require_direction(np.array([norm]), np.array([row]), store.where)
            if not torch.isfinite(vector.sum(dtype=torch.float64)):
                raise not_finite(row, store.where)
            for place in np.flatnonzero(rows == row):
                pieces[:, place] = padded
                norms[place], exponents[place] = norm, scaled.exponent[i]

    spans = list(runs(np.unique(rows), int(np.clip(room // store.schema.row_bytes, 1, _RUN))))
    if len(spans) < 2 or workers < 2:
        for span in spans:
            load(span)
    else:
        with Workers(workers) as pool:
            pool.map(load, spans)
    return QueryGroup(phi, members, pieces, norms, exponents)


def runs(rows: np.ndarray, most: int = _RUN) -> Iterator[tuple[int, int]]:
    """Half-open runs of consecutive numbers in ascending distinct `rows`, each of at most `most`."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for part in np.split(rows, breaks):
        for i in range(0, len(part), most):
            chunk = part[i : i + most]
            yield int(chunk[0]), int(chunk[-1]) + 1
