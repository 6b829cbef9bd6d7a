"""The k best rows of each query under a total order: similarity descending, then row ascending.

A search offers rows with a lower and an upper bound on their similarity. Rows whose upper bound is below the k-th
largest lower bound cannot be among the k best and are dropped; any number of ties at that boundary stay until the exact
score settles them. So the outcome depends on stored bytes alone, however rows were cut and bounds computed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Best:
    """Running candidates of m queries.

    Args:
        m: queries.
        k: rows wanted for each.
        score: exact similarities of (query, row) pairs.

    Attributes:
        crowded: whether so many rows stayed in question that some had to be settled early: bounds should be closer.

    Holds 40·m·k bytes and at most `limit` pending candidates of 24 bytes; beyond that they are settled at once.
    """

    def __init__(self, m: int, k: int, score: Score) -> None:
        self.k, self._score = k, score
        self.limit = pending_limit(m, k)
        self.crowded = False
        self._lower = torch.full((m, k), -torch.inf, dtype=torch.float64)
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._count = 0
        self.rows = np.full((m, k), -1, dtype=np.int64)
        self.similarity = np.full((m, k), -np.inf)

    @property
    def thresholds(self) -> Tensor:
        """float64 [m]: k rows are known to be at least this similar; -inf before that."""
        return self._lower[:, -1]

    def offer(self, members: np.ndarray, rows: np.ndarray, center: Tensor, spread: Tensor) -> None:
        """Take in some rows for some queries.

        Args:
            members: int64 [g], places of the queries.
            rows: int64 [B], distinct, and offered to each query only once.
            center: float64 [g, B], similarities.
            spread: float64 [g, B], how wrong each can be at most.
        """
        places = torch.from_numpy(members)
        upper, lower = center + spread, center - spread
        raised = torch.nonzero((lower > self._lower[places, -1:]).any(dim=1))[:, 0]
        if len(raised):
            top = torch.topk(lower[raised], min(self.k, lower.shape[1])).values
            merged = torch.cat([self._lower[places[raised]], top], dim=1)
            self._lower[places[raised]] = torch.topk(merged, self.k).values
        keep = torch.nonzero(upper >= self._lower[places, -1:])
        q, r = keep[:, 0], keep[:, 1]
        self._pending.append((members[q.numpy()], rows[r.numpy()], upper[q, r].numpy()))
        self._count += len(q)
        if self._count > self.limit:
            self._drop_beaten()
            if self._count > self.limit // 2:
                self._score_promising()
            if self._count > self.limit // 2:
                self.settle()
                self.crowded = True

    def settle(self) -> None:
        """Score pending candidates exactly until the k best of each query are known."""
        self._drop_beaten()
        if self._count:
            self._score_promising()
        if self._count:
            queries, rows, _ = self._pending[0]
            self.take(queries, rows, self._score(queries, rows))
        self._pending, self._count = [], 0

    def take(self, queries: np.ndarray, rows: np.ndarray, scores: np.ndarray) -> None:
        """Take in exact similarities float64 [pairs] of queries [pairs] and rows [pairs], each pair once."""
        self._merge(queries, rows, scores)
        self._lower = torch.maximum(self._lower, torch.from_numpy(self.similarity))

    def _score_promising(self) -> None:
        """Score those k of each query exactly that have the highest bounds: often they beat most of the others."""
        queries, rows, upper = self._pending[0]
        order = np.lexsort((-upper, queries))
        rank = np.arange(len(order)) - np.searchsorted(queries[order], queries[order])
        some, others = order[rank < self.k], order[rank >= self.k]
        self.take(queries[some], rows[some], self._score(queries[some], rows[some]))
        self._pending = [(queries[others], rows[others], upper[others])]
        self._drop_beaten()

    def _drop_beaten(self) -> None:
        if not self._pending:
            return
        queries, rows, upper = (np.concatenate(part) for part in zip(*self._pending, strict=True))
        keep = upper >= self.thresholds.numpy()[queries]
        self._pending = [(queries[keep], rows[keep], upper[keep])]
        self._count = int(keep.sum())

    def _merge(self, queries: np.ndarray, rows: np.ndarray, scores: np.ndarray) -> None:
        m = len(self.rows)
        all_queries = np.concatenate([np.repeat(np.arange(m), self.k), queries])
        all_rows = np.concatenate([self.rows.ravel(), rows])
        all_scores = np.concatenate([self.similarity.ravel(), scores])
        order = np.lexsort((all_rows, -all_scores, all_queries))
        first = np.searchsorted(all_queries[order], np.arange(m))
        chosen = order[first[:, None] + np.arange(self.k)]
        self.rows, self.similarity = all_rows[chosen], all_scores[chosen]


def pending_limit(m: int, k: int) -> int:
    """Candidates that may await their exact score."""
    return max(4 * m * k, 1 << 15)
