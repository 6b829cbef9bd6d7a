"""Queries without a store: a few rows of a project, featurized on the spot with a training store's own settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from gradstore.errors import UsageError
from gradstore.featurization.batch import row_columns
from gradstore.featurization.plan import Plan
from gradstore.featurization.settings import Settings
from gradstore.indices import RowChoice, chosen_rows
from gradstore.machine.byte_counts import format_bytes
from gradstore.model.project import Project
from gradstore.store.files.digests import row_digests
from gradstore.store.files.manifest import Manifest
from gradstore.store.rows import Rows


class FreshRows(Rows):
    """Rows that were featurized but never stored; whatever reads a store's rows can read them.

    Position i holds row `rows[i]` of the split. Holds all rows as they would be stored, and copies what is read.
    """

    _kind = "were featurized on the spot"

    def __init__(
        self, manifest: Manifest, columns: Mapping[str, np.ndarray], poisoned: np.ndarray | None = None
    ) -> None:
        self.where, self.split = f"{manifest.split} of the project", manifest.split
        self.schema, self.classes, self.fingerprint = manifest.schema, manifest.classes, manifest.fingerprint
        self.identity = manifest.identity
        self._of, self._poisoned = manifest.n, poisoned
        columns = manifest.schema.completed(columns)
        self._columns = {**columns, "digest": row_digests(manifest.schema, columns)}

    def __len__(self) -> int:
        """Rows at hand."""
        return len(self._columns["row"])

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in memory."""
        return sum(column.nbytes for column in self._columns.values())

    def read(
        self, start: int, stop: int, *, out: Mapping[str, np.ndarray] | None = None, check: bool = True
    ) -> dict[str, np.ndarray]:
        """Every column of positions start:stop, copied; see `Rows.read`."""
        self._require_range(start, stop)
        data = self.schema.empty(stop - start) if out is None else out
        for name in data:
            np.copyto(data[name][: stop - start], self._columns[name][start:stop])
        return {name: array[: stop - start] for name, array in data.items()}

    def gather(self, rows: np.ndarray, out: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every column of scattered positions int64 [r], ascending, copied; see `Rows.gather`."""
        if len(rows):
            self._require_range(int(rows[0]), int(rows[-1]) + 1)
        data = {name: array[: len(rows)] for name, array in out.items()}
        for name, array in data.items():
            np.take(self._columns[name], rows, axis=0, out=array, mode="clip")  # "raise" would take them twice
        return data

    def stream(
        self, start: int, stop: int, columns: Mapping[str, np.ndarray], room: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Features of positions start:stop, a few rows at a time, copied; see `Rows.stream`."""
        self._require_range(start, stop)
        for name, column in columns.items():
            np.copyto(column[: stop - start], self._columns[name][start:stop])
        for at in range(start, stop, len(room)):
            part = self._columns["features"][at : min(at + len(room), stop)]
            np.copyto(room[: len(part)], part)
            yield at, room[: len(part)]

    @property
    def poisoned(self) -> np.ndarray | None:
        """Which rows are poisoned, bool [n], or None where the project does not say."""
        return self._poisoned

    def card(self) -> dict[str, str]:
        """What the rows are, for people."""
        rows = f"{self.split}, {len(self)} of {self._of} rows, featurized on the spot"
        return {**super().card(), "split": rows, "size": f"{format_bytes(self.nbytes)} in memory"}

    def column(self, name: str) -> np.ndarray:
        """One small dataset of all rows, copied."""
        return self._columns[name].copy()


def featurize_queries(
    project: Project,
    train: Rows,
    *,
    split: str,
    rows: RowChoice | None = None,
    device: str = "auto",
    memory: int | str = "auto",
    alone: bool = False,
) -> FreshRows:
    """Featurize some rows of a split as queries of a training store, with its projection, layout and dtype.

    Rows are computed in the fixed groups of `featurize`, so they have the bits that a stored query set has. Computes
    the whole group, up to 64 rows, around each row that is wanted.

    Args:
        project: the model and data.
        train: the training store, or any rows, for their settings.
        split: name of the split.
        rows: wanted rows of the split, as indices in this order or a bool mask; default all.
        device: "auto", "cpu", "cuda" or "cuda:<index>".
        memory: bytes for activations, Jacobian blocks and features, beside the model and the result; "auto" as for
            `featurize`.
        alone: compute each example by itself, as in a store that was made so.

    Returns:
        The rows in memory, [m, c, K], which whatever takes `Rows` takes.

    Raises:
        UsageError: a row that the split does not have, no row at all, or too little memory.
        MismatchError: the training store was imported, so that nothing can be featurized like it.
        ProjectError, NonFiniteError: as `featurize`.

    Example:
        >>> queries = gs.featurize_queries(project, train, split="test", rows=[3])
        >>> gs.topk(train, queries).indices.shape
        (1, 5)
    """
    plan = Plan(project, split, Settings.of(train.identity, where=train.where), device, memory, alone=alone)
    n, group = plan.manifest.n, plan.manifest.group
    wanted = chosen_rows(rows, n, where="--rows", what="query row")
    if not wanted.size:
        raise UsageError("no query row is chosen", where="--rows", expected="at least one")
    starts = np.unique(wanted // group) * group
    spans = [range(int(start), min(int(start) + group, n)) for start in starts]
    kept = plan.manifest.schema.empty(len(wanted))
    del kept["digest"]  # is made of the others
    for span, columns in zip(spans, row_columns(plan, spans), strict=True):
        places = np.flatnonzero((wanted >= span.start) & (wanted < span.stop))
        found = plan.manifest.schema.completed(columns)
        for name, room in kept.items():
            room[places] = found[name][wanted[places] - span.start]
    mask = project.poisoned_mask(split)
    return FreshRows(plan.manifest, kept, None if mask is None else mask[wanted])
