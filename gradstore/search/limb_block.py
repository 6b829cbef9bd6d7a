"""Bounds on similarities from products of bfloat16 limbs, which the processor's matrix unit multiplies.

A row t and a query q are cut into one limb or two each, t = t' + δ_t. What one limb leaves is measured, some 0.0017 of
the norm; two leave at most 2^-17, and nothing of a float16. Sums of N roundings in float32 (`rounding_bound`) and, of
two limbs a side, the products of two lower ones, left out, make up the rest:

    |computed − ⟨q, t⟩| ≤ ‖q‖ ‖δ_t‖ + ‖δ_q‖ ‖t'‖ + (γ + 2^-16) ‖q'‖ ‖t'‖,   γ = N u / (1 − N u), u = 2^-24,

by Cauchy and Schwarz; `limb_error` is that in units of ‖q‖ ‖t‖. One limb a side, 0.0034, costs a third of two, 0.00004,
and lets more rows through to exact scoring; so one is taken until too many get through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from gradstore.matrix_unit.product import LIMB, REST_ERROR, Packed, add_product, pack, rounding_bound
from gradstore.search.float_block import bounds_within
from gradstore.search.integer_block import span_rows
from gradstore.search.phi import Scaled
from gradstore.search.query_batch import QueryGroup
from gradstore.store import FeatureStore

# Covers rows' factors, which are applied to products here and to entries where scores are exact, and what vanishes from
# products and squares below 2^-126: the norms of scaled vectors are around 1.
_EXTRA = 2.0**-20


@dataclass(frozen=True)
class PackedQueries:
    """A group of queries, ready to be multiplied by rows as stored or, where these must be written first, by pieces.

    Attributes:
        group: the queries.
        as_stored: whether rows are multiplied as they are stored, a class at a time.
        high: the first limbs of each class, or of each piece.
        rest: float64 [g], what the limbs leave of each query at most, in units of its norm.
        low: the second limbs; empty where one is taken.
    """

    group: QueryGroup
    as_stored: bool
    high: tuple[Packed, ...]
    rest: np.ndarray
    low: tuple[Packed, ...] = ()

    @classmethod
    def of(cls, group: QueryGroup, dtype: str) -> PackedQueries:
        """With one limb: holds 2 bytes a value, queries rounded up to 32, and 4·K more a query while packing.

        Args:
            group: the queries.
            dtype: of the training store's features.
        """
        stored, high = dtype == "float16" and group.phi.weights is None, []
        squares = np.zeros(len(group.members))
        for part in _parts(group, stored):
            high.append(pack(part, 1))
            squares += torch.linalg.vector_norm(_lower(part), dim=1, dtype=torch.float64).square_().numpy()
        return cls(group, stored, tuple(high), _relative(squares, group.norms))

    def refined(self) -> PackedQueries:
        """With two limbs: holds as much again."""
        lower = tuple(pack(_lower(part), 1) for part in _parts(self.group, self.as_stored))
        return replace(self, low=lower, rest=np.full(len(self.rest), LIMB**2 / 2))

    def add_product(self, index: int, rows: Tensor, factors: Tensor | None, out: Tensor, squares: Tensor) -> None:
        """Add the products of part `index` with rows [B, w] times float32 [B] to `out` [B, g].

        What first limbs leave of the rows, squared, is added to float64 `squares` [B], where no second ones are taken.
        """
        if not self.low:
            add_product(rows, self.high[index], out, left_factors=factors, limbs=(1, 1), left_rests=squares)
            return
        add_product(rows, self.high[index], out, left_factors=factors, limbs=(2, 1))
        add_product(rows, self.low[index], out, left_factors=factors, limbs=(1, 1))

    def error(self, row_rest: np.ndarray) -> Tensor:
        """What similarities are off at most, in units of ‖q‖ ‖t‖, float64 [g, B].

        Args:
            row_rest: float64 [B], what first limbs leave of the rows, in units of their norms.
        """
        if self.low:
            row_rest = np.full(len(row_rest), 0 if self.as_stored else LIMB**2 / 2)
        added = rounding_bound(self.high[0].width, len(self.high) + len(self.low)) + (LIMB**2 if self.low else 0)
        return limb_error(torch.from_numpy(self.rest), torch.from_numpy(row_rest), added)


class PackedBatch:
    """The queries of a scan, in one limb until `refine` is called.

    Args:
        groups: the queries.
        dtype: of the training store's features.
    """

    def __init__(self, groups: Sequence[QueryGroup], dtype: str) -> None:
        self.parts = tuple(PackedQueries.of(group, dtype) for group in groups)
        self._lock = Lock()

    def refine(self) -> None:
        """Take two limbs from the next block on."""
        with self._lock:
            if any(not part.low for part in self.parts):
                self.parts = tuple(part.refined() for part in self.parts)


class LimbBlock:
    """What a worker reuses to bound block after block of rows.

    Args:
        train: the training store.
        queries: shared by all workers.
        block: rows of a block.

    Holds the block as stored, 32 bytes a row and query, and where features are not float16 or classes are summed, two
    pieces of the block in float32.
    """

    def __init__(self, train: FeatureStore, queries: PackedBatch, block: int) -> None:
        self.train, self.queries, self._span = train, queries, span_rows(train, block)
        self._columns = train.schema.empty(block)
        written = [part.group.phi for part in queries.parts if not part.as_stored]
        size = block * max((phi.width for phi in written), default=0)
        self._piece = torch.empty(size)
        self._spare = torch.empty(size if any(phi.weights is not None for phi in written) else 0)

    def bounds(self, start: int, stop: int) -> list[tuple[QueryGroup, Tensor, Tensor]]:
        """As `IntegerBlock.bounds`."""
        columns = self._read(start, stop)
        features = torch.from_numpy(columns["features"])
        found = []
        for part in self.queries.parts:
            phi = part.group.phi
            scaled = Scaled.of(phi, columns, self.train.path)
            out = torch.zeros(len(features), len(part.group.members))
            add = _add_stored if part.as_stored else self._add
            norms, rest = add(part, features, scaled, out)
            phi.require_direction(norms, columns["row"], self.train.path)
            error = part.error(_relative(rest, norms))
            found.append((part.group, *bounds_within(part.group, out.T.double(), norms, scaled.exponent, error)))
        return found

    def _read(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start:stop, some at a time, so that they stay in the cache between reading and checking."""
        for low in range(start, stop, self._span):
            part = {name: column[low - start :] for name, column in self._columns.items()}
            self.train.read(low, min(low + self._span, stop), out=part)
        return {name: column[: stop - start] for name, column in self._columns.items()}

    def _add(
        self, queries: PackedQueries, features: Tensor, scaled: Scaled, out: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add inner products of scaled vectors to `out` [B, g], a piece at a time.

        Returns:
            The rows' norms float64 [B], and squares of what first limbs leave of them.
        """
        phi = queries.group.phi
        squares, rest = torch.zeros(2, len(features), dtype=torch.float64)
        for j in range(phi.pieces):
            piece = phi.write_piece(j, features, scaled.factors, self._piece, self._spare)
            queries.add_product(j, piece, None, out, rest)
            if scaled.norms is None:
                squares += torch.linalg.vector_norm(piece, dim=1, dtype=torch.float64).square_()
        return squares.sqrt_().numpy() if scaled.norms is None else scaled.norms, rest.numpy()


def _add_stored(queries: PackedQueries, features: Tensor, scaled: Scaled, out: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """As `LimbBlock._add`, of features [B, c, K] as they are: their factors are applied to products."""
    assert scaled.norms is not None, "known where classes stand side by side"
    factors = scaled.factors.T.contiguous()
    rest = torch.zeros(len(features), dtype=torch.float64)
    for s in range(queries.group.phi.segments):
        squares = torch.zeros(len(features), dtype=torch.float64)
        queries.add_product(s, features[:, s], factors[s], out, squares)
        rest += squares * factors[s].double().square()
    return scaled.norms, rest.numpy()


def limb_error(query_rest: Tensor, row_rest: Tensor, added: float) -> Tensor:
    """What inner products are off at most, in units of ‖q‖ ‖t‖, float64 [g, B].

    Args:
        query_rest: float64 [g], ‖δ_q‖ / ‖q‖.
        row_rest: float64 [B], ‖δ_t‖ / ‖t‖.
        added: what sums are off, and products that are left out, in units of ‖q'‖ ‖t'‖.
    """
    query_side = query_rest + added * (1 + query_rest)
    return torch.outer(query_side, 1 + row_rest).add_(row_rest + _EXTRA)


def _relative(squares: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Measured rests in units of norms, rounded up; 0 for a vector that is zero."""
    rests = np.sqrt(squares) * (1 + REST_ERROR)
    return np.divide(rests, norms, out=np.zeros_like(rests), where=norms > 0)


def _lower(values: Tensor) -> Tensor:
    """What the first limb leaves."""
    return values - values.bfloat16().float()


def _parts(group: QueryGroup, as_stored: bool) -> Iterator[Tensor]:
    """The queries' values float32 [g, w] of each class, or of each piece."""
    if as_stored:
        return (group.segment(s) for s in range(group.phi.segments))
    spans = (group.phi.span(j) for j in range(group.phi.pieces))
    return (piece[:, : at.stop - at.start] for piece, at in zip(group.pieces, spans, strict=True))
