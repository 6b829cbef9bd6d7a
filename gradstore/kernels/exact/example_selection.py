"""Some examples of a split, in a given order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np

from gradstore.errors import UsageError
from gradstore.indices import RowChoice, chosen_rows
from gradstore.model.examples import Examples, Inputs, input_digests
from gradstore.model.project import Project


@dataclass(frozen=True)
class Selection:
    """Rows of one split.

    Attributes:
        examples: the split.
        split: its name.
        rows: int64 [n].
    """

    examples: Examples
    split: str
    rows: np.ndarray

    @classmethod
    def of(cls, project: Project, split: str, rows: RowChoice | None, where: str) -> Selection:
        """All rows of a split, or those given by the argument `where`.

        Returns:
            The selection.

        Raises:
            UsageError: there is no such split or row, or no row is chosen.
        """
        examples = project.examples(split)
        wanted = chosen_rows(rows, len(examples), where=where, what=f"row of split {split!r}")
        if not wanted.size:
            raise UsageError(f"no row of split {split!r} is chosen", where=where, expected="at least one")
        return cls(examples, split, wanted)

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows)

    def read(self, span: range) -> Inputs:
        """Stacked inputs of the rows at some places of the selection."""
        return self.examples.read(self.rows[span.start : span.stop].tolist())[0]

    @cached_property
    def digest(self) -> str:
        """32 digits that stand for the inputs of the chosen rows, each of which is read for it."""
        digest = sha256()
        for row in self.rows:
            digest.update(input_digests(self.examples.read([int(row)])[0]).tobytes())
        return digest.hexdigest()[:32]
