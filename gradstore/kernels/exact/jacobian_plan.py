"""How an exact Jacobian kernel is cut: which examples are held, and how many classes are differentiated at a time.

The Jacobians of a group of rows stay in factored form while those of all columns are computed again and pass by. Held
for some classes only, a group may be larger, so columns pass by fewer times; but each time the forward pass, and the
product that audits it, are repeated for every part of the classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gradstore.errors import UsageError
from gradstore.kernels.gram_tiles import CELL
from gradstore.machine.byte_counts import budget_for, format_bytes, spendable
from gradstore.machine.threads import worker_count

# Rows of the largest group: with more of them, little of the time is spent on computing Jacobians again.
MOST_ROWS = 2048
# The part of the memory, one in so many, that is left for computing Jacobians and for multiplying them.
_SPARE = 4
_BATCHES = (256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
# A forward pass and an audit, in backward passes of one class.
_OVERHEAD = 1.5
# Where classes come in parts, columns of a tile, in groups: the group is computed again for each.
_SPAN = 4


@dataclass(frozen=True)
class JacobianPlan:
    """A cut.

    Attributes:
        classes: differentiated and held at a time.
        group: rows of a tile, whose Jacobians are held.
        span: columns of a tile.
        block: columns whose Jacobians are computed and pass by together.
        batch: examples of one pass through the model.
        scratch: bytes for intermediate values of products.
    """

    classes: int
    group: int
    span: int
    block: int
    batch: int
    scratch: int


def plan_jacobians(
    n: int,
    m: int,
    *,
    symmetric: bool,
    classes: int,
    divisible: bool,
    value: int,
    held: Callable[[int], int],
    computing: Callable[[int, int], int],
    memory: int,
) -> JacobianPlan:
    """The cut that computes fewest Jacobians within a memory budget.

    Args:
        n: rows.
        m: columns.
        symmetric: both are the same examples.
        classes: rows of an example's Jacobian.
        divisible: classes may come in parts.
        value: bytes that a pair of examples takes in a tile.
        held: (classes) -> bytes that one example's Jacobians are held in.
        computing: (examples, classes) -> bytes that computing theirs takes.
        memory: the budget.

    Returns:
        The cut.

    Raises:
        UsageError: not even the smallest cut fits.
    """
    room = spendable(memory, worker_count())
    parts = range(1, classes + 1) if divisible else range(1, 2)
    found = []
    for at_a_time in sorted({-(-classes // part) for part in parts}):
        plan = _plan(n, m, at_a_time, at_a_time < classes, value, held, computing, room)
        if plan is not None:
            found.append((_cost(plan, n, m, symmetric, classes), -at_a_time, plan))
    if not found:
        least = 1 if divisible else classes
        beside = 2 * CELL * held(least) + value * CELL * min(_SPAN * CELL, -(-m // CELL) * CELL)
        spent = max(beside * _SPARE // (_SPARE - 1), beside + computing(1, least))
        need = 1.06 * budget_for(spent, worker_count())  # as it is rounded for people
        raise UsageError(
            "too little memory", where="--memory", expected=f"at least {format_bytes(need)}", got=format_bytes(memory)
        )
    return min(found, key=lambda entry: entry[:2])[2]


def _plan(
    n: int,
    m: int,
    classes: int,
    divided: bool,
    value: int,
    held: Callable[[int], int],
    computing: Callable[[int, int], int],
    memory: int,
) -> JacobianPlan | None:
    """The largest group, of so many classes at a time; None where none fits."""
    each = held(classes)
    top = -(-min(max(n, CELL), MOST_ROWS) // CELL) * CELL
    for group in range(top, 0, -CELL):
        # Dense rows of the group are formed once for each block, and those of a block once: both had better be large.
        block = max(CELL, group // 2 // CELL * CELL)
        span = min(max(group, _SPAN * group if divided else block), -(-m // CELL) * CELL)
        passing = block if group < max(n, m) else 0
        left = memory - (group + passing) * each - value * group * span
        if left < memory // _SPARE:
            continue
        # Jacobians are computed first and multiplied then, so both may take what is left.
        batch = next((size for size in _BATCHES if computing(size, classes) <= left), None)
        if batch is not None:
            return JacobianPlan(classes, group, span, block, min(batch, group), left)
    return None


def _cost(plan: JacobianPlan, n: int, m: int, symmetric: bool, classes: int) -> float:
    """Examples whose Jacobians are computed, times what one of them takes, in backward passes."""
    groups = -(-n // plan.group)
    columns = m * (groups + 1) / 2 if symmetric else float(m * groups)
    rows = 0.0 if symmetric else float(n)
    if plan.classes < classes and groups > 1:
        rows = columns * plan.group / plan.span
    return (columns + rows) * (_OVERHEAD * -(-classes // plan.classes) + classes)
