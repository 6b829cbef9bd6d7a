"""What a second look at a batch has found, judged once it is there: on a GPU that is later, and in another thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import NonFiniteError, ProjectError
from gradstore.featurization.gradient_audit import GradientComparison
from gradstore.machine.cuda_streams import to_host


class SecondLook:
    """Logits of a batch, and what they and some gradients were the second time.

    Args:
        logits: that are about to be stored, float32 [n, classes].
        rows: which rows of the split they are.
        tolerance: relative difference that rounding may make.
        absent: rows that are left out, of which nothing is asked, [n]; None for none.
    """

    def __init__(self, logits: Tensor, rows: Sequence[int], tolerance: float, absent: np.ndarray | None = None) -> None:
        self.logits, self.rows, self.tolerance = logits, rows, tolerance
        self.there = np.flatnonzero(np.ones(len(rows)) if absent is None else absent == 0)
        norms = torch.linalg.vector_norm(logits if absent is None else logits[self.there], dim=1, dtype=torch.float64)
        self.typical = norms.square().mean().sqrt()
        self.comparisons: list[Again | GradientComparison] = []

    def add(self, places: Sequence[int], found: Tensor, how: str) -> None:
        """Note logits [r, classes] of the rows at these places of the batch; `how` ends "has other logits …"."""
        if len(self.there) < len(self.rows):
            there = set(self.there.tolist())
            kept = [k for k, place in enumerate(places) if place in there]
            places, found = [places[k] for k in kept], found[kept]
            if not kept:
                return
        rows = tuple(self.rows[i] for i in places)
        stored = torch.stack([self.logits[i] for i in places])  # an index would be copied, and a GPU waited for
        self.comparisons.append(Again(rows, self.rows, stored, found, self.typical, self.tolerance, how))

    def add_gradient(self, comparison: GradientComparison) -> None:
        """Note a gradient."""
        self.comparisons.append(comparison)

    def require_finite(self, split: str) -> None:
        """Refuse logits that are NaN or infinite.

        Raises:
            NonFiniteError: names the first row that has one.
        """
        (logits,) = to_host(self.logits)
        bad = torch.nonzero(~torch.isfinite(logits[self.there]))
        if len(bad):
            i, c = int(self.there[bad[0, 0]]), int(bad[0, 1])
            raise NonFiniteError(
                f"logit {c} of row {self.rows[i]} is not finite",
                where=f"split {split!r}",
                expected="finite logits",
                got=float(logits[i, c]),
                hint="Look at this row's input; a NaN input, a log of zero or an overflow are the usual causes; "
                "featurize --on-bad-row skip leaves such rows out",
            )

    def require(self, split: str) -> None:
        """Refuse a batch of which a row is not what it is alone.

        Raises:
            ProjectError: a row depends on others, on its turn, or on when it is computed.
        """
        for comparison in self.comparisons:
            comparison.require(split)


@dataclass(frozen=True)
class Again:
    """Logits of some rows, computed a second time; perhaps still under way.

    Attributes:
        rows: of the split.
        batch: the rows that were computed with them.
        stored: what is about to be stored, [r, classes].
        found: the second time.
        typical: norm of a row's logits, [].
        tolerance: relative difference that rounding may make.
        how: what was other the second time, such as "alone".
    """

    rows: tuple[int, ...]
    batch: Sequence[int]
    stored: Tensor
    found: Tensor
    typical: Tensor
    tolerance: float
    how: str

    def require(self, split: str) -> None:
        """Refuse logits that are others the second time.

        Raises:
            ProjectError: names the row that differs most, its batch and the difference.
        """
        stored, found, typical = (part.double() for part in to_host(self.stored, self.found, self.typical))
        allowed = self.tolerance * (torch.linalg.vector_norm(stored, dim=1) + typical)
        excess = torch.linalg.vector_norm(stored - found, dim=1) - allowed
        if bool((excess <= 0).all()):
            return
        i = int(excess.nan_to_num(torch.inf).argmax())
        c = int((stored[i] - found[i]).abs().nan_to_num(torch.inf).argmax())
        raise ProjectError(
            f"row {self.rows[i]} has other logits {self.how}",
            where=f"split {split!r}, rows {self.batch[0]} to {self.batch[-1]} at once",
            expected=f"{float(stored[i, c]):.6g} for class {c} again, to {float(allowed[i]):.1g}",
            got=f"{float(found[i, c]):.6g}",
            hint="The model looks at its batch, or its state changes from call to call; where it is the batch, "
            "--alone, or alone=True, computes each example by itself",
        )
