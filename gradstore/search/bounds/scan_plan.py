"""How a scan is cut so that it stays within its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradstore.errors import UsageError
from gradstore.kernels.feature_map import FeatureMap
from gradstore.machine.byte_counts import budget_for, format_bytes, spendable
from gradstore.machine.threads import worker_count
from gradstore.search.best import pending_limit
from gradstore.search.bounds.bounds import Bounds
from gradstore.search.exact_score import ROOM
from gradstore.search.topk_result import RESULT_BYTES
from gradstore.store.rows import Rows

_BATCH = 512
# Bytes a row of a block and query: a product in float32, bounds in float64 and what making them takes.
_PAIR = 48


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


def plan_scan(train: Rows, phis: Sequence[FeatureMap], m: int, k: int, memory: int, means: type[Bounds]) -> ScanPlan:
    """Cut a scan to stay within a byte budget, its result included; prefers many workers, then many queries a pass.

    Args:
        train: the training store.
        phis: the distinct feature maps of the queries.
        m: queries.
        k: neighbours a query.
        memory: bytes.
        means: says the bounds.

    Returns:
        The cut.

    Raises:
        UsageError: the budget does not hold the result, one query, one row and what their product takes.
    """
    result = RESULT_BYTES * m * k
    needs, row = means.bytes_for(train, phis), train.schema.row_bytes
    vectors = 4 * max(phi.length for phi in phis) + 2 * row  # of one worker as it scores exactly, beside the rows
    kept = needs.query + 40 * k + 72 * (pending_limit(_BATCH, k) // _BATCH + 1)
    for workers in range(worker_count(), 0, -1):
        mine = spendable(memory - result, workers)
        per_query, room = kept + needs.preparing * workers, max(row, min(ROOM, mine // (16 * workers)))
        left = mine - workers * (vectors + room) - needs.fixed
        batch = int(min(max(m, 1), _BATCH, left // 2 // per_query))
        if batch < 1:
            continue
        each = (left - batch * per_query) // workers
        block = next((size for size, held in needs.blocks if held + _PAIR * batch * size <= each), 0)
        if block >= (1 if workers == 1 else min(8, needs.blocks[0][0])):
            return ScanPlan(batch, block, workers, room)
    size, held = needs.blocks[-1]
    rest = vectors + needs.fixed + 2 * max(kept + needs.preparing, held + _PAIR * size)
    need = budget_for(max(rest + row, rest * 16 // 15 + 1), 1) + result
    hint = f"The result alone takes {format_bytes(result)}: ask for a smaller -k, or for fewer --rows at a time"
    raise UsageError(
        "too little memory",
        where="--memory",
        expected=f"at least {format_bytes(need)}",
        got=format_bytes(memory),
        hint=hint if 2 * result > need else None,
    )
