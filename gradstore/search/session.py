"""A session: an index held open, for one query after another in a notebook."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gradstore.errors import UsageError
from gradstore.indices import Choice
from gradstore.kernels.definitions import projected_kernel
from gradstore.machine.byte_counts import format_bytes, parse_bytes
from gradstore.machine.threads import one_torch_thread
from gradstore.search.index.certified import SCATTERED, IndexSearch
from gradstore.search.index.faiss_index import open_faiss
from gradstore.search.index.store_index import open_index
from gradstore.search.phi import Phi
from gradstore.search.query_batch import QueryGroup, load_queries
from gradstore.search.request import check_request
from gradstore.search.scan import scan_all
from gradstore.search.topk_result import Search, TopK
from gradstore.store.feature_store import FeatureStore
from gradstore.store.rows import Rows

# Rows that approximate search re-ranks: at least this many, and this many for each neighbour.
_CANDIDATES = 100
_PER_NEIGHBOUR = 10
_MEASURED_K = 10
_MEASURED_QUERIES = 64
_MAX_BATCH = 64


class Session:
    """Top-k through the index of a training store, kept in memory.

    Args:
        train: the training store.
        kernel: "proj-trntk", "proj-pntk" or "proj-trntk0".
        memory: bytes held beside the index while searching, or building it.
        size: directions of the index; see `open_index`.
        faiss: a FAISS factory string: approximate search then takes its candidates from that index, e.g. "Flat",
            "IVF256,Flat", "HNSW32" on the sketch, "RaBitQ" on the full features.
        on: "sketch" or "full", what the FAISS index holds.
        rebuild: build the index even if there is a good one.
        progress: called with (rows done, rows) while building.

    Raises:
        Those of `open_index`.

    Example:
        >>> session = gs.Session(train)
        >>> session.topk(test, 5, rows=[3]).indices.shape
        (1, 5)
    """

    def __init__(
        self,
        train: FeatureStore,
        kernel: str = "proj-trntk",
        *,
        memory: int | str = "1GB",
        size: int | None = None,
        faiss: str | None = None,
        on: str = "sketch",
        rebuild: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.train, self.kernel = train, projected_kernel(kernel)
        self.memory = parse_bytes(memory)
        self.index = open_index(train, kernel, size=size, rebuild=rebuild, memory=memory, progress=progress)
        self._search = IndexSearch(self.index)
        self.faiss = open_faiss(self.index, faiss, on, rebuild=rebuild) if faiss is not None else None

    def topk(
        self,
        queries: Rows,
        k: int = 5,
        *,
        rows: Choice | None = None,
        mode: str = "certified",
        candidates: int | None = None,
    ) -> TopK:
        """The k most similar training rows of each query.

        Args:
            queries: store of another split, or any `Rows`, with the same fingerprint.
            k: neighbours a query.
            rows: rows of the query store, as indices in any order or a bool mask; default all.
            mode: "certified" finds what a scan of all rows finds, to the last bit; "approx" re-ranks `candidates` rows.
            candidates: rows that "approx" re-ranks; default 10·k, at least 100.

        Raises:
            UsageError, MismatchError, CorruptError, NonFiniteError: as `topk`.
        """
        if mode not in ("certified", "approx"):
            raise UsageError("unknown mode", where="--mode", expected="certified or approx", got=repr(mode))
        wanted = check_request(self.train, queries, k, self.kernel, rows, by_class=False)
        if candidates is not None and not k <= candidates:
            raise UsageError("too few candidates", where="--candidates", expected=f"at least k = {k}", got=candidates)
        if mode == "certified":
            return self._certified(queries, wanted, k)
        count = self._count(k, candidates)
        return self._approximate(queries, wanted, k, count, self.recall(count))

    def card(self) -> dict[str, str]:
        """What the index is, for people."""
        index = self.index
        card = {
            "index": str(index.path),
            "state": index.event,
            "sketch": f"{index.basis.size} dimensions, {len(index.sketch)} rows",
            "size": f"{format_bytes(index.nbytes)}, {100 * index.nbytes / self.train.nbytes:.2f} % of the store",
            "left out": f"{float(np.median(index.sketch.rest)):.3f} of a feature's norm, median",
        }
        if self.faiss is not None:
            card["faiss"] = f"{self.faiss.name}, {self.faiss.event}"
        return card

    def recall(self, candidates: int | None = None, queries: int = _MEASURED_QUERIES) -> float:
        """Recall@10 of approximate search over rows that the basis was not fitted to, measured once and kept.

        Costs a scan of the store the first time.

        Args:
            candidates: rows re-ranked.
            queries: rows of the training store to ask for, each without itself.
        """
        count = self._count(_MEASURED_K, candidates)
        key = str(count) if self.faiss is None else f"{count} {self.faiss.name}"
        known = self.index.recall.get(key)
        if known is not None:
            return known
        held = self._held_out(queries)
        k = min(_MEASURED_K + 1, len(self.train))
        truth = scan_all(self.train, self.train, held, [self._phi] * len(held), k, self.memory)[0]
        found = self._approximate_rows(self.train, held, k, count)[0]
        hits = [np.isin(_others(a, row), _others(b, row)).mean() for a, b, row in zip(truth, found, held, strict=True)]
        value = float(np.mean(hits)) if k > 1 else 1.0
        self.index = self.index.with_recall({key: value})
        return value

    def _certified(self, queries: Rows, wanted: np.ndarray, k: int) -> TopK:
        if len(wanted) > _MAX_BATCH and SCATTERED * len(wanted) * k > len(self.train):
            return self._scanned(queries, wanted, k)
        rows, similarity = np.empty((len(wanted), k), np.int64), np.empty((len(wanted), k))
        left, read = [], 0
        for start, part in self._batches(wanted):
            with one_torch_thread():
                found = self._search.certified(self._load(queries, part), k)
            stop = start + len(part)
            rows[start:stop], similarity[start:stop] = found.best.rows, found.best.similarity
            read += found.rows_read
            left += (start + np.flatnonzero(found.unfinished)).tolist()
        note = ""
        if left:
            phis = [self._phi] * len(left)
            rows[left], similarity[left], scan = scan_all(self.train, queries, wanted[left], phis, k, self.memory)
            read += scan.rows_read
            note = f"the index proves too little for {len(left)} of {len(wanted)} queries; a scan answered these"
        return self._result(queries, wanted, rows, similarity, Search("certified", read, self._name, 1.0, note))

    def _scanned(self, queries: Rows, wanted: np.ndarray, k: int) -> TopK:
        """The same by a scan, where scattered reads of the answers alone would take longer."""
        phis = [self._phi] * len(wanted)
        rows, similarity, scan = scan_all(self.train, queries, wanted, phis, k, self.memory)
        note = f"a scan is faster than {len(wanted)} queries through the index, and answered them"
        return self._result(
            queries, wanted, rows, similarity, Search("certified", scan.rows_read, scan.engine, 1.0, note)
        )

    def _approximate(self, queries: Rows, wanted: np.ndarray, k: int, count: int, recall: float) -> TopK:
        rows, similarity, read = self._approximate_rows(queries, wanted, k, count)
        return self._result(
            queries,
            wanted,
            rows,
            similarity,
            Search("approx", read, self.faiss.name if self.faiss else self._name, recall),
        )

    def _approximate_rows(
        self, queries: Rows, wanted: np.ndarray, k: int, count: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        found = []
        for _, part in self._batches(wanted):
            with one_torch_thread():
                group = self._load(queries, part)
                found.append(self._search.rerank(group, k, self._propose(group, k, count)))
        rows = [best.rows for best, _ in found] or [np.empty((0, k), np.int64)]
        similarity = [best.similarity for best, _ in found] or [np.empty((0, k))]
        return np.concatenate(rows), np.concatenate(similarity), sum(read for _, read in found)

    def _propose(self, group: QueryGroup, k: int, count: int) -> list[np.ndarray]:
        """Candidates of each query; where FAISS finds fewer than k, those of the sketch besides."""
        if self.faiss is None:
            return self._search.propose(group, count)
        proposed = self.faiss.propose(group, count)
        if min(map(len, proposed)) >= k:
            return proposed
        return [np.union1d(a, b) for a, b in zip(proposed, self._search.propose(group, k), strict=True)]

    def _load(self, queries: Rows, rows: np.ndarray) -> QueryGroup:
        return load_queries(queries, rows, [self._phi] * len(rows), self._search.workers)[0]

    def _batches(self, wanted: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(first place, query rows): as many at a time as their bounds on every training row fit the memory."""
        need = 40 * len(self.train) + 4 * self._phi.length
        if need > self.memory:
            raise UsageError(
                "too little memory",
                where="--memory",
                expected=f"at least {format_bytes(need)}",
                got=format_bytes(self.memory),
            )
        size = min(_MAX_BATCH, self.memory // need)
        return [(i, wanted[i : i + size]) for i in range(0, len(wanted), size)]

    def _held_out(self, count: int) -> np.ndarray:
        """Rows that the basis was not fitted to, while there are enough of them."""
        free = np.setdiff1d(np.arange(len(self.train)), self.index.fitted_rows())
        pool = free if len(free) >= min(count, len(self.train) // 10) else np.arange(len(self.train))
        return np.sort(np.random.default_rng(1).choice(pool, min(count, len(pool)), replace=False))

    def _result(
        self, queries: Rows, wanted: np.ndarray, rows: np.ndarray, similarity: np.ndarray, search: Search
    ) -> TopK:
        return TopK(rows, similarity, wanted, self.kernel.name, self.train, queries, search)

    def _count(self, k: int, candidates: int | None) -> int:
        return min(candidates or max(_CANDIDATES, _PER_NEIGHBOUR * k), len(self.train))

    @property
    def _phi(self) -> Phi:
        return self.index.phi

    @property
    def _name(self) -> str:
        return f"sketch of {self.index.basis.size} dimensions"


def _others(rows: np.ndarray, row: int) -> np.ndarray:
    """Neighbours of a row of the same store, without the row itself."""
    return rows[rows != row][:_MEASURED_K]
