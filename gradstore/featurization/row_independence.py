"""Every row a second time: what is stored of an example must not depend on its neighbours, its turn or its day.

Rows are computed together, and a row is right if it is what the model gives for that example alone. A norm that looks
over its batch, a clamp at the batch's largest value, padding to its longest text, or state that a call leaves behind
would all make rows that look like any other. So, for each batch:

- **Logits of every row again**, without gradients: alone, where that takes little of the time, else beside other rows
  than before. Every check batch has some rows of every group.
- **Some rows alone**: 16 at first, then as many as `ALONE` of the time allows; and likewise the gradient of one row
  (`GradientAudit`), in each of the first 16 batches and as often as `GRADIENTS` of the time allows.
- **The run's first row again**, since a state may change between batches.
- **Inputs read again**: all, where that takes little of the time, else as many rows as `READ` of it allows.

What is seen. A difference of logits is one beyond rounding (1e-4 in float32, `Subject.rounding`) of the row's norm and
a typical one.

- Always, where a row's logits in its group are others than beside other rows: whatever one example, or a few that are
  not in every check batch, do to their neighbours.
- Always, where every row was checked alone (the run log says how many were): any dependence of logits on the batch.
- With a chance of 1 - (1 - q)^a after a rows alone, what holds for a share q of the rows in whatever company: a
  gradient that depends on the batch, or logits that depend on something that every batch contains.
- With a chance of 1 - (1 - q)^r after r rows read twice, inputs of a share q of the rows that change from read to read.
- Never, what happens to a row only while it is not looked at.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.featurization.gradient_audit import GradientAudit
from gradstore.featurization.plan import Plan, joined_rows
from gradstore.featurization.second_look import Again, SecondLook
from gradstore.jacobians.subject import length, take
from gradstore.model.examples import Inputs

ALONE, READ, GRADIENTS = 0.01, 0.01, 0.01  # shares of the time
_AT_FIRST = 16  # rows of each check that are looked at whatever it takes


@dataclass
class Looked:
    """How many rows were looked at a second time.

    Attributes:
        beside_others: logits beside other rows.
        alone: logits alone.
        gradients: gradients alone.
        read: inputs read again.
    """

    beside_others: int = 0
    alone: int = 0
    gradients: int = 0
    read: int = 0

    def __add__(self, other: Looked) -> Looked:
        """Of both."""
        return Looked(*map(operator.add, astuple(self), astuple(other)))


class RowIndependence:
    """The second look at every batch of a run, by one process.

    Holds the input of the run's first row, and what a forward pass of two groups without gradients takes.

    Args:
        plan: the model, the data and how to featurize.
        group: rows that are computed together; of 1, only what changes from call to call is looked for.

    Attributes:
        looked: how many rows were looked at.
    """

    def __init__(self, plan: Plan, group: int) -> None:
        self._plan, self._group = plan, group
        self.looked = Looked()
        self._first: tuple[int, Inputs, Tensor] | None = None
        self._alone, self._read, self._gradients = (_Allowance(share) for share in (ALONE, READ, GRADIENTS))

    def gradient_audit(self, groups: Sequence[Inputs], spans: Sequence[range], classes: int) -> GradientAudit | None:
        """Begin an audit of one row's gradient, where one is due.

        Args:
            groups: inputs of the batch by groups, on the device.
            spans: which rows they are.
            classes: c of the blocks.

        Returns:
            The audit, which is to see every block; or None.
        """
        if not self._gradients.rows(1):
            return None
        with self._gradients.spent_on(1):
            audit = GradientAudit(self._plan, groups, spans, self._draw(spans[0]), classes)
        self.looked.gradients += 1
        return audit

    def look(
        self,
        inputs: Inputs,
        labels: np.ndarray,
        groups: Sequence[Inputs],
        rows: range,
        logits: Tensor,
        audit: GradientAudit | None,
        absent: np.ndarray | None = None,
    ) -> SecondLook:
        """Compute logits again and read inputs again.

        Args:
            inputs: of the batch, as they were read.
            labels: of the batch.
            groups: its inputs by groups, on the device.
            rows: which rows it has.
            logits: of the batch, [n, classes], on the device.
            audit: of the batch, which has seen its blocks.
            absent: rows that are left out, [n]; None for none.

        Returns:
            What is to be judged; queued on a GPU, but for an audit, which waits for it.

        Raises:
            ProjectError: a row reads differently the second time, or the model fails.
        """
        draw = self._draw(rows)
        self._read_again(inputs, labels, rows, draw)
        seen = SecondLook(logits.detach().float(), rows, self._plan.engine.rounding(logits), absent)
        if self._plan.device.type != "cpu":
            inputs = joined_rows(groups)
        alone = self._some_alone(seen, inputs, draw)
        if self._group > 1 and alone < len(rows):
            self._all_beside_others(seen, inputs)
        if len(seen.there):  # of which it is known how large logits are
            self._first_again(seen, inputs)
        if audit is not None and (absent is None or not absent[audit.row - rows.start]):
            seen.add([audit.row - rows.start], audit.logits[None], "alone, where gradients are on")
            seen.add_gradient(audit.compare())
        return seen

    def _draw(self, rows: range) -> np.random.Generator:
        return np.random.default_rng((self._plan.settings.seed, rows.start))

    def _read_again(self, inputs: Inputs, labels: np.ndarray, rows: range, draw: np.random.Generator) -> None:
        count = self._read.rows(len(rows))
        with self._read.spent_on(count):
            for i in draw.permutation(len(rows))[:count]:
                self._plan.examples.require_same(rows[i], take(inputs, slice(i, i + 1)), int(labels[i]))
        self.looked.read += count

    def _some_alone(self, seen: SecondLook, inputs: Inputs, draw: np.random.Generator) -> int:
        """Compute as many rows alone as the time allows; how many that were."""
        count = self._alone.rows(len(seen.rows))
        chosen = np.sort(draw.permutation(len(seen.rows))[:count]).tolist()
        with self._alone.spent_on(count):
            found = self._plan.engine.logits([take(inputs, slice(i, i + 1)) for i in chosen])
        if found:
            seen.add(chosen, torch.cat(found), "alone" if self._group > 1 else "the second time")
        self.looked.alone += count
        return count

    def _all_beside_others(self, seen: SecondLook, inputs: Inputs) -> None:
        n = length(inputs)
        shares = min(n, max(2, -(-n // (2 * self._group))))
        places = [slice(first, n, shares) for first in range(shares)]
        found = self._plan.engine.logits([take(inputs, place) for place in places])
        for place, logits in zip(places, found, strict=True):
            seen.add(list(range(n))[place], logits, "beside other rows")
        self.looked.beside_others += n

    def _first_again(self, seen: SecondLook, inputs: Inputs) -> None:
        if self._first is None:
            i = int(seen.there[0])
            some = slice(i, i + 1)
            self._first = seen.rows[i], joined_rows([take(inputs, some)]), seen.logits[some].clone()
            return
        row, example, stored = self._first
        (found,) = self._plan.engine.logits([example])
        seen.comparisons.append(
            Again((row,), range(row, row + 1), stored, found, seen.typical, seen.tolerance, "than when this run began")
        )


class _Allowance:
    """Seconds that a check may take: a share of those since the run began, after the first rows.

    On a GPU they are seconds of the host, which queues the work.
    """

    def __init__(self, share: float) -> None:
        self._share, self._began = share, time.perf_counter()
        self._spent = self._each = 0.0
        self._checked = 0

    def rows(self, most: int) -> int:
        """How many rows may be checked now."""
        if self._checked < _AT_FIRST:
            return min(most, _AT_FIRST - self._checked)
        left = self._share * (time.perf_counter() - self._began) - self._spent
        return max(0, min(most, int(left / max(self._each, 1e-9))))

    @contextmanager
    def spent_on(self, rows: int) -> Iterator[None]:
        """Count the seconds of the body, in which so many rows are checked."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._spent += seconds
        self._checked += rows
        if rows:
            self._each = seconds / rows
