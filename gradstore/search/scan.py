"""The exhaustive search: one pass over the training store, blocks of rows in order, some queries at a time.

As many workers as cores each read, check, convert and multiply a block of their own, with one thread a product: while
one waits for the disk or hashes, another multiplies, and no core waits at a barrier. Buffers are allocated once.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import NonFiniteError
from gradstore.machine.devices import full_float32
from gradstore.machine.threads import single_threaded
from gradstore.search.best import Best
from gradstore.search.bounds.bounds import BlockBounds, Bounds
from gradstore.search.bounds.engines import choose_engine
from gradstore.search.bounds.scan_plan import ScanPlan
from gradstore.search.exact_score import ExactScore
from gradstore.search.phi import Phi
from gradstore.search.query_batch import QueryGroup, load_queries
from gradstore.search.topk_result import Search
from gradstore.store.rows import Rows


def scan_all(
    train: Rows,
    queries: Rows,
    rows: np.ndarray,
    phis: Sequence[Phi],
    k: int,
    memory: int,
    engine: str = "auto",
) -> tuple[np.ndarray, np.ndarray, Search]:
    """The k best rows int64 [m, k] of every query and their similarities float64 [m, k], as many passes as it takes.

    Args:
        train: the training store.
        queries: the query store.
        rows: int64 [m], rows of the query store.
        phis: the feature map of each.
        k: neighbours a query.
        memory: bytes held beside the result.
        engine: as for `choose_engine`.
    """
    if not len(rows):
        return np.empty((0, k), np.int64), np.empty((0, k)), Search("exact", 0)
    means, plan = choose_engine(engine, train, phis, k, memory)
    parts = [slice(i, i + plan.batch) for i in range(0, len(rows), plan.batch)]
    with single_threaded():
        found = [
            scan(train, load_queries(queries, rows[part], phis[part], plan.workers), k, means, plan) for part in parts
        ]
    search = Search("exact", len(train) * len(parts), means.choice.name)
    return np.concatenate([rows for rows, _ in found]), np.concatenate([values for _, values in found]), search


def scan(
    train: Rows, groups: Sequence[QueryGroup], k: int, means: type[Bounds], plan: ScanPlan
) -> tuple[np.ndarray, np.ndarray]:
    """The k best rows of every query, over all rows, int64 [m, k], and their similarities float64 [m, k].

    Args:
        train: the training store.
        groups: queries, one batch of them.
        k: neighbours a query.
        means: says the bounds.
        plan: block size and workers.

    Raises:
        NonFiniteError: a row has no direction or is not finite; names it.
        CorruptError: a row does not match its digest.
    """
    m = sum(len(group.members) for group in groups)
    best = Best(m, k, ExactScore(train, groups, plan.workers, plan.room))
    with full_float32(means.device):
        _Scan(train, means(train, groups, plan.workers), best, plan).run()
        best.settle()
    return best.rows, best.similarity


class _Scan:
    """One pass: workers take blocks in order, and offer their bounds under one lock."""

    def __init__(self, train: Rows, bounds: Bounds, best: Best, plan: ScanPlan) -> None:
        self.train, self.bounds, self.best, self.plan = train, bounds, best, plan
        self._starts = count(0, plan.block)
        self._lock = Lock()
        self._errors: list[tuple[int, Exception]] = []
        self._stopped = False

    def run(self) -> None:
        with ThreadPoolExecutor(self.plan.workers) as pool:
            try:
                for future in [pool.submit(self._work) for _ in range(self.plan.workers)]:
                    future.result()
            except BaseException:  # such as Ctrl-C, which arrives here and not in a worker
                self._stopped = True
                raise
        if self._errors:
            raise min(self._errors, key=lambda found: found[0])[1]

    def _work(self) -> None:
        torch.set_num_threads(1)  # counts for this thread only
        block = self.bounds.block(self.plan.block)
        while not self._errors and not self._stopped:
            start = next(self._starts)
            if start >= len(self.train):
                return
            try:
                self._do(block, start, min(start + self.plan.block, len(self.train)))
            except Exception as error:
                self._errors.append((start, error))

    def _do(self, block: BlockBounds, start: int, stop: int) -> None:
        rows = np.arange(start, stop)
        if self.best.crowded:
            self.bounds.refine()
        for group, center, spread in block.bounds(start, stop):
            self._require_finite(center, rows)
            with self._lock:
                self.best.offer(group.members, rows, center, spread)

    def _require_finite(self, values: Tensor, rows: np.ndarray) -> None:
        if torch.isfinite(values.sum()):
            return
        bad = torch.nonzero(~torch.isfinite(values).all(dim=0))
        if len(bad):
            raise NonFiniteError(
                f"the features of row {rows[int(bad[0])]} are not finite",
                where=self.train.where,
                expected="finite values",
                hint="Run `gradstore verify` on the store",
            )
