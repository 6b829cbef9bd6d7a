"""The similarity that decides: float64, from stored bytes alone, the same whoever asks and in whatever company.

Products of two float32 numbers are exact in float64, and are added up in an order fixed by the length of Φ, so bits
depend neither on block size, nor engine, nor threads, nor processor; a sum is off by some 1e-15 of the norms, at most
256 · 2^-53. Every search ends here, whichever way it found its candidates.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.search import native
from gradstore.search.phi import Phi, Scaled
from gradstore.search.query_batch import QueryGroup, runs, vector_norm
from gradstore.store import FeatureStore

# Running sums of an inner product; `dot` in src/kernels.h has as many.
_LANES = 16


class ExactScore:
    """Scores pairs of a query and a row of the training store; reads each row once.

    Args:
        train: the training store.
        groups: the queries.
        workers: threads; each holds 4·D bytes and some rows as stored; where nothing was compiled, 16·D more.

    Attributes:
        rows_read: rows read so far.
    """

    def __init__(self, train: FeatureStore, groups: Sequence[QueryGroup], workers: int = 1) -> None:
        self.train, self.groups, self.workers = train, groups, workers
        size = sum(len(group.members) for group in groups)
        self._group = np.empty(size, dtype=np.int64)
        self._place = np.empty(size, dtype=np.int64)
        for g, group in enumerate(groups):
            self._group[group.members] = g
            self._place[group.members] = np.arange(len(group.members))
        self.rows_read = 0
        self._rooms = threading.local()

    def __call__(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Similarities float64 [pairs] of queries [pairs], places in the batch, and rows [pairs]."""
        scores = np.empty(len(rows))
        order = np.lexsort((queries, rows))
        ordered = rows[order]
        found = np.unique(ordered)
        self.rows_read += len(found)
        spans = list(runs(found, most=self._rows_at_once()))

        def score(span: tuple[int, int]) -> None:
            low, high = np.searchsorted(ordered, span)
            self._score_run(span, queries, rows, order[low:high], scores)

        if len(spans) < 2 or self.workers < 2:
            for span in spans:
                score(span)
        else:
            with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(score, spans))
        return scores

    def _room(self) -> _Room:
        """This thread's own."""
        if not hasattr(self._rooms, "mine"):
            self._rooms.mine = _Room(self.train.schema.empty(self._rows_at_once()), {})
        mine: _Room = self._rooms.mine
        return mine

    def _rows_at_once(self) -> int:
        return int(np.clip((1 << 20) // self.train.schema.row_bytes, 1, 64))

    def _score_run(
        self, span: tuple[int, int], queries: np.ndarray, rows: np.ndarray, pairs: np.ndarray, scores: np.ndarray
    ) -> None:
        """Fill in the scores of the pairs, in ascending order of rows, whose rows lie in `span`."""
        room = self._room()
        columns = self.train.read(*span, out=room.columns)
        groups = self._group[queries[pairs]]
        for g in np.unique(groups).tolist():
            mine, group = pairs[groups == g], self.groups[g]
            scaled = Scaled.of(group.phi, columns, self.train.path)
            padded, vector = room.padded(group.phi)
            for part in np.split(mine, np.flatnonzero(np.diff(rows[mine])) + 1):
                row = int(rows[part[0]])
                factor = self._write_row(group.phi, columns, scaled, row - span[0], row, vector)
                places = self._place[queries[part]]
                scores[part] = inner_products(padded, group.pieces, places) * group.scale[places] * factor

    def _write_row(
        self, phi: Phi, columns: Mapping[str, np.ndarray], scaled: Scaled, i: int, row: int, out: Tensor
    ) -> float:
        """Write a row, and return what turns an inner product of scaled vectors into its part of a similarity."""
        phi.write_row(torch.from_numpy(columns["features"][i]), scaled.factors[i], out)
        norm = vector_norm(out) if scaled.norms is None else float(scaled.norms[i])
        phi.require_direction(np.array([norm]), np.array([row]), self.train.path)
        return 1 / norm if phi.kernel.normalised else float(np.ldexp(1.0, scaled.exponent[i]))


@dataclass(frozen=True)
class _Room:
    """What a thread reuses for row after row: new memory for each would take longer to map than to fill.

    Attributes:
        columns: rows as stored.
        vectors: for each feature map, what `Phi.padded` gives.
    """

    columns: dict[str, np.ndarray]
    vectors: dict[Phi, tuple[Tensor, Tensor]]

    def padded(self, phi: Phi) -> tuple[Tensor, Tensor]:
        """Room for one vector in pieces, and its view by class; the padding stays zero."""
        if phi not in self.vectors:
            self.vectors[phi] = phi.padded()
        return self.vectors[phi]


def inner_products(row: Tensor, pieces: Tensor, places: np.ndarray, simd: str | None = None) -> np.ndarray:
    """Inner products of a row and some queries in float64, added up in one fixed order.

    A piece has 16 running sums, number l of the products l, l + 16, …; the upper half of them is added to the lower
    until one is left; and pieces are added one after another.

    Args:
        row: float32 [pieces, width], contiguous.
        pieces: float32 [pieces, g, width], contiguous.
        places: int64 [q], which of the g queries.
        simd: a level of the compiled loops, or "" for numpy, which holds 16·D bytes; default the fastest there is.

    Returns:
        float64 [q]; the same bits at every level.
    """
    simd = native.level() if simd is None else simd
    if simd:
        return native.dot(row, pieces, places, simd)
    return np.array([_by_numpy(row, pieces[:, place]) for place in places.tolist()])


def _by_numpy(row: Tensor, query: Tensor) -> float:
    padding = -row.shape[1] % _LANES
    products = np.pad((row.double() * query.double()).numpy(), ((0, 0), (0, padding)))
    lanes = np.add.accumulate(products.reshape(len(row), -1, _LANES), axis=1)[:, -1]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return float(np.add.accumulate(lanes[:, 0])[-1])
