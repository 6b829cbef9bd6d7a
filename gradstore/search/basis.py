"""A few directions that hold most of what unit features Φ/‖Φ‖ have in common: PCA of a sample, kept in 8 bits a number.

Any matrix B of full column rank gives an orthonormal basis Q = B L^-T with B^T B = L L^T, so rounding the principal
directions to 8 bits costs a little of the captured energy and nothing in rigour: what is proved later holds for the
span of the rounded B. Products of 8-bit numbers are exact integers, so B^T B is exact, and B^T t for a row t rounded to
8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from scipy.linalg import eigh, solve_triangular
from torch import Tensor

from gradstore.search.engines import fastest_call, single_threaded
from gradstore.search.phi import Phi, Scaled
from gradstore.search.query_batch import QueryGroup, read_rows
from gradstore.store import FeatureStore

_UNIT = 2.0**-24
# Integers up to 127 multiply and add up exactly in float32 over this many terms: 1024 · 127² < 2^24.
_EXACT = 1024
# Columns that a query's product adds up in float32 before it goes on in float64.
_SHORT = 256


@dataclass(frozen=True)
class Basis:
    """Directions as 8-bit columns, and what turns products with them into orthonormal coordinates.

    Attributes:
        columns: int8 [D, r].
        factor: L float64 [r, r], lower triangular, with B^T B = L L^T.
    """

    columns: np.ndarray
    factor: np.ndarray

    @property
    def size(self) -> int:
        """r, the number of directions."""
        return int(self.columns.shape[1])

    @classmethod
    def of(cls, columns: np.ndarray) -> Basis:
        """With the factor of B^T B, whose entries are exact integers."""
        gram = np.zeros((columns.shape[1],) * 2)
        for start in range(0, len(columns), _EXACT):
            part = columns[start : start + _EXACT].astype(np.float32)
            gram += np.matmul(part.T, part)
        return cls(columns, np.linalg.cholesky(gram))

    @cached_property
    def _spread(self) -> float:
        """‖L^-1 diag ‖B_j‖‖, which is 1 where the columns are orthogonal."""
        norms = np.linalg.norm(self.factor, axis=1)
        return float(np.linalg.norm(solve_triangular(self.factor, np.diag(norms), lower=True), 2))

    def coordinates(self, products: np.ndarray) -> np.ndarray:
        """Q^T t float64 [n, r] from B^T t float64 [n, r]; its rounding error is some 1e-13 of ‖t‖."""
        return solve_triangular(self.factor, products.T, lower=True).T

    def query_coordinates(self, group: QueryGroup) -> tuple[np.ndarray, float]:
        """Coordinates of unit queries, and how wrong they can be.

        Returns:
            (float64 [g, r], ε): the Euclidean error of each row is at most ε. From |δ(B^T q)_j| ≤ γ ‖B_j‖ with
            γ = N u / (1 − N u) for sums of N terms follows ε = γ sqrt(r) ‖L^-1 diag ‖B_j‖‖.
        """
        phi, size = group.phi, self.size
        products = torch.zeros(len(group.members), size, dtype=torch.float64)
        with single_threaded():  # hundreds of products too small to share out
            for j in range(phi.pieces):
                part = torch.from_numpy(self.columns[piece_rows(phi, j)]).float()
                for low in range(0, len(part), _SHORT):
                    short = part[low : low + _SHORT]
                    products += (group.pieces[j, :, low : low + len(short)] @ short).double()
        coordinates = self.coordinates(products.numpy()) / group.norms[:, None]
        roundings = (_SHORT + 16) * _UNIT
        return coordinates, 1.01 * roundings / (1 - roundings) * np.sqrt(size) * self._spread


def piece_rows(phi: Phi, j: int) -> slice:
    """Entries of Φ that piece j covers."""
    span = phi.span(j)
    start = 0 if phi.weights is not None else j // (phi.pieces // phi.c) * phi.K
    return slice(start + span.start, start + span.stop)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """Exact product of a [n, w] and b [w, r], both int8 within ±127, in int32 or a float type, whichever is faster."""
    if integer_products_pay():
        return torch._int_mm(a, b)
    parts = [a[:, i : i + _EXACT].float() @ b[i : i + _EXACT].float() for i in range(0, a.shape[1], _EXACT)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).double().sum(dim=0)


@lru_cache(maxsize=1)
def integer_products_pay() -> bool:
    """Whether this torch multiplies int8 faster than float32; measured once on one thread, in some milliseconds."""
    a, b = torch.ones(128, _EXACT, dtype=torch.int8), torch.ones(_EXACT, 128, dtype=torch.int8)
    try:
        torch._int_mm(a, b)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    with single_threaded():
        return fastest_call({"int8": lambda: torch._int_mm(a, b), "float32": lambda: a.float() @ b.float()}) == "int8"


def fit_basis(store: FeatureStore, phi: Phi, rows: np.ndarray, size: int) -> Basis:
    """Principal directions of some rows, from the Gram matrix of their unit features.

    Args:
        store: holds them.
        phi: the feature map.
        rows: int64 [s], distinct, ascending, of which `size` directions are taken.
        size: r; fewer where the sample does not span as many.

    Holds the sample as stored, s² float64 and 2·D·r bytes of directions in float16.
    """
    columns = store.schema.empty(len(rows))
    for i, (_, row) in enumerate(read_rows(store, rows)):
        for name, array in row.items():
            columns[name][i] = array[0]
    scaled = Scaled.of(phi, columns, store.path)
    sample = _Sample(phi, torch.from_numpy(columns["features"]), scaled.factors)
    gram = sample.gram()
    norms = np.sqrt(np.diag(gram))
    phi.require_direction(norms, rows, store.path)
    gram /= np.outer(norms, norms)
    size = min(size, len(rows))
    values, vectors = eigh(gram, subset_by_index=[len(rows) - size, len(rows) - 1])
    keep = values > 1e-6 * values[-1]
    weights = vectors[:, keep][:, ::-1] / np.sqrt(values[keep][::-1]) / norms[:, None]
    return Basis.of(_round_to_8_bits(sample.combine(weights.astype(np.float32))))


@dataclass(frozen=True)
class _Sample:
    """Sampled rows as stored, decoded a piece at a time."""

    phi: Phi
    features: Tensor
    factors: Tensor

    def piece(self, j: int) -> np.ndarray:
        count = len(self.features) * self.phi.width
        return self.phi.write_piece(j, self.features, self.factors, torch.empty(count), torch.empty(count)).numpy()

    def gram(self) -> np.ndarray:
        """Inner products float64 [s, s] of the scaled rows."""
        total = np.zeros((len(self.features), len(self.features)))
        for j in range(self.phi.pieces):
            part = self.piece(j)
            total += np.matmul(part, part.T)
        return total

    def combine(self, weights: np.ndarray) -> np.ndarray:
        """Φ^T times weights [s, r], times sqrt(D): float16 [D, r] of entries around 1."""
        out = np.empty((self.phi.length, weights.shape[1]), np.float16)
        for j in range(self.phi.pieces):
            product = np.matmul(self.piece(j).T, weights * np.float32(np.sqrt(self.phi.length)))
            out[piece_rows(self.phi, j)] = np.clip(product, -6e4, 6e4)
        return out


def _round_to_8_bits(directions: np.ndarray) -> np.ndarray:
    """int8 [D, r], each column scaled to its largest entry; the scales cancel in the orthonormal coordinates."""
    peak = np.maximum(np.abs(directions).max(axis=0).astype(np.float32), np.float32(1e-6))
    out = np.empty(directions.shape, np.int8)
    for start in range(0, len(directions), 4096):
        part = directions[start : start + 4096].astype(np.float32)
        out[start : start + 4096] = np.rint(part * (127 / peak))
    return out
