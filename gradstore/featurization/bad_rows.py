"""Rows that cannot be stored: unreadable ones, and those whose logits or gradient are not finite, or gradient zero.

They stop a run, or keep their place and are left out. A row is left out only where it is bad by itself: one that is bad
beside others and well alone shows a model that looks at its batch, which is refused like any other such.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import ProjectError, UsageError
from gradstore.jacobians.subject import take
from gradstore.machine.cuda_streams import to_host
from gradstore.model.examples import Inputs
from gradstore.store.files.manifest import Manifest
from gradstore.store.schema import NOT_FINITE, REASONS, REMOVED, UNREADABLE, ZERO

if TYPE_CHECKING:
    from gradstore.featurization.plan import Plan

ON_BAD_ROW = ("stop", "skip")
"""What becomes of a run that meets one."""


def skips(on_bad_row: str) -> bool:
    """Whether bad rows are left out.

    Returns:
        True for "skip", False for "stop".

    Raises:
        UsageError: another word.
    """
    if on_bad_row not in ON_BAD_ROW:
        expected = f"one of {', '.join(ON_BAD_ROW)}"
        raise UsageError("unknown answer to a bad row", where="--on-bad-row", expected=expected, got=on_bad_row)
    return on_bad_row == "skip"


class BadRows:
    """Which rows of a batch are left out.

    Args:
        plan: the model.
        manifest: of the store; says which rows were removed.
        on_bad_row: one of `ON_BAD_ROW`.

    Raises:
        UsageError: another word, or a store of a version that has no absent rows.
    """

    def __init__(self, plan: Plan, manifest: Manifest, on_bad_row: str = "stop") -> None:
        if skips(on_bad_row) and not manifest.schema.has_inputs:
            raise UsageError(
                "a store of this version cannot leave rows out",
                where="--on-bad-row",
                expected="version 3 of the format",
                got=f"version {manifest.schema.version}",
                hint="Begin a store of its own",
            )
        self._plan, self._manifest, self._skipping = plan, manifest, skips(on_bad_row)

    def reasons(
        self, rows: range, logits: Tensor, sq_norm: Tensor, groups: Sequence[Inputs], spans: Sequence[range]
    ) -> np.ndarray | None:
        """Why rows of a batch are left out.

        Args:
            rows: of the batch.
            logits: [n, classes]; where rows may be skipped, a GPU is waited for.
            sq_norm: ‖g‖², float64 [n, c].
            groups: inputs by groups, on the device.
            spans: which rows they are.

        Returns:
            uint8 [n], 0 for a row that is stored; None where all are.

        Raises:
            ProjectError: a row is bad in its batch and not alone.
        """
        found = np.where(self._manifest.removed_of(rows), REMOVED, 0).astype(np.uint8)
        unreadable = [i for i, row in enumerate(rows) if row in self._plan.examples.unreadable]
        found[unreadable] = np.where(found[unreadable], found[unreadable], UNREADABLE)
        if self._skipping:
            for i in np.flatnonzero((judged := _judged(logits, sq_norm)) * (found == 0)):
                number = next(n for n, span in enumerate(spans) if rows[i] in span)
                place = rows[i] - spans[number].start
                self._require_bad_alone(rows[i], take(groups[number], slice(place, place + 1)), int(judged[i]))
                found[i] = judged[i]
        return found if found.any() else None

    def _require_bad_alone(self, row: int, example: Inputs, reason: int) -> None:
        stream = self._plan.engine(example)
        logits = stream.logits
        sq_norm = torch.stack([block.sq_norm() for block in stream]).sum(dim=0)
        if _judged(logits, sq_norm)[0] == reason:
            return
        raise ProjectError(
            f"row {row} cannot be stored, since {REASONS[reason]}, but only beside other rows",
            where=f"split {self._plan.split!r}",
            expected="the same alone",
            hint="The model looks at its batch; --alone, or alone=True, computes each example by itself",
        )


def _judged(logits: Tensor, sq_norm: Tensor) -> np.ndarray:
    """Why each row cannot be stored, uint8 [n]; 0 where it can."""
    found, norms = (part.numpy() for part in to_host(logits.detach().float(), sq_norm))
    finite = np.isfinite(found).all(axis=1) & np.isfinite(norms).all(axis=1)
    zero = (norms == 0).all(axis=1)
    return np.where(finite, np.where(zero, ZERO, 0), NOT_FINITE).astype(np.uint8)


def is_retried(absent: np.ndarray) -> np.ndarray:
    """Which rows may be computed after all, bool [n]: those that were left out, not those that were removed."""
    return (absent != 0) & (absent != REMOVED)
