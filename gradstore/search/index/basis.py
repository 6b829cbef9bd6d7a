"""A few directions that hold most of what unit features Φ/‖Φ‖ have in common: PCA of a sample, kept in 8 bits a number.

Any matrix B of full column rank gives an orthonormal basis Q = B L^-T with B^T B = L L^T, so rounding the principal
directions, and the sample, to 8 bits costs a little of the captured energy and nothing in rigour: what is proved later
holds for the span of the rounded B. Products of 8-bit numbers are exact integers, so B^T B is exact but for float64
roundings, and B^T t for a row t rounded to 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh, solve_triangular
from scipy.linalg.lapack import dpotrf
from torch import Tensor

from gradstore.arithmetic.int8 import integer_product
from gradstore.arithmetic.int8_digits import Rounded, round_rows, round_stretches
from gradstore.kernels.feature_map import FeatureMap
from gradstore.machine.threads import Workers, single_threaded, worker_count
from gradstore.search.query_batch import QueryGroup
from gradstore.search.streamed import piece_rows
from gradstore.store.rows import Rows

# Covers float64 roundings of coordinates.
_ROUNDED = 1e-9
# Share of a direction's square that must lie outside those before it: 8 bits leave about this much at random.
_INDEPENDENT = 1e-4


@dataclass(frozen=True)
class Basis:
    """Directions as 8-bit rows, and what turns products with them into orthonormal coordinates.

    Attributes:
        directions: int8 [segments, r, K].
        scales: float64 [segments, r]; column j of B is directions[:, j] times scales[:, j].
        factor: L float64 [r, r], lower triangular, with B^T B = L L^T.
    """

    directions: np.ndarray
    scales: np.ndarray
    factor: np.ndarray

    @property
    def size(self) -> int:
        """r, the number of directions."""
        return int(self.directions.shape[1])

    @classmethod
    def of(cls, directions: np.ndarray, scales: np.ndarray) -> Basis:
        """With the factor of B^T B; cut where rounding has left a direction within the span of those before it."""
        gram = np.zeros((directions.shape[1],) * 2)
        for part, scale in zip(directions, scales, strict=True):
            rows = torch.from_numpy(part)
            gram += integer_product(rows, rows.T).double().numpy() * np.outer(scale, scale)
        factor, failed = dpotrf(gram, lower=1)
        kept = failed - 1 if failed > 0 else len(gram)
        independent = np.diag(factor)[:kept] ** 2 > _INDEPENDENT * np.diag(gram)[:kept]
        kept = max(1, kept if independent.all() else int(independent.argmin()))
        return cls(directions[:, :kept].copy(), scales[:, :kept].copy(), np.tril(factor[:kept, :kept]))

    def products(self, digits: Tensor, steps: np.ndarray) -> np.ndarray:
        """B^T t float64 [n, r] of rows t = steps · digits, from int8 [segments, n, K] and float64 [segments, n]."""
        total = torch.zeros(digits.shape[1], self.size, dtype=torch.float64)
        for s, scale in enumerate(self.scales):
            product = integer_product(digits[s], torch.from_numpy(self.directions[s]).T).double()
            total.addcmul_(product.mul_(torch.from_numpy(scale)), torch.from_numpy(steps[s])[:, None])
        return total.numpy()

    def coordinates(self, products: np.ndarray) -> np.ndarray:
        """Q^T t float64 [n, r] from B^T t float64 [n, r]; its rounding error is some 1e-13 of ‖t‖."""
        return solve_triangular(self.factor, products.T, lower=True).T

    def query_coordinates(self, group: QueryGroup) -> tuple[np.ndarray, float]:
        """Coordinates of unit queries, and how wrong they can be.

        Returns:
            (float64 [g, r], ε): the Euclidean error of each row is at most ε, since ‖Q^T δ‖ ≤ ‖δ‖ for what rounding to
            two digits leaves out.
        """
        phi, count = group.phi, len(group.members)
        digits = torch.empty(phi.segments, 2 * count, phi.K, dtype=torch.int8)
        parts = [
            round_rows(group.segment(s), torch.ones(count), digits[s, :count], digits[s, count:])
            for s in range(phi.segments)
        ]
        products = self.products(digits, np.stack([np.append(part.step, part.step / 254) for part in parts]))
        coordinates = self.coordinates(products[:count] + products[count:]) / group.norms[:, None]
        missed = np.sqrt(sum(part.missed**2 for part in parts)) / group.norms
        return coordinates, float(missed.max(initial=0)) + _ROUNDED


def fit_basis(store: Rows, phi: FeatureMap, rows: np.ndarray, size: int) -> Basis:
    """Principal directions of some rows, from the Gram matrix of their unit features.

    Args:
        store: holds them.
        phi: the feature map.
        rows: int64 [s], distinct, ascending, of which `size` directions are taken.
        size: r; fewer where the sample does not span as many.

    Holds D bytes a row of the sample and for each direction, 20·s² and 8·r·K bytes, and some rows as stored.

    Returns:
        The directions.
    """
    sample = _Sample.of(store, phi, rows)
    gram = sample.gram()
    norms = np.sqrt(np.diag(gram))
    phi.require_direction(norms, rows, store.where)
    gram /= np.outer(norms, norms)
    size = min(size, len(rows))
    values, vectors = eigh(gram, subset_by_index=[len(rows) - size, len(rows) - 1], driver="evr", overwrite_a=True)
    keep = values > 1e-6 * values[-1]
    return sample.combine(vectors[:, keep][:, ::-1] / np.sqrt(values[keep][::-1]) / norms[:, None])


@dataclass(frozen=True)
class _Sample:
    """Sampled rows, rounded: digits int8 [segments, s, K] and steps float64 [segments, s]."""

    digits: Tensor
    steps: np.ndarray

    @classmethod
    def of(cls, store: Rows, phi: FeatureMap, rows: np.ndarray) -> _Sample:
        digits = torch.empty(phi.segments, len(rows), phi.K, dtype=torch.int8)
        found = np.empty((phi.segments, len(rows), 4))
        workers, piece = worker_count(), piece_rows(store.schema)

        def read(places: np.ndarray) -> None:
            room = store.schema.empty(min(piece, len(places)))
            for low in range(0, len(places), piece):
                at = slice(places[low], places[low : low + piece][-1] + 1)
                columns = store.gather(rows[at], room)
                scaled = phi.scaled(torch.from_numpy(columns["features"]), columns, store.where)
                round_stretches(*scaled.vectors(), digits[:, at], None, found[:, at])

        with Workers(workers) as pool:
            pool.map(read, np.array_split(np.arange(len(rows)), workers))
        return cls(digits, Rounded.of(found, phi.K, two=False).step)

    def gram(self) -> np.ndarray:
        """Inner products float64 [s, s] of the rounded rows."""
        total = np.zeros((self.digits.shape[1],) * 2)
        for digits, step in zip(self.digits, self.steps, strict=True):
            total += integer_product(digits, digits.T).double().numpy() * np.outer(step, step)
        return total

    def combine(self, weights: np.ndarray) -> Basis:
        """The basis whose columns are Φ^T times weights float64 [s, r], both rounded."""
        r, K = weights.shape[1], self.digits.shape[2]
        directions, scales = torch.empty(len(self.digits), r, K, dtype=torch.int8), np.empty((len(self.digits), r))

        def combine(s: int) -> None:
            mixed, found = _rounded(weights.T * self.steps[s])
            values = integer_product(mixed, self.digits[s]).float()
            scales[s] = round_rows(values, torch.ones(r), directions[s]).step * found.step

        with Workers() as pool, single_threaded():
            pool.map(combine, range(len(self.digits)))
        return Basis.of(directions.numpy(), scales)


def _rounded(values: np.ndarray) -> tuple[Tensor, Rounded]:
    """float64 [n, w] rounded to one digit."""
    digits = torch.empty(values.shape, dtype=torch.int8)
    return digits, round_rows(torch.from_numpy(values.astype(np.float32)), torch.ones(len(values)), digits)
