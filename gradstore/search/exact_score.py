"""The similarity that decides: float64, from stored bytes alone, the same whoever asks and in whatever company.

Products of two float32 numbers are exact in float64, and their pairwise sum is off by some 1e-15 of the norms, so bits
depend neither on block size, nor engine, nor threads. Every search ends here, whichever way it found its candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from gradstore.search.phi import Phi, Scaled
from gradstore.search.query_batch import QueryGroup, runs, vector_norm
from gradstore.store import FeatureStore


class ExactScore:
    """Scores pairs of a query and a row of the training store; reads each row once.

    Args:
        train: the training store.
        groups: the queries.
        workers: threads; each holds 28·D bytes and some rows as stored.

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

    def __call__(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Similarities float64 [pairs] of queries [pairs], places in the batch, and rows [pairs]."""
        scores = np.empty(len(rows))
        order = np.lexsort((queries, rows))
        found = np.unique(rows)
        self.rows_read += len(found)
        spans = list(runs(found, most=self._rows_at_once()))

        def score(span: tuple[int, int]) -> None:
            low, high = np.searchsorted(rows[order], span)
            self._score_run(span, queries, rows, order[low:high], scores)

        if len(spans) < 2 or self.workers < 2:
            for span in spans:
                score(span)
        else:
            with ThreadPoolExecutor(self.workers) as pool:
                list(pool.map(score, spans))
        return scores

    def _rows_at_once(self) -> int:
        return int(np.clip((1 << 20) // self.train.schema.row_bytes, 1, 64))

    def _score_run(
        self, span: tuple[int, int], queries: np.ndarray, rows: np.ndarray, pairs: np.ndarray, scores: np.ndarray
    ) -> None:
        """Fill in the scores of the pairs whose rows lie in `span`."""
        columns = self.train.read(*span)
        for phi in {self.groups[g].phi for g in np.unique(self._group[queries[pairs]])}:
            scaled = Scaled.of(phi, columns, self.train.path)
            row_vector, query_vector = np.empty(phi.length), np.empty(phi.length)
            mine = pairs[[self.groups[g].phi == phi for g in self._group[queries[pairs]]]]
            for row in np.unique(rows[mine]):
                i = int(row) - span[0]
                phi.write_row(torch.from_numpy(columns["features"][i]), scaled.factors[i], row_vector)
                factor = self._row_factor(phi, scaled, i, int(row), row_vector)
                for pair in mine[rows[mine] == row]:
                    group, place = self.groups[self._group[queries[pair]]], self._place[queries[pair]]
                    group.write_vector(place, query_vector)
                    np.multiply(query_vector, row_vector, out=query_vector)
                    scores[pair] = np.add.reduce(query_vector) * group.scale[place] * factor

    def _row_factor(self, phi: Phi, scaled: Scaled, i: int, row: int, vector: np.ndarray) -> float:
        """What turns an inner product of scaled vectors into the row's part of a similarity."""
        norm = vector_norm(vector) if scaled.norms is None else float(scaled.norms[i])
        phi.require_direction(np.array([norm]), np.array([row]), self.train.path)
        return 1 / norm if phi.kernel.normalised else float(np.ldexp(1.0, scaled.exponent[i]))
