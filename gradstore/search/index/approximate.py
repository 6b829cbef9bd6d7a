"""Mode "approx": candidates of the index or of FAISS are scored exactly; how many are missed is measured."""

from __future__ import annotations

import numpy as np

from gradstore.machine.threads import one_torch_thread
from gradstore.search.index.faiss_index import FaissIndex
from gradstore.search.index.indexed_rows import IndexedRows, Scored
from gradstore.search.query_batch import QueryGroup
from gradstore.search.request import Request
from gradstore.search.scan import ExactSearch
from gradstore.search.topk_result import Answer, Gathered, Search

# Rows that are scored: at least this many, and this many for each neighbour.
_CANDIDATES = 100
_PER_NEIGHBOUR = 10
_MEASURED_K = 10


class ApproximateSearch:
    """The best of some candidates.

    Args:
        rows: of the training store, through its index.
        faiss: where candidates come from; None for the sketch.
        candidates: how many a query; default 10·k, at least 100.
    """

    def __init__(self, rows: IndexedRows, faiss: FaissIndex | None = None, candidates: int | None = None) -> None:
        self._rows, self._faiss, self._candidates = rows, faiss, candidates

    def search(self, request: Request) -> Answer:
        """The k best candidates of every query.

        Args:
            request: what is searched for.

        Returns:
            Rows and similarities, and which recall was measured.
        """
        recall = self._recall(self._count(request.k))
        return self._reranked(request, self._count(request.k), recall)

    def recall(self, queries: int = 64) -> float:
        """Recall@10 over rows that the basis was not fitted to, measured once and kept; a scan the first time.

        Args:
            queries: rows of the training store to ask for, each without itself.

        Returns:
            Between 0 and 1.
        """
        return self._recall(self._count(_MEASURED_K), queries)

    def _recall(self, count: int, queries: int = 64) -> float:
        index, train = self._rows.index, self._rows.index.store
        key = str(count) if self._faiss is None else f"{count} {self._faiss.name}"
        if key in index.recall:
            return index.recall[key]
        if len(train) == 1:
            return 1.0
        held = self._held_out(queries)
        k = min(_MEASURED_K + 1, len(train))
        request = Request(train, train, held, (index.phi,) * len(held), index.phi.kernel, k, train)
        scan = ExactSearch(self._rows.memory // 2)  # since the C library keeps some of it while candidates are scored
        truth, found = scan.search(request), self._reranked(request, count, 1.0)
        pairs = zip(truth.indices, found.indices, held, strict=True)
        hits = [np.isin(_others(a, row), _others(b, row)).mean() for a, b, row in pairs]
        value = float(np.mean(hits))
        self._rows.index = index.with_recall({key: value})
        return value

    def _reranked(self, request: Request, count: int, recall: float) -> Answer:
        found, read = Gathered(len(request.rows), request.k), 0
        with one_torch_thread():
            for _, group in self._rows.batches(request):
                scored = Scored(self._rows, group, request.k, self._propose(group, request.k, count))
                found.add((scored.best.rows, scored.best.similarity))
                read += scored.rows_read
                del group, scored  # before the next are read
        name = self._faiss.name if self._faiss else self._rows.name
        return found.answer(Search("approx", read, name, recall))

    def _propose(self, group: QueryGroup, k: int, count: int) -> list[np.ndarray]:
        """Candidates of each query; where FAISS finds fewer than k, those of the sketch besides."""
        if self._faiss is None:
            return self._rows.upper_bounds(group, count)[1]
        proposed = self._faiss.propose(group, count)
        if min(map(len, proposed)) >= k:
            return proposed
        return [np.union1d(a, b) for a, b in zip(proposed, self._rows.upper_bounds(group, k)[1], strict=True)]

    def _held_out(self, count: int) -> np.ndarray:
        """Rows that the basis was not fitted to, while there are enough of them."""
        n = len(self._rows.index.store)
        free = np.setdiff1d(np.arange(n), self._rows.index.fitted_rows())
        pool = free if len(free) >= max(1, min(count, n // 10)) else np.arange(n)
        return np.sort(np.random.default_rng(1).choice(pool, min(count, len(pool)), replace=False))

    def _count(self, k: int) -> int:
        return min(self._candidates or max(_CANDIDATES, _PER_NEIGHBOUR * k), len(self._rows.index.store))


def _others(rows: np.ndarray, row: int) -> np.ndarray:
    """Neighbours of a row of the same store, without the row itself."""
    return rows[rows != row][:_MEASURED_K]
