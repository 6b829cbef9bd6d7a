"""Queries without a store: a few rows of a project, featurized on the spot with a training store's own settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gradstore.batch import row_columns
from gradstore.errors import UsageError
from gradstore.indices import Choice, chosen_rows
from gradstore.memory import parse_bytes
from gradstore.plan import Plan
from gradstore.project import Project
from gradstore.settings import Settings
from gradstore.storage.disk import Disk
from gradstore.store import FeatureStore


class FreshRows(FeatureStore):
    """Rows that were featurized but never stored; whatever reads a store's rows can read them.

    Position i holds row `rows[i]` of the split. Holds the features as they would be stored.
    """

    def __init__(self, plan: Plan, columns: Mapping[str, np.ndarray], path: Path) -> None:
        self.path, self.manifest, self.disk, self.verify = path, plan.manifest, Disk(), True
        self._columns = dict(columns)

    def __len__(self) -> int:
        """Rows at hand."""
        return len(self._columns["row"])

    def require_complete(self) -> FreshRows:
        """Nothing is missing of what was asked for."""
        return self

    def read(self, start: int, stop: int, *, out: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Every column of positions start:stop; views, or copies where `out` is given."""
        if not 0 <= start <= stop <= len(self):
            raise UsageError(
                "rows out of range", where=self.path, expected=f"within 0:{len(self)}", got=f"{start}:{stop}"
            )
        views = {name: column[start:stop] for name, column in self._columns.items()}
        if out is None:
            return views
        for name, view in views.items():
            np.copyto(out[name][: stop - start], view)
        return {name: out[name][: stop - start] for name in views}

    def _column(self, name: str) -> np.ndarray:
        return self._columns[name]


def featurize_queries(
    project: Project,
    train: FeatureStore,
    *,
    split: str,
    rows: Choice | None = None,
    device: str = "auto",
    memory: int | str = "2GB",
) -> FreshRows:
    """Featurize some rows of a split as queries of a training store, with its projection, layout and dtype.

    Rows are computed in the fixed groups of `featurize`, so they have the bits that a stored query set has. Computes
    the whole group, up to 64 rows, around each row that is wanted.

    Args:
        project: the model and data.
        train: the training store, for its settings.
        split: name of the split.
        rows: wanted rows of the split, as indices in this order or a bool mask; default all.
        device: "auto", "cpu", "cuda" or "cuda:<index>".
        memory: bytes for activations, Jacobian blocks and features, beside the model and the result.

    Raises:
        UsageError: a row that the split does not have, or too little memory.
        ProjectError, NonFiniteError: as `featurize`.
    """
    plan = Plan(project, split, Settings.of(train.identity, where=train.path), device, parse_bytes(memory))
    n, group = plan.manifest.n, plan.manifest.group
    wanted = chosen_rows(rows, n, where="--rows", what="query row")
    starts = np.unique(wanted // group) * group
    spans = [range(int(start), min(int(start) + group, n)) for start in starts]
    kept = plan.manifest.schema.empty(len(wanted))
    for span, columns in zip(spans, row_columns(plan, spans), strict=True):
        places = np.flatnonzero((wanted >= span.start) & (wanted < span.stop))
        for name, column in columns.items():
            kept[name][places] = column[wanted[places] - span.start]
    return FreshRows(plan, kept, Path(f"{split} of the project"))
