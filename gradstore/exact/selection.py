"""Some examples of a split, in a given order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np

from gradstore.errors import UsageError
from gradstore.examples import Examples, Inputs
from gradstore.fingerprint import data_identity
from gradstore.project import Project


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
    def of(cls, project: Project, split: str, rows: Sequence[int] | np.ndarray | None) -> Selection:
        """All rows of a split, or those given.

        Raises:
            UsageError: there is no such split or row.
        """
        examples = project.examples(split)
        wanted = np.arange(len(examples)) if rows is None else np.asarray(rows, dtype=np.int64).reshape(-1)
        bad = wanted[(wanted < 0) | (wanted >= len(examples))]
        if bad.size or not wanted.size:
            got = int(bad[0]) if bad.size else "none"
            raise UsageError(f"no such row of split {split!r}", expected=f"0 to {len(examples) - 1}", got=got)
        return cls(examples, split, wanted)

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows)

    def read(self, span: range) -> Inputs:
        """Stacked inputs of the rows at some places of the selection."""
        return self.examples.read(self.rows[span.start : span.stop].tolist())[0]

    @cached_property
    def digest(self) -> str:
        """32 digits that stand for the data and the rows chosen from it."""
        content = {**data_identity(self.examples), "rows": sha256(self.rows.tobytes()).hexdigest()}
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
