"""A session: an index held open, for one query after another in a notebook."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gradstore.errors import UsageError
from gradstore.indices import RowChoice
from gradstore.kernels.definitions import projected_kernel
from gradstore.machine.byte_counts import format_bytes, parse_bytes
from gradstore.search.index.approximate import ApproximateSearch
from gradstore.search.index.certified import CertifiedSearch
from gradstore.search.index.faiss_index import open_faiss
from gradstore.search.index.indexed_rows import IndexedRows
from gradstore.search.index.store_index import SketchIndex, open_index
from gradstore.search.request import Request
from gradstore.search.topk_result import TopK
from gradstore.store.feature_store import FeatureStore
from gradstore.store.rows import Rows


class Session:
    """Top-k through the index of a training store, kept in memory.

    Args:
        train: the training store.
        kernel: a name in `gradstore.kernels.definitions.PROJECTED`.
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
        self.train, self.kernel, self.memory = train, projected_kernel(kernel), parse_bytes(memory)
        index = open_index(train, kernel, size=size, rebuild=rebuild, memory=memory, progress=progress)
        self.faiss = open_faiss(index, faiss, on, rebuild=rebuild) if faiss is not None else None
        self._rows = IndexedRows(index, self.memory)

    @property
    def index(self) -> SketchIndex:
        """The index, with what was measured since."""
        return self._rows.index

    def topk(
        self,
        queries: Rows,
        k: int = 5,
        *,
        rows: RowChoice | None = None,
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

        Returns:
            The neighbours, indices int64 [m, k] and similarity float64 [m, k].

        Raises:
            UsageError: an unknown mode, or fewer candidates than k.
            Others: as `topk`.
        """
        if mode not in ("certified", "approx"):
            raise UsageError("unknown mode", where="--mode", expected="certified or approx", got=repr(mode))
        request = Request.checked(self.train, queries, k, self.kernel, rows)
        if candidates is not None and not k <= candidates:
            raise UsageError("too few candidates", where="--candidates", expected=f"at least k = {k}", got=candidates)
        return TopK.of(request, self.searcher(mode, candidates).search(request))

    def searcher(self, mode: str, candidates: int | None = None) -> CertifiedSearch | ApproximateSearch:
        """What answers requests in mode "certified" or "approx"."""
        return CertifiedSearch(self._rows) if mode == "certified" else self._approximate(candidates)

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

    def recall(self, candidates: int | None = None, queries: int = 64) -> float:
        """Recall@10 of approximate search over rows that the basis was not fitted to, measured once and kept.

        Costs a scan of the store the first time.

        Args:
            candidates: rows re-ranked.
            queries: rows of the training store to ask for, each without itself.

        Returns:
            Between 0 and 1.
        """
        return self._approximate(candidates).recall(queries)

    def _approximate(self, candidates: int | None) -> ApproximateSearch:
        return ApproximateSearch(self._rows, self.faiss, candidates)
