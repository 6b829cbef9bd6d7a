"""Bounds on similarities from products in float32, on the CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradstore.arithmetic.float32 import error_bound, sample_product
from gradstore.arithmetic.names import CUDA, FLOAT32
from gradstore.errors import UsageError
from gradstore.kernels.feature_map import FeatureMap, Scaled
from gradstore.search.bounds.bounds import BlockBounds, Bounds, Found, Needs, bounds_within, most_rows
from gradstore.search.query_batch import QueryGroup
from gradstore.store.rows import Rows

# A block is large enough for a good matrix product and no larger.
_BLOCK_BYTES = 24 << 20


class Float32Bounds(Bounds):
    """Bounds by BLAS. Holds the queries as they are, and a copy of them where the device is another."""

    choice = FLOAT32
    sample_product = staticmethod(sample_product)

    @classmethod
    def bytes_for(cls, train: Rows, phis: Sequence[FeatureMap]) -> Needs:
        """See `Bounds`: a block as stored, and two pieces of it in float32."""
        query, width = (max(getattr(phi, name) for phi in phis) for name in ("pieces", "width"))
        row, making = train.schema.row_bytes, max(phi.making for phi in phis)
        sizes = range(most_rows(train, _BLOCK_BYTES, row), 0, -1)
        return Needs(4 * query * width, 0, 0, [(size, size * (row + 8 * width + making)) for size in sizes])

    def __init__(self, train: Rows, groups: Sequence[QueryGroup], workers: int = 1) -> None:
        self.train, self.groups = train, groups
        self.pieces = [group.pieces.to(self.device) for group in groups]

    def block(self, rows: int) -> BlockBounds:
        """See `Bounds`."""
        return _FloatBlock(self, rows)


class CudaBounds(Float32Bounds):
    """The same by a GPU."""

    choice = CUDA
    device = torch.device("cuda")

    @classmethod
    def refusal(cls, K: int) -> UsageError | None:
        """See `Bounds`."""
        if torch.cuda.is_available():
            return None
        return UsageError(
            "this machine has no usable CUDA device", where="--engine", got="'cuda'", hint="Use --engine auto"
        )


class _FloatBlock(BlockBounds):
    """Holds a block as stored, a piece of it in float32, two where classes are summed, and 32 bytes a row and query."""

    def __init__(self, queries: Float32Bounds, rows: int) -> None:
        self._queries, self._device = queries, queries.device
        width = max(group.phi.width for group in queries.groups)
        summed = any(group.phi.sums for group in queries.groups)
        self._columns = queries.train.schema.empty(rows)
        self._piece = torch.empty(rows * width, device=self._device)
        self._spare = torch.empty(rows * width if summed else 0, device=self._device)

    def bounds(self, start: int, stop: int, thresholds: Tensor) -> Found:
        """See `BlockBounds`."""
        train = self._queries.train
        columns = train.read(start, stop, out=self._columns)
        features = torch.from_numpy(columns["features"]).to(self._device)
        found = []
        for group, pieces in zip(self._queries.groups, self._queries.pieces, strict=True):
            scaled = group.phi.scaled(features, columns, train.where)
            center, norms = self._product(pieces, scaled)
            group.phi.require_direction(norms, columns["row"], train.where)
            error = error_bound(group.phi.width, group.phi.pieces)
            found.append((group, *bounds_within(group, center, norms, scaled.exponent, error)))
        return found

    def _product(self, pieces: Tensor, scaled: Scaled) -> tuple[Tensor, np.ndarray]:
        """Inner products float64 [g, B] of scaled vectors, and the norms of the rows' float64 [B]."""
        count = len(scaled.features)
        out = torch.zeros(pieces.shape[1], count, device=self._device)
        squares = torch.zeros(count, dtype=torch.float64, device=self._device)
        for j in range(scaled.phi.pieces):
            piece = scaled.piece(j, self._piece, self._spare)
            out.addmm_(pieces[j, :, : piece.shape[1]], piece.T)
            if scaled.known is None:
                squares += torch.linalg.vector_norm(piece, dim=1, dtype=torch.float64).square_()
        norms = squares.sqrt_().cpu().numpy() if scaled.known is None else scaled.known
        return out.double().cpu(), norms
