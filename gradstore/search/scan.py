"""The exhaustive search: one pass over the training store, blocks of rows in order, some queries at a time.

As many workers as cores each read, check, convert and multiply a block of their own, with one thread a product: while
one waits for the disk or hashes, another multiplies, and no core waits at a barrier. Buffers are allocated once.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from gradstore.device import full_float32
from gradstore.errors import NonFiniteError, UsageError
from gradstore.memory import format_bytes
from gradstore.rows import Rows
from gradstore.search.best import Best, pending_limit
from gradstore.search.engines import Engine, choose_engine, single_threaded
from gradstore.search.exact_score import ROOM, ExactScore
from gradstore.search.float_block import FloatBlock
from gradstore.search.integer_block import IntegerBlock, RoundedQueries
from gradstore.search.limb_block import STRIPS, LimbBlock, PackedBatch, block_bytes
from gradstore.search.phi import Phi
from gradstore.search.query_batch import QueryGroup, load_queries
from gradstore.search.rounding import MAX_WIDTH
from gradstore.search.streamed import piece_rows
from gradstore.search.topk_result import Search

# A block is large enough for a good matrix product and no larger; the matrix unit is so fast that packed queries should
# be read from memory seldom.
_BLOCK_BYTES = 24 << 20
_PACKED_BLOCK_BYTES = 80 << 20
_BLOCK_ROWS = 4096
_BATCH = 512
_MAX_WORKERS = 16
# Floating-point operations below which choosing an engine by measurement takes longer than it can save.
_WORTH_MEASURING = 2e10
# What converting a number costs, in such operations.
_READING = 20


@dataclass(frozen=True)
class ScanPlan:
    """What a scan holds in memory.

    Attributes:
        batch: queries a pass.
        block: rows of the training store a worker handles at a time.
        workers: threads.
        room: bytes of rows that each of them scores exactly at a time.
    """

    batch: int
    block: int
    workers: int
    room: int


def plan_scan(train: Rows, phi: Phi, m: int, k: int, memory: int, packed: Sequence[Phi] = ()) -> ScanPlan:
    """Cut a scan so that it stays within a byte budget; prefers many workers, then many queries a pass.

    Args:
        train: the training store.
        phi: the longest feature map of the queries.
        m: queries.
        k: neighbours a query.
        memory: bytes.
        packed: the distinct feature maps of queries that are packed in limbs, each rounded up to 32 queries; none for
            other engines.

    Raises:
        UsageError: the budget does not hold one query, one row and what their product takes.
    """
    row = train.schema.row_bytes
    vectors = 4 * phi.length + 2 * row  # of one worker as it scores exactly, beside the rows
    value = 10 if packed else 6  # bytes: float32, and two digits or limbs, which follow one limb
    kept = value * phi.pieces * phi.width + 40 * k + 72 * (pending_limit(_BATCH, k) // _BATCH + 1)
    fixed = sum(31 * 6 * other.length for other in packed)  # of both, while one follows the other
    blocks = _packed_blocks(train, packed) if packed else _blocks(train, phi)
    for workers in range(min(torch.get_num_threads(), _MAX_WORKERS), 0, -1):
        per_query, room = kept + 8 * phi.K * (workers if packed else 1), max(row, min(ROOM, memory // (16 * workers)))
        left = memory - workers * (vectors + room) - fixed
        batch = int(min(max(m, 1), _BATCH, left // 2 // per_query))
        if batch < 1:
            continue
        each = (left - batch * per_query) // workers
        block = next((size for size, held in blocks if held + 48 * batch * size <= each), 0)
        if block >= (1 if workers == 1 else min(8, blocks[0][0])):
            return ScanPlan(batch, block, workers, room)
    rest = vectors + fixed + 2 * max(kept + 8 * phi.K, blocks[-1][1] + 48)
    need = max(rest + row, rest * 16 // 15 + 1)
    raise UsageError(
        "too little memory", where="--memory", expected=f"at least {format_bytes(need)}", got=format_bytes(memory)
    )


def _blocks(train: Rows, phi: Phi) -> list[tuple[int, int]]:
    """(rows, bytes) of the blocks that a worker may use, the largest first."""
    schema = train.schema
    row, features = schema.row_bytes, schema.column("features").row_bytes
    cap = int(np.clip(_BLOCK_BYTES // row, 1, min(_BLOCK_ROWS, max(1, len(train)))))
    # Rows as stored, or two digits of them while some are read, and decoded where they are integers.
    each, decoded = max(row, 2 * phi.length + 2 * (row - features)), 4 * features if schema.dtype == "int8" else 0
    piece = [min(piece_rows(schema), max(1, size // 2)) * (features + decoded) for size in range(cap + 1)]
    return [(size, size * (each + 8 * phi.width) + piece[size]) for size in range(cap, 0, -1)]


def _packed_blocks(train: Rows, phis: Sequence[Phi]) -> list[tuple[int, int]]:
    """The same of rows in strips, whole ones."""
    row = sum(2 * phi.length for phi in phis)
    cap = int(np.clip(_PACKED_BLOCK_BYTES // row, 1, min(_BLOCK_ROWS, max(1, len(train)))))
    sizes = range(max(STRIPS, cap // STRIPS * STRIPS), 0, -STRIPS)
    return [(size, block_bytes(train.schema, phis, size)) for size in sizes]


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
    means, plan = _prepare(train, phis, k, memory, engine)
    parts = [slice(i, i + plan.batch) for i in range(0, len(rows), plan.batch)]
    with single_threaded():
        found = [
            scan(train, load_queries(queries, rows[part], phis[part], plan.workers), k, means, plan) for part in parts
        ]
    search = Search("exact", len(train) * len(parts), means.name)
    return np.concatenate([rows for rows, _ in found]), np.concatenate([values for _, values in found]), search


def _prepare(train: Rows, phis: Sequence[Phi], k: int, memory: int, engine: str) -> tuple[Engine, ScanPlan]:
    longest, maps = max(phis, key=lambda phi: phi.length), tuple(dict.fromkeys(phis))
    plan = plan_scan(train, longest, len(phis), k, memory)
    asked = engine
    if engine == "auto" and (2.0 * len(phis) + _READING) * len(train) * longest.length < _WORTH_MEASURING:
        engine = "cuda" if torch.cuda.is_available() else "torch"
    if engine == "int8" and longest.K > MAX_WIDTH:
        raise UsageError(
            "K is too large for sums of integers", where="--engine int8", expected=f"at most {MAX_WIDTH}", got=longest.K
        )
    if engine == "auto" and longest.K > MAX_WIDTH and not torch.cuda.is_available():
        engine = "float32"
    sizes = -(-plan.batch // len(maps)), plan.block, longest.width, getattr(torch, train.schema.dtype)
    means = choose_engine(engine, *sizes)
    if means.name != "bfloat16":
        return means, plan
    try:
        packed = plan_scan(train, longest, len(phis), k, memory, packed=maps)
    except UsageError:
        if asked == "bfloat16":
            raise
        packed = None
    if packed is not None and (asked == "bfloat16" or 2 * packed.batch >= plan.batch):
        return means, packed
    return choose_engine("float32", *sizes), plan  # packed queries take too much room


def scan(
    train: Rows, groups: Sequence[QueryGroup], k: int, engine: Engine, plan: ScanPlan
) -> tuple[np.ndarray, np.ndarray]:
    """The k best rows of every query, over all rows, int64 [m, k], and their similarities float64 [m, k].

    Args:
        train: the training store.
        groups: queries, one batch of them.
        k: neighbours a query.
        engine: computes the products.
        plan: block size and workers.

    Raises:
        NonFiniteError: a row has no direction or is not finite; names it.
        CorruptError: a row does not match its digest.
    """
    m = sum(len(group.members) for group in groups)
    best = Best(m, k, ExactScore(train, groups, plan.workers, plan.room))
    with full_float32(engine.device):
        _Scan(train, groups, best, engine, plan).run()
        best.settle()
    return best.rows, best.similarity


class _Scan:
    """One pass: workers take blocks in order, and offer their bounds under one lock."""

    def __init__(self, train: Rows, groups: Sequence[QueryGroup], best: Best, engine: Engine, plan: ScanPlan) -> None:
        self.train, self.groups, self.best, self.engine, self.plan = train, groups, best, engine, plan
        self._rounded = [RoundedQueries.of(group) for group in groups] if engine.name == "int8" else []
        packed = groups if engine.name == "bfloat16" else []
        self._packed = PackedBatch(packed, train.schema.dtype, plan.workers)
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
        block = self._block()
        while not self._errors and not self._stopped:
            start = next(self._starts)
            if start >= len(self.train):
                return
            try:
                self._do(block, start, min(start + self.plan.block, len(self.train)))
            except Exception as error:
                self._errors.append((start, error))

    def _block(self) -> IntegerBlock | LimbBlock | FloatBlock:
        if self.engine.name == "int8":
            return IntegerBlock(self.train, self._rounded, self.plan.block)
        if self.engine.name == "bfloat16":
            return LimbBlock(self.train, self._packed, self.plan.block)
        return FloatBlock(self.train, self.groups, self.engine, self.plan.block)

    def _do(self, block: IntegerBlock | LimbBlock | FloatBlock, start: int, stop: int) -> None:
        rows = np.arange(start, stop)
        if self.best.crowded:
            self._packed.refine()
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
