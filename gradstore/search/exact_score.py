"""The similarity that decides: float64, from stored bytes alone, the same whoever asks and in whatever company.

Products of two float32 numbers are exact in float64, and are added up in an order fixed by the length of Φ, so bits
depend neither on block size, nor engine, nor threads, nor processor; a sum is off by some 1e-15 of the norms, at most
256 · 2^-53. Every search ends here, whichever way it found its candidates.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradstore.arithmetic import compiled_loops
from gradstore.machine.threads import Workers
from gradstore.native import library
from gradstore.search.query_batch import QueryGroup
from gradstore.store.rows import Rows

# Running sums of an inner product; `dot` in native/src/search_loops.h has as many.
_LANES = 16
ROOM = 8 << 20
"""Bytes of rows that are read before they are scored. Of 2 MB, scoring took half as long again: more calls, and more
waiting for the interpreter lock."""


class ExactScore:
    """Scores pairs of a query and a row of the training store; reads each row once.

    Args:
        train: the training store.
        groups: the queries.
        workers: threads.
        room: bytes of rows that each of them holds, as stored and in float32 where that takes a copy; or one row.

    Attributes:
        rows_read: rows read so far.
    """

    def __init__(self, train: Rows, groups: Sequence[QueryGroup], workers: int = 1, room: int = ROOM) -> None:
        self.train, self.groups, self.workers = train, groups, workers
        size = sum(len(group.members) for group in groups)
        self._group = np.empty(size, dtype=np.int64)
        self._place = np.empty(size, dtype=np.int64)
        for g, group in enumerate(groups):
            self._group[group.members] = g
            self._place[group.members] = np.arange(len(group.members))
        self.rows_read = 0
        schema = train.schema
        summed = any(group.phi.sums for group in groups)
        decoded = 4 * schema.c * schema.K if schema.dtype == "int8" else 4 * schema.K * summed
        decoded += max((group.phi.making for group in groups), default=0)
        self._most = int(np.clip(room // (schema.row_bytes + decoded), 1, 64))
        self._rooms = threading.local()

    def __call__(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Similarities float64 [pairs] of queries [pairs], places in the batch, and rows [pairs]."""
        scores = np.empty(len(rows))
        order = np.lexsort((queries, rows))
        ordered = rows[order]
        found = np.unique(ordered)
        self.rows_read += len(found)
        batches = [found[i : i + self._most] for i in range(0, len(found), self._most)]

        def score(batch: np.ndarray) -> None:
            low, high = np.searchsorted(ordered, (batch[0], batch[-1] + 1))
            self._score_batch(batch, queries, rows, order[low:high], scores)

        if len(batches) < 2 or self.workers < 2:
            for batch in batches:
                score(batch)
        else:
            with Workers(self.workers) as pool:
                pool.map(score, batches)
        return scores

    def _read(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of the store, ascending, in this thread's own arrays: new ones would take longer to map than to fill."""
        if not hasattr(self._rooms, "mine"):
            self._rooms.mine = self.train.schema.empty(self._most)
        return self.train.gather(batch, self._rooms.mine)

    def _score_batch(
        self, batch: np.ndarray, queries: np.ndarray, rows: np.ndarray, pairs: np.ndarray, scores: np.ndarray
    ) -> None:
        """Fill in the scores of the pairs, in ascending order of rows, whose rows are those of `batch`."""
        columns = self._read(batch)
        features = torch.from_numpy(columns["features"])
        groups = self._group[queries[pairs]]
        for g in np.unique(groups).tolist():
            mine, group = pairs[groups == g], self.groups[g]
            scaled = group.phi.scaled(features, columns, self.train.where)
            values, factors = scaled.vectors()
            norms = scaled.exact_norms(values)
            group.phi.require_direction(norms, batch, self.train.where)
            row_scale = group.phi.unscaled(norms, scaled.exponent)
            places, at = self._place[queries[mine]], np.searchsorted(batch, rows[mine])
            products = inner_products(values, factors, group.pieces, at, places)
            scores[mine] = products * group.scale[places] * row_scale[at]


def inner_products(
    values: Tensor, factors: Tensor, pieces: Tensor, rows: np.ndarray, places: np.ndarray, simd: str | None = None
) -> np.ndarray:
    """Inner products of pairs of a row and a query in float64, added up in one fixed order.

    A piece has 16 running sums, number l of the products l, l + 16, …; the upper half of them is added to the lower
    until one is left; and pieces are added one after another.

    Args:
        values: float16 or float32 [B, segments, K], adjacent within a row.
        factors: float32 [B, segments]; a row is its values times these, in float32.
        pieces: float32 [pieces, g, width], contiguous: queries, each segment cut into pieces, the last one padded.
        rows: int64 [q], which of the B rows; equal ones follow one another.
        places: int64 [q], which of the g queries.
        simd: a level of the compiled loops, or "" for numpy, which holds 24·D bytes; default the fastest there is.

    Returns:
        float64 [q]; the same bits at every level.
    """
    simd = library.level() if simd is None else simd
    if simd:
        return compiled_loops.dot(values, factors, pieces, rows, places, simd)
    return np.array([_by_numpy(values[i], factors[i], pieces[:, q]) for i, q in zip(rows, places, strict=True)])


def _by_numpy(values: Tensor, factors: Tensor, query: Tensor) -> float:
    row = values.float() * factors[:, None]
    row = torch.nn.functional.pad(row, (0, query.numel() // len(row) - row.shape[1])).view(query.shape)
    padding = -row.shape[1] % _LANES
    products = np.pad((row.double() * query.double()).numpy(), ((0, 0), (0, padding)))
    lanes = np.add.accumulate(products.reshape(len(row), -1, _LANES), axis=1)[:, -1]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return float(np.add.accumulate(lanes[:, 0])[-1])
