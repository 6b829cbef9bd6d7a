"""How many rows are projected together: found by timing the run's own batches, halved where memory runs out.

Nothing of it reaches a stored bit: rows are always computed in the groups that the manifest fixes, and a batch is some
of them.
"""

from __future__ import annotations

_SLOWER = 1.1  # seconds a row, against the best so far, from which a larger batch is not tried further


class BatchSize:
    """Groups a batch. It begins with one group and doubles while rows do not become slower.

    Args:
        group: rows a group.
        most: groups that the memory allows.
        fixed: the user's batch size in rows, rounded down to whole groups; None finds it by timing.

    Attributes:
        groups: groups of the next batch.
    """

    def __init__(self, group: int, most: int, fixed: int | None = None) -> None:
        self._group, self._most = group, max(1, most)
        self._trying = fixed is None
        self._seconds: dict[int, float] = {}
        self.groups = 1 if fixed is None else max(1, fixed // group)

    @property
    def rows(self) -> int:
        """Rows of the next batch."""
        return self._group * self.groups

    def took(self, rows: int, seconds: float) -> None:
        """Learn from a batch; batches cut short by the end of a shard tell nothing."""
        if not self._trying or rows != self.rows:
            return
        self._seconds[self.groups] = seconds / rows
        best = min(self._seconds, key=lambda groups: self._seconds[groups])
        larger = 2 * self.groups
        if larger <= self._most and self._seconds[self.groups] <= _SLOWER * self._seconds[best]:
            self.groups = larger
        else:
            self.groups, self._trying = best, False

    def halve(self) -> bool:
        """Go on with half as many groups and look no further; False where there is one already."""
        if self.groups == 1:
            return False
        self.groups, self._trying = max(1, self.groups // 2), False
        return True
