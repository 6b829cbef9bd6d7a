"""Similarities of queries to all training examples, as a search scores them: one pass for as many as memory holds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradstore.errors import UsageError
from gradstore.kernels.feature_map import FeatureMap
from gradstore.machine.byte_counts import format_bytes
from gradstore.machine.threads import single_threaded, worker_count
from gradstore.search.exact_score import ROOM, ExactScore
from gradstore.search.query_batch import load_queries
from gradstore.search.request import Request
from gradstore.store.rows import Rows

_PAIR_BYTES = 64  # of a query and a row while they are scored: places, their order, and the score
_MOST_PAIRS = 1 << 20  # that are scored in one call


def similarities(
    queries: Rows, wanted: np.ndarray, train: Rows, phi: FeatureMap, memory: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """κ(x, x_i) of some queries and all of some training rows, in float64.

    Each is `gradstore.search.exact_score`'s: its bits depend on the two rows alone, neither on the memory, nor on the
    other queries, nor on threads.

    Args:
        queries: hold the queries.
        wanted: int64 [m], which of them.
        train: the training rows, all of them there.
        phi: the feature map of both.
        memory: bytes. A query takes 4·D and 8·n of them.

    Yields:
        (some of `wanted`, in order; similarities float64 [some, n]); each is one pass over the training rows.

    Raises:
        UsageError: the memory does not hold one query and one row.
        NonFiniteError: a row has no direction; names it.
        CorruptError: a row does not match its digest.
    """
    n = len(train)
    row = train.schema.row_bytes + 4 * train.schema.c * train.schema.K + phi.making
    query = 4 * phi.pieces * phi.width + 8 * n
    least = query + 2 * row + _PAIR_BYTES
    if memory < least:
        raise UsageError(
            "too little memory", where="--memory", expected=f"at least {format_bytes(least)}", got=format_bytes(memory)
        )
    workers = max(1, min(worker_count(), memory // (8 * row)))
    room = min(ROOM, max(row, memory // (4 * workers)))
    batch = max(1, min(memory // 2 // query, _MOST_PAIRS // 64))
    pairs = max(batch, min(_MOST_PAIRS, memory // 8 // _PAIR_BYTES))
    request = Request(train, queries, wanted, (phi,) * len(wanted), phi.kernel, n, train)
    for start in range(0, len(wanted), batch):
        part = slice(start, start + batch)
        with single_threaded():
            score = ExactScore(train, load_queries(request, part, workers, room), workers, room)
            found = _all_pairs(score, len(wanted[part]), n, max(1, pairs // len(wanted[part])))
        del score  # before the next queries are read
        yield wanted[part], found


def _all_pairs(score: ExactScore, m: int, n: int, together: int) -> np.ndarray:
    """Similarities of m queries and n rows, float64 [m, n], of some rows at a time."""
    found = np.empty((m, n))
    for at in range(0, n, together):
        rows = np.arange(at, min(at + together, n))
        scores = score(np.tile(np.arange(m), len(rows)), np.repeat(rows, m))
        found[:, rows] = scores.reshape(len(rows), m).T
    return found
