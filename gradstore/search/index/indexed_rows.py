"""What both modes of an index go by: bounds on every row by the sketch, and the exact scores of some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from gradstore.errors import UsageError
from gradstore.machine.byte_counts import format_bytes
from gradstore.machine.devices import full_float32
from gradstore.machine.threads import worker_count
from gradstore.search.best import Best
from gradstore.search.exact_score import ROOM, ExactScore
from gradstore.search.index.sketch import sketch_queries
from gradstore.search.index.store_index import SketchIndex
from gradstore.search.query_batch import QueryGroup, load_queries
from gradstore.search.request import Request

_ROWS = 8192
MOST_QUERIES = 64
"""Of a batch."""


@dataclass(frozen=True)
class _Cut:
    """Queries a batch, threads, and bytes of rows that each of these has beside the row that it works on."""

    queries: int
    workers: int
    room: int


class IndexedRows:
    """The rows of a store, seen through its index.

    Args:
        index: of the training store; its arrays stay in memory.
        memory: bytes beside them.

    Attributes:
        index: the same, with what was measured since.
        memory: bytes.
    """

    def __init__(self, index: SketchIndex, memory: int) -> None:
        self.index, self.memory = index, memory
        self._norms: np.ndarray | None = None

    @cached_property
    def cut(self) -> _Cut:
        """How a search stays within its memory; prefers many workers, then many queries a batch.

        Raises:
            UsageError: too little memory for one query.
        """
        phi, row = self.index.phi, self.index.store.schema.row_bytes
        query = 40 * len(self.index.store) + 6 * phi.length  # its bounds, and Φ in float32 and in two digits
        reading = 4 * phi.length + 2 * row  # by one worker, of a query or of a row that is scored
        most = self.memory * 2 // 5  # the C library keeps the rest, of what building, a scan and every batch have freed
        workers = next((w for w in range(worker_count(), 1, -1) if 2 * w * reading <= most), 1)
        left = most - workers * reading
        if left < query:
            raise UsageError(
                "too little memory",
                where="--memory",
                expected=f"at least {format_bytes(2.65 * (query + reading))}",  # as it is rounded there
                got=format_bytes(self.memory),
            )
        queries = min(MOST_QUERIES, left // query)
        return _Cut(queries, workers, min(ROOM, (left - queries * query) // workers))

    @property
    def name(self) -> str:
        """What it is, for people."""
        return f"sketch of {self.index.basis.size} dimensions"

    def batches(self, request: Request) -> Iterator[tuple[int, QueryGroup]]:
        """Read the queries, as many at a time as their bounds on every training row fit the memory.

        Args:
            request: says which.

        Yields:
            (place of the first, queries).

        Raises:
            UsageError: too little memory for one.
        """
        for start in range(0, len(request.rows), self.cut.queries):
            part = slice(start, start + self.cut.queries)
            yield start, load_queries(request, part, self.cut.workers, self.cut.room)[0]

    def upper_bounds(self, group: QueryGroup, count: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Upper bounds float64 [m, n] on the similarities, and the `count` rows that look best for each query."""
        queries, n = sketch_queries(self.index.basis, group), len(self.index.store)
        query_scale, row_scale = self._scales(group)
        upper = np.empty((len(group.members), n))
        estimates = np.empty((len(group.members), n), np.float32)
        with full_float32(torch.device("cpu")):  # of which the spread is the bound
            for start in range(0, n, _ROWS):
                stop = min(start + _ROWS, n)
                estimate, spread = queries.bounds(self.index.sketch.rows(start, stop))
                scale = np.ones(1) if row_scale is None else row_scale[start:stop]
                estimates[:, start:stop] = estimate.numpy() * scale
                upper[:, start:stop] = (estimate + spread).numpy() * scale * query_scale[:, None]
        return upper, [largest(row, count) for row in estimates]

    def _scales(self, group: QueryGroup) -> tuple[np.ndarray, np.ndarray | None]:
        """What turns a cosine into a similarity: norms where the kernel is no cosine."""
        if group.phi.kernel.normalised:
            return np.ones(len(group.members)), None
        if self._norms is None:
            self._norms = np.linalg.norm(self.index.store.norms, axis=1)
        return np.ldexp(group.norms, group.exponent), self._norms


class Scored:
    """The k best of the rows that were read so far, by their exact scores.

    Args:
        store: the training store.
        group: the queries.
        k: neighbours a query.
        rows: the first to be read for each, at least k.

    Attributes:
        best: of each query.
    """

    def __init__(self, store: IndexedRows, group: QueryGroup, k: int, rows: Sequence[np.ndarray]) -> None:
        self._score = ExactScore(store.index.store, [group], store.cut.workers, store.cut.room)
        self.best = Best(len(group.members), k, self._score)
        self.add(rows)

    @property
    def rows_read(self) -> int:
        """Rows read so far."""
        return self._score.rows_read

    def add(self, rows: Sequence[np.ndarray]) -> None:
        """Read some rows of each query, int64, none of them twice."""
        queries = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
        flat = np.concatenate(rows)
        self.best.take(queries, flat, self._score(queries, flat))


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest values, int64."""
    if count >= len(values):
        return np.arange(len(values))
    return np.argpartition(-values, count - 1)[:count]
