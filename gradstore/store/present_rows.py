"""The rows of a store that are there, where some are absent: what searches and fits go over.

An absent row keeps its place: row i of a store is example i of its split, whatever became of others. So a result speaks
of places in the store, and what is computed within goes over the present rows one after another; `Rows.present_at` says
where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np
from blake3 import blake3

from gradstore.errors import UsageError
from gradstore.store.feature_store import FeatureStore
from gradstore.store.rows import Rows
from gradstore.store.schema import REASONS


def present_rows(rows: Rows) -> Rows:
    """The rows that are there, one after another (`gradstore.present_rows`); the same handle where none is absent.

    Whatever takes a store takes them; a search, a fit or an evaluation of a store goes over them by itself, and speaks
    of places in the store.

    Args:
        rows: a store, or any `Rows`.

    Returns:
        A handle on them; their `rows` say which of the split they are. Holds 8 bytes a row.

    Example:
        >>> from gradstore.store.present_rows import present_rows
        >>> present_rows(train) is train  # where none is absent
        True
    """
    if not rows.absent.any():
        return rows
    return PresentStore(rows) if isinstance(rows, FeatureStore) else PresentRows(rows)


def require_present(rows: Rows, wanted: np.ndarray, *, where: str) -> None:
    """Refuse rows that are absent, which have no features to speak of.

    Args:
        rows: a store, or any `Rows`.
        wanted: int64, some of them.
        where: who asks, for the error.

    Raises:
        UsageError: names the first that is absent, and why it is.
    """
    gone = np.flatnonzero(rows.absent[wanted])
    if gone.size:
        row = int(wanted[gone[0]])
        raise UsageError(
            f"row {int(rows.rows[row])} is absent: {REASONS.get(int(rows.absent[row]), 'no reason is known')}",
            where=where,
            expected="rows that are there",
            got=f"{gone.size} of {len(wanted)} are absent",
            hint="Ask for others; `gradstore info` lists the absent ones",
        )


class PresentRows(Rows):
    """The rows of others that are there, one after another; reads them a stretch at a time.

    Args:
        whole: rows of which some are absent.
        at: int64, ascending, the places of those that are read; default all that are there.
    """

    _kind = "are some of a store's"

    def __init__(self, whole: Rows, at: np.ndarray | None = None) -> None:
        self._whole, self._at = whole, whole.present_at if at is None else at
        for name in ("where", "split", "schema", "identity", "fingerprint"):
            setattr(self, name, getattr(whole, name))

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the classes."""
        return self._whole.classes

    def __len__(self) -> int:
        """Rows that are there."""
        return len(self._at)

    def __eq__(self, other: object) -> bool:
        """Whether they are those of the same rows."""
        return isinstance(other, PresentRows) and self._whole == other._whole and np.array_equal(self._at, other._at)

    def __hash__(self) -> int:
        """Of the rows that they are of."""
        return hash(self._whole)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows where they are kept."""
        return self._whole.nbytes

    def part(self, row: int) -> tuple[Rows, int]:
        """The store that a row is from, and its position there."""
        self._require_range(row, row + 1)
        return self._whole.part(int(self._at[row]))

    def read(
        self, start: int, stop: int, *, out: Mapping[str, np.ndarray] | None = None, check: bool = True
    ) -> dict[str, np.ndarray]:
        """Every column of rows start:stop; see `Rows.read`."""
        self._require_range(start, stop)
        data = {name: a[: stop - start] for name, a in (out or self.schema.empty(stop - start)).items()}
        for low, high, at in self._stretches(start, stop):
            views = {name: array[low - start : high - start] for name, array in data.items()}
            self._whole.read(at, at + high - low, out=views, check=check)
        return data

    def gather(self, rows: np.ndarray, out: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every column of scattered rows; see `Rows.gather`."""
        if len(rows):
            self._require_range(int(rows[0]), int(rows[-1]) + 1)
        return self._whole.gather(self._at[rows], out)

    def stream(
        self, start: int, stop: int, columns: Mapping[str, np.ndarray], room: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Features of rows start:stop, a few rows at a time; see `Rows.stream`."""
        self._require_range(start, stop)
        for low, high, at in self._stretches(start, stop):
            views = {name: array[low - start : high - start] for name, array in columns.items()}
            for first, features in self._whole.stream(at, at + high - low, views, room):
                yield low + first - at, features

    def column(self, name: str) -> np.ndarray:
        """One small column of the rows that are there."""
        return self._whole.column(name)[self._at]

    @property
    def absent(self) -> np.ndarray:
        """None of them is."""
        return np.zeros(len(self), np.uint8)

    @cached_property
    def labels(self) -> np.ndarray:
        """True classes; see `Rows.labels`."""
        return self._whole.labels[self._at]

    @cached_property
    def poisoned(self) -> np.ndarray | None:
        """Which rows are poisoned, or None where that is not known."""
        known = self._whole.poisoned
        return None if known is None else known[self._at]

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(first, one past the last, place of the first in the whole) of rows that follow one another there."""
        at = self._at[start:stop]
        ends = [*(np.flatnonzero(np.diff(at) != 1) + 1).tolist(), len(at)]
        low = 0
        for high in ends if len(at) else []:
            yield start + low, start + high, int(at[low])
            low = high


class PresentStore(PresentRows, FeatureStore):
    """The same of a store on the disk, beside whose shards an index of them is kept."""

    def __init__(self, whole: FeatureStore) -> None:
        PresentRows.__init__(self, whole)
        self.path, self.verify, self.disk, self.manifest = whole.path, whole.verify, whole.disk, whole.manifest

    @property
    def source(self) -> str:
        """None by which to open just these rows again."""
        return ""

    @cached_property
    def shard_marks(self) -> tuple[tuple[int, str], ...]:
        """How many rows are there, and a digest of which and of what is stored, of each shard."""
        marks = []
        for shard, (_, digest) in zip(self.manifest.shards, super().shard_marks, strict=True):
            rows = self.manifest.rows_of(shard.index)
            there = self._at[slice(*np.searchsorted(self._at, (rows.start, rows.stop)))]
            marks.append((len(there), blake3(digest.encode() + there.tobytes()).hexdigest()))
        return tuple(marks)
