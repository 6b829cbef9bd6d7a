"""Mode "certified": a few rows are read instead of all, and it is proved that these are enough."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gradstore.machine.threads import one_torch_thread
from gradstore.search.index.indexed_rows import MOST_QUERIES, IndexedRows, Scored, largest
from gradstore.search.query_batch import QueryGroup
from gradstore.search.request import Request
from gradstore.search.scan import ExactSearch
from gradstore.search.topk_result import Answer, Gathered, Search

# Reading a scattered row takes about as long as scanning this many.
_SCATTERED = 6


class CertifiedSearch:
    """What a scan of all rows finds, to the last bit.

    Queries of which the index proves too little are left to a scan; and all are, if they are so many that scattered
    reads of the answers alone would take longer.

    Args:
        rows: of the training store, through its index.
    """

    def __init__(self, rows: IndexedRows) -> None:
        self._rows, self._scan = rows, ExactSearch(rows.memory)

    def search(self, request: Request) -> Answer:
        """The k best rows of every query.

        Args:
            request: what is searched for.

        Returns:
            Rows and similarities, and how many rows were read.
        """
        m, k, n = len(request.rows), request.k, len(request.train)
        if m > MOST_QUERIES and _SCATTERED * m * k > n:
            note = f"a scan is faster than {m} queries through the index, and answered them"
            scanned = self._scan.search(request)
            return replace(scanned, search=replace(scanned.search, mode="certified", note=note))
        found, left, read = Gathered(m, k), [], 0
        with one_torch_thread():
            for start, group in self._rows.batches(request):
                scored, unfinished = self._read(group, k)
                found.add((scored.best.rows, scored.best.similarity))
                left += (start + np.flatnonzero(unfinished)).tolist()
                read += scored.rows_read
                del group, scored  # before the next are read
        answer = found.answer(Search("certified", read, self._rows.name))
        return self._finished(answer, request, left) if left else answer

    def _finished(self, answer: Answer, request: Request, left: list[int]) -> Answer:
        """With the answers of a scan to some queries."""
        scanned, m = self._scan.search(request.part(left)), len(request.rows)
        answer.indices[left], answer.similarity[left] = scanned.indices, scanned.similarity
        note = f"the index proves too little for {len(left)} of {m} queries; a scan answered these"
        read = answer.search.rows_read + scanned.search.rows_read
        return replace(answer, search=replace(answer.search, rows_read=read, note=note))

    def _read(self, group: QueryGroup, k: int) -> tuple[Scored, np.ndarray]:
        """The k best rows of each query, or so many in question that a scan is cheaper.

        First the k most promising rows are read. Every other row whose upper bound reaches the k-th similarity so far
        is read too, the highest bounds first, until no bound does.

        Returns:
            (what was read, bool [m]: which queries are left to a scan).
        """
        m, n = len(group.members), len(self._rows.index.store)
        upper, promising = self._rows.upper_bounds(group, k)
        scored = Scored(self._rows, group, k, promising)
        best = scored.best
        for q in range(m):
            upper[q, promising[q]] = -np.inf
        waiting = upper >= best.thresholds.numpy()[:, None]
        unfinished = waiting.sum(axis=1) * _SCATTERED > n
        if np.count_nonzero(waiting[~unfinished].any(axis=0)) * _SCATTERED > n:
            unfinished = waiting.any(axis=1)
        active = np.flatnonzero(waiting.any(axis=1) & ~unfinished)
        step = max(16, k)
        while len(active):
            chosen: list[np.ndarray] = [np.empty(0, np.int64)] * m
            for q in active.tolist():
                top = largest(upper[q], step)
                chosen[q] = top[upper[q, top] >= best.thresholds[q].item()]
                upper[q, chosen[q]] = -np.inf
            scored.add(chosen)
            active = active[upper[active].max(axis=1) >= best.thresholds.numpy()[active]]
            step *= 2
        return scored, unfinished
