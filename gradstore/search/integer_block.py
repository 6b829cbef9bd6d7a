"""Bounds on similarities from products of 8-bit integers: as tight as those of float32, and several times faster.

Rows and queries are rounded to two digits of 8 bits, with a step for each row and stretch of K (a class). Three integer
products, high · high, low · high and high · low, are exact; what they leave out is bounded one stretch s at a time,
by the norms of what rounding really took away:

    |error| ≤ Σ_s ‖q_s‖ ‖δ_t,s‖ + ‖δ_q,s‖ ‖t'_s‖ + ‖q_low,s‖ ‖t_low,s‖,

some 0.00015 of the norms for normal entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.search.phi import Phi, Scaled
from gradstore.search.query_batch import QueryGroup
from gradstore.search.rounded_phi import round_phi
from gradstore.search.rounding import Rounded, add_integer_product, round_rows
from gradstore.store import FeatureStore

_UNIT = 2.0**-24
# Rows read and rounded at a time: they should stay in the cache between reading, checking and rounding.
_SPAN_BYTES = 2 << 20
# Covers float64 roundings of bounds, and of norms that were summed in float64.
_ROUNDED = 1e-9


@dataclass(frozen=True)
class RoundedQueries:
    """A group of queries, rounded.

    Attributes:
        group: the queries.
        digits: int8 [segments, 2, g, K].
        steps: float32 [segments, g].
        sides: float64 [g, 3 · segments]; times the rows' sides, a bound on the error of an inner product.
    """

    group: QueryGroup
    digits: Tensor
    steps: Tensor
    sides: Tensor

    @classmethod
    def of(cls, group: QueryGroup) -> RoundedQueries:
        """Holds 2·D bytes a query, and 4·K more while rounding."""
        phi, count = group.phi, len(group.members)
        digits = torch.empty(phi.segments, 2, count, phi.K, dtype=torch.int8)
        parts = [round_rows(group.segment(s), torch.ones(count), *digits[s]) for s in range(phi.segments)]
        norm, low, missed = (_stacked(parts, name).T for name in ("norm", "low", "missed"))
        sums = (phi.segments + 16) * _UNIT  # float32 sums of scaled products
        return cls(
            group, digits, _stacked(parts, "step").float(), torch.cat([norm + missed, missed + sums * norm, low], 1)
        )


def _stacked(parts: Sequence[Rounded], name: str) -> Tensor:
    """float64 [segments, n]."""
    return torch.from_numpy(np.stack([getattr(part, name) for part in parts]))


class IntegerBlock:
    """What a worker reuses to bound block after block of rows.

    Args:
        train: the training store.
        queries: groups of queries.
        block: rows of a block.

    Holds 2·D bytes a row for each feature map, two megabytes of rows as stored, and 32 bytes a row and query.
    """

    def __init__(self, train: FeatureStore, queries: Sequence[RoundedQueries], block: int) -> None:
        self.train, self.queries = train, queries
        self._span = span_rows(train, block)
        self._columns = train.schema.empty(self._span)
        maps = {part.group.phi for part in queries}
        self._digits = {phi: torch.empty(2 * phi.segments * block * phi.K, dtype=torch.int8) for phi in maps}

    def bounds(self, start: int, stop: int) -> list[tuple[QueryGroup, Tensor, Tensor]]:
        """(queries, similarities float64 [g, B], their largest errors float64 [g, B]) of rows start:stop.

        The similarities of a row that is not finite are not finite either.

        Raises:
            NonFiniteError: a row's norm is not finite, or zero under a cosine.
            CorruptError: a row does not match its digest.
        """
        count = stop - start
        views = {
            phi: room[: 2 * phi.segments * count * phi.K].view(2, phi.segments, count, phi.K)
            for phi, room in self._digits.items()
        }
        found: dict[Phi, list[_Rows]] = {phi: [] for phi in views}
        for low in range(start, stop, self._span):
            high = min(low + self._span, stop)
            columns = self.train.read(low, high, out=self._columns)
            for phi, view in views.items():
                scaled = Scaled.of(phi, columns, self.train.path)
                here = view[:, :, low - start : high - start]
                features = torch.from_numpy(columns["features"])
                parts, norms = round_phi(phi, features, scaled, here[0], here[1])
                phi.require_direction(norms, columns["row"], self.train.path)
                found[phi].append(_Rows.of(parts, norms, scaled.exponent))
        joined = {phi: _Rows.joined(parts) for phi, parts in found.items()}
        return [(part.group, *_bounds(part, views[part.group.phi], joined[part.group.phi])) for part in self.queries]


def span_rows(train: FeatureStore, block: int) -> int:
    """Rows of a block that are read and rounded at a time."""
    return int(np.clip(_SPAN_BYTES // train.schema.row_bytes, 1, max(1, block // 2)))


@dataclass(frozen=True)
class _Rows:
    """What is known of B rounded rows: steps float32 [segments, B], sides float64 [B, 3 · segments], and scales."""

    steps: Tensor
    sides: Tensor
    norms: np.ndarray
    exponent: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[Rounded], norms: np.ndarray, exponent: np.ndarray) -> _Rows:
        sides = torch.cat([_stacked(parts, name) for name in ("missed", "norm", "low")]).T
        return cls(_stacked(parts, "step").float(), sides, norms, exponent)

    @classmethod
    def joined(cls, parts: Sequence[_Rows]) -> _Rows:
        return cls(
            torch.cat([part.steps for part in parts], dim=1),
            torch.cat([part.sides for part in parts]),
            np.concatenate([part.norms for part in parts]),
            np.concatenate([part.exponent for part in parts]),
        )


def _bounds(queries: RoundedQueries, digits: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    group, phi = queries.group, queries.group.phi
    total = torch.zeros(len(group.members), digits.shape[2])
    for s in range(phi.segments):
        add_integer_product(
            queries.digits[s], queries.steps[s], digits[0, s], digits[1, s], rows.steps[s].contiguous(), total
        )
    row_scale = 1 / rows.norms if phi.kernel.normalised else np.ldexp(1.0, rows.exponent)
    query_side, row_side = torch.from_numpy(group.scale)[:, None], torch.from_numpy(row_scale)
    spread = (queries.sides @ rows.sides.T).mul_(query_side).mul_(row_side * (1 + _ROUNDED))
    center = total.double().mul_(query_side).mul_(row_side)
    return center, spread.add_(center.abs(), alpha=_ROUNDED)
