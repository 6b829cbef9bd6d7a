"""Search through an index: a few rows are read instead of all, and in certified mode that is proved to be enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gradstore.search.best import Best
from gradstore.search.exact_score import ExactScore
from gradstore.search.index.sketch import sketch_queries
from gradstore.search.index.store_index import SketchIndex
from gradstore.search.query_batch import QueryGroup
from gradstore.store.feature_store import FeatureStore

_ROWS = 8192
SCATTERED = 6
"""Reading a scattered row takes about as long as scanning this many."""


@dataclass(frozen=True)
class Certified:
    """What a certified search found.

    Attributes:
        best: the k best of each query that was finished.
        rows_read: rows read.
        unfinished: bool [m], queries whose bound leaves so many rows that a scan is cheaper.
    """

    best: Best
    rows_read: int
    unfinished: np.ndarray


class IndexSearch:
    """Searches one store through its index.

    Args:
        index: of the training store; its arrays stay in memory.
        workers: threads that read and score rows.
    """

    def __init__(self, index: SketchIndex, workers: int | None = None) -> None:
        self.index = index
        self.workers = workers or min(torch.get_num_threads(), 16)
        self._norms: np.ndarray | None = None

    @property
    def store(self) -> FeatureStore:
        """The training store."""
        return self.index.store

    def certified(self, group: QueryGroup, k: int) -> Certified:
        """The k best rows of each query, exact by proof.

        First the k most promising rows are read. Every other row whose upper bound reaches the k-th similarity so far
        is read too, the highest bounds first, until no bound does.
        """
        m = len(group.members)
        upper, promising = self._upper_bounds(group, k)
        score = ExactScore(self.store, [group], self.workers)
        best = Best(m, k, score)
        self._read(best, score, promising)
        for q in range(m):
            upper[q, promising[q]] = -np.inf
        waiting = upper >= best.thresholds.numpy()[:, None]
        unfinished = waiting.sum(axis=1) * SCATTERED > len(self.store)
        if np.count_nonzero(waiting[~unfinished].any(axis=0)) * SCATTERED > len(self.store):
            unfinished = waiting.any(axis=1)
        active = np.flatnonzero(waiting.any(axis=1) & ~unfinished)
        step = max(16, k)
        while len(active):
            chosen: list[np.ndarray] = [np.empty(0, np.int64)] * m
            for q in active.tolist():
                top = _largest(upper[q], step)
                chosen[q] = top[upper[q, top] >= best.thresholds[q].item()]
                upper[q, chosen[q]] = -np.inf
            self._read(best, score, chosen)
            active = active[upper[active].max(axis=1) >= best.thresholds.numpy()[active]]
            step *= 2
        return Certified(best, score.rows_read, unfinished)

    def propose(self, group: QueryGroup, count: int) -> list[np.ndarray]:
        """The `count` rows that the sketch finds most similar to each query."""
        return self._upper_bounds(group, count)[1]

    def rerank(self, group: QueryGroup, k: int, candidates: Sequence[np.ndarray]) -> tuple[Best, int]:
        """The k best of some rows for each query, at least k of them, and how many rows were read."""
        score = ExactScore(self.store, [group], self.workers)
        best = Best(len(group.members), k, score)
        self._read(best, score, candidates)
        return best, score.rows_read

    def _read(self, best: Best, score: ExactScore, rows: Sequence[np.ndarray]) -> None:
        """Score some rows of each query exactly."""
        queries = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
        flat = np.concatenate(rows)
        best.take(queries, flat, score(queries, flat))

    def _upper_bounds(self, group: QueryGroup, count: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Upper bounds float64 [m, n] on the similarities, and the `count` rows that look best for each query."""
        queries, n = sketch_queries(self.index.basis, group), len(self.store)
        query_scale, row_scale = self._scales(group)
        upper = np.empty((len(group.members), n))
        estimates = np.empty((len(group.members), n), np.float32)
        for start in range(0, n, _ROWS):
            stop = min(start + _ROWS, n)
            estimate, spread = queries.bounds(self.index.sketch.rows(start, stop))
            scale = np.ones(1) if row_scale is None else row_scale[start:stop]
            estimates[:, start:stop] = estimate.numpy() * scale
            upper[:, start:stop] = (estimate + spread).numpy() * scale * query_scale[:, None]
        return upper, [_largest(row, count) for row in estimates]

    def _scales(self, group: QueryGroup) -> tuple[np.ndarray, np.ndarray | None]:
        """What turns a cosine into a similarity: norms where the kernel is no cosine."""
        if group.phi.kernel.normalised:
            return np.ones(len(group.members)), None
        if self._norms is None:
            self._norms = np.linalg.norm(self.store.norms, axis=1)
        return np.ldexp(group.norms, group.exponent), self._norms


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest values, int64."""
    if count >= len(values):
        return np.arange(len(values))
    return np.argpartition(-values, count - 1)[:count]
