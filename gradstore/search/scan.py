"""The exhaustive search: one pass over the training store, blocks of rows in order, some queries at a time.

As many workers as cores each read, check, convert and multiply a block of their own, with one thread a product: while
one waits for the disk or hashes, another multiplies, and no core waits at a barrier. Buffers are allocated once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from gradstore.kernels.feature_map import not_finite
from gradstore.machine.devices import full_float32
from gradstore.machine.threads import Workers, single_threaded
from gradstore.search.best import Best
from gradstore.search.bounds.bounds import BlockBounds, Bounds
from gradstore.search.bounds.engines import choose_engine
from gradstore.search.bounds.scan_plan import ScanPlan
from gradstore.search.exact_score import ExactScore
from gradstore.search.query_batch import QueryGroup, load_queries
from gradstore.search.request import Request
from gradstore.search.topk_result import Answer, Gathered, Pairs, Search
from gradstore.store.rows import Rows


class ExactSearch:
    """Mode "exact": every row of the training store is scored, in as many passes as it takes.

    Args:
        memory: bytes, those of the result among them.
        engine: one of `gradstore.arithmetic.names.ENGINES`.
    """

    def __init__(self, memory: int, engine: str = "auto") -> None:
        self.memory, self.engine = memory, engine

    def search(self, request: Request) -> Answer:
        """The k best rows of every query.

        Args:
            request: what is searched for.

        Returns:
            Rows and similarities, and how many rows were read.

        Raises:
            UsageError: an unknown engine, or one that this machine does not have; or too little memory.
            NonFiniteError: a row has no direction or is not finite; names it.
            CorruptError: a row does not match its digest.
        """
        train, k = request.train, request.k
        if not len(request.rows):
            return Gathered(0, k).answer(Search("exact", 0))
        means, plan = choose_engine(self.engine, train, request.phis, k, self.memory)
        found, starts = Gathered(len(request.rows), k), range(0, len(request.rows), plan.batch)
        with single_threaded():
            for start in starts:
                groups = load_queries(request, slice(start, start + plan.batch), plan.workers, plan.room)
                found.add(_pass(train, groups, k, means, plan))
                del groups  # before the next are read
        return found.answer(Search("exact", len(train) * len(starts), means.choice.name))


def _pass(train: Rows, groups: Sequence[QueryGroup], k: int, means: type[Bounds], plan: ScanPlan) -> Pairs:
    """The k best rows of one batch of queries, over all rows."""
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
        with Workers(self.plan.workers) as pool:
            try:
                pool.map(self._work, range(self.plan.workers))
            except BaseException:  # such as Ctrl-C, which arrives here and not in a worker
                self._stopped = True
                raise
        if self._errors:
            raise min(self._errors, key=lambda found: found[0])[1]

    def _work(self, _: int) -> None:
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
        with self._lock:
            thresholds = self.best.thresholds.clone()
        for group, center, spread in block.bounds(start, stop, thresholds):
            self._require_finite(center, rows)
            with self._lock:
                self.best.offer(group.members, rows, center, spread)

    def _require_finite(self, values: Tensor, rows: np.ndarray) -> None:
        if torch.isfinite(values.sum()):
            return
        bad = torch.nonzero(~torch.isfinite(values).all(dim=0))
        if len(bad):
            raise not_finite(rows[int(bad[0])], self.train.where)
