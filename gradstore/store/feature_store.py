"""`FeatureStore`: a read-only handle on a store; opens files briefly, reads by position, checks every row's digest.

A handle holds a path and the manifest, so it can be pickled; it needs no lock and sees only published shards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from gradstore.errors import CorruptError, UsageError
from gradstore.machine.byte_counts import format_bytes
from gradstore.store.annotations import Annotations, read_annotations
from gradstore.store.files.digests import THREADS, PartedDigests, row_digests
from gradstore.store.files.disk import Disk, MissingFileError
from gradstore.store.files.manifest import Manifest
from gradstore.store.files.manifest_file import read_manifest
from gradstore.store.files.shard_file import VERIFY, ShardFile
from gradstore.store.rows import Rows
from gradstore.store.schema import EXCLUDED

if TYPE_CHECKING:
    from typing_extensions import Self

_SPAN_BYTES = 8 << 20  # what one thread reads and hashes at a time


def open(path: str | os.PathLike[str], *, verify: bool = True) -> FeatureStore:
    """Open the store at `path` for reading (`gradstore.open`).

    Args:
        path: the directory that `gradstore featurize` wrote.
        verify: check the digest of every row read. Turn it off only after `gradstore verify`.

    Returns:
        The store; it holds no open file.

    Raises:
        UsageError: there is no store at `path`.
        CorruptError: its manifest is not what was written. Shards are checked when they are first read.

    Example:
        >>> gs.open("stores/train").features[0].shape
        (10, 10240)
    """
    return FeatureStore(path, verify=verify)


class FeatureStore(Rows):
    """One split of one project, featurized with one projection, on the disk; see `Rows` for what it holds and reads.

    Attributes:
        path: its directory.
        verify: whether the digest of every row is checked when it is read.
        disk: where bytes come from.
        manifest: what it is and which shards it has, as it was opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True, disk: Disk | None = None) -> None:
        self.path = Path(path)
        self.verify = verify
        self.disk = disk or Disk()
        self.manifest: Manifest = read_manifest(self.path, self.disk)
        self.where, self.split = str(self.path), self.manifest.split
        self.schema = self.manifest.schema
        self.identity, self.fingerprint = self.manifest.identity, self.manifest.fingerprint
        self._files: dict[int, ShardFile] = {}
        self._digests: dict[int, np.ndarray] = {}

    # -- what it is ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rows that can be read: those before the first missing shard."""
        missing = self.manifest.missing
        return self.manifest.n if not missing else missing[0] * self.manifest.shard_rows

    def __eq__(self, other: object) -> bool:
        """Whether another handle is on the same rows of the same store."""
        return (
            isinstance(other, FeatureStore)
            and self.path.resolve() == other.path.resolve()
            and self.manifest == other.manifest
        )

    def __hash__(self) -> int:
        """Of the place."""
        return hash(self.path.resolve())

    @property
    def complete(self) -> bool:
        """Whether every row of the split is stored."""
        return not self.manifest.missing

    @property
    def nbytes(self) -> int:
        """Bytes of all published shards."""
        return sum(shard.size for shard in self.manifest.shards)

    @property
    def source(self) -> str:
        """The whole path of the store."""
        return str(self.path.resolve())

    def require_complete(self) -> Self:
        """This store, if no row is missing; see `Rows.require_complete`."""
        if self.complete:
            return self
        spans = [self.manifest.rows_of(i) for i in self.manifest.missing]
        listed = ", ".join(f"{r.start}:{r.stop}" for r in spans[:5]) + (" …" if len(spans) > 5 else "")
        raise UsageError(
            "the store is unfinished",
            where=self.path,
            expected=f"{self.manifest.n} rows",
            got=f"rows {listed} missing",
            hint="Run the same `gradstore featurize` command again to continue",
        )

    def require_stored(self, what: str) -> FeatureStore:
        """This store itself."""
        return self

    # -- what is said of it --------------------------------------------------------------------------------------

    @cached_property
    def annotations(self) -> Annotations:
        """Labels, poison marks and names that were given after the rows were computed; read on first use."""
        return read_annotations(self.path, self.manifest, self.disk)

    @cached_property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the classes, as annotations have them or the project had."""
        return self.annotations.classes or self.manifest.classes

    @property
    def note(self) -> str:
        """What people noted of the store."""
        return self.annotations.note

    @cached_property
    def labels(self) -> np.ndarray:
        """True classes, int64 [n]; see `Rows.labels`."""
        said = self.annotations.labels
        if said is None:
            return self.column("label")
        said = said[: len(self)]
        return said if len(said) == len(self) else np.concatenate([said, self.column("label")[len(said) :]])

    @cached_property
    def poisoned(self) -> np.ndarray | None:
        """Which rows are poisoned, bool [n], or None where that is not known; rows appended later are not marked."""
        said = self.annotations.poisoned
        if said is None:
            return self.column("poisoned").astype(bool) if self.schema.truth else None
        return np.pad(said[: len(self)], (0, max(0, len(self) - len(said))))

    @cached_property
    def absent(self) -> np.ndarray:
        """Why a row is not there, as it was stored or annotations say; see `Rows.absent`."""
        stored, said = super().absent, self.annotations.excluded
        if said is None:
            return stored
        excluded = np.pad(said[: len(self)], (0, max(0, len(self) - len(said))))
        return np.where((stored == 0) & excluded, EXCLUDED, stored).astype(np.uint8)

    # -- reading -------------------------------------------------------------------------------------------------

    def read(
        self, start: int, stop: int, *, out: Mapping[str, np.ndarray] | None = None, check: bool = True
    ) -> dict[str, np.ndarray]:
        """Every column of rows start:stop as stored, by several threads where they are many; see `Rows.read`."""
        self._require_range(start, stop)
        new = self.schema.empty(stop - start) if out is None else out
        data = {name: array[: stop - start] for name, array in new.items()}
        step = max(1, _SPAN_BYTES // self.schema.row_bytes)
        jobs = []
        for index, low, high in self._spans(start, stop, step):
            at = index * self.manifest.shard_rows + low - start
            jobs.append((index, low, {name: array[at : at + high - low] for name, array in data.items()}))
        # Reading and hashing both release the interpreter lock, so one span is read while another is hashed.
        if len(jobs) <= 1:
            for job in jobs:
                self._read_span(*job, check=check)
        else:
            with ThreadPoolExecutor(THREADS + 1) as pool:
                list(pool.map(lambda job: self._read_span(*job, check=check), jobs))
        return data

    def gather(self, rows: np.ndarray, out: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every column of scattered rows as stored, digests checked; see `Rows.gather`."""
        data = {name: array[: len(rows)] for name, array in out.items()}
        if len(rows):
            self._require_range(int(rows[0]), int(rows[-1]) + 1)
        shards = rows // self.manifest.shard_rows
        for index in np.unique(shards).tolist():
            at = slice(*np.searchsorted(shards, (index, index + 1)))
            views = {name: array[at] for name, array in data.items()}
            here = rows[at] - index * self.manifest.shard_rows
            with self._shard(index) as file:
                file.gather(here, views)
            if self.verify:
                self._require_digests(file, here, row_digests(self.schema, views, threads=1))
        return data

    def stream(
        self, start: int, stop: int, columns: Mapping[str, np.ndarray], room: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Features of rows start:stop as stored, a few at a time, digests checked; see `Rows.stream`."""
        self._require_range(start, stop)
        for index, low, high in self._spans(start, stop, max(1, stop - start)):
            first = index * self.manifest.shard_rows
            views = {name: array[first + low - start : first + high - start] for name, array in columns.items()}
            with self._shard(index) as file:
                checked: PartedDigests | None = None
                for at, features in file.stream(low, high, views, room):
                    if self.verify:
                        checked = checked or PartedDigests(self.schema, views)
                        found = checked.of(at - low, features)
                        self._require_digests(file, slice(at, at + len(found)), found)
                    yield first + at, features

    def column(self, name: str) -> np.ndarray:
        """One small column of all readable rows."""
        if not len(self):
            return self.schema.empty(0)[name]
        column, size = self.schema.column(name), self.manifest.shard_rows
        values = np.empty((len(self), *column.shape), column.dtype)
        for index in range(-(-len(self) // size)):
            with self._shard(index) as file:
                values[index * size : (index + 1) * size] = file.column(name)
        return values

    def shard_file(self, index: int) -> ShardFile:
        """The published shard `index` on the disk."""
        if index not in self._files:
            self._files[index] = ShardFile(self.path, self.manifest, index, self.disk)
        return self._files[index]

    def _spans(self, start: int, stop: int, rows: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, last) in rows of the shard, at most `rows` at a time."""
        size = self.manifest.shard_rows
        at = start
        while at < stop:
            low = at % size
            high = min(low + rows, low + stop - at, size)
            yield at // size, low, high
            at += high - low

    def _read_span(self, index: int, low: int, views: Mapping[str, np.ndarray], *, check: bool) -> None:
        with self._shard(index) as file:
            file.fill(low, views)
        if self.verify and check:
            found = row_digests(self.schema, views, threads=1)
            self._require_digests(file, slice(low, low + len(found)), found)

    @contextmanager
    def _shard(self, index: int) -> Iterator[ShardFile]:
        """A shard whose digests are known; where it is gone meanwhile, that is explained."""
        file = self.shard_file(index)
        try:
            if index not in self._digests:
                self._digests[index] = file.check()
            yield file
        except MissingFileError:
            self._require_unchanged()
            raise

    def _require_digests(self, file: ShardFile, rows: slice | np.ndarray, found: np.ndarray) -> None:
        """Digests uint8 [rows, 16] of these rows of the shard are those that were written."""
        bad = np.flatnonzero((found != self._digests[file.index][rows]).any(axis=1))
        if bad.size:
            row = np.arange(self.manifest.shard_rows)[rows][bad[0]]
            raise CorruptError(
                f"row {file.index * self.manifest.shard_rows + row} does not match its digest",
                where=file.path,
                got=f"{bad.size} damaged of {len(found)} rows read",
                hint=VERIFY,
            )

    def _require_unchanged(self) -> None:
        """A handle sees the store as it was opened; appending removes the short last shard that it knew."""
        if read_manifest(self.path, self.disk) != self.manifest:
            raise UsageError("the store has changed since it was opened", where=self.path, hint="Open it again")

    # -- manners -------------------------------------------------------------------------------------------------

    def __enter__(self) -> FeatureStore:
        """A store holds no open file, so leaving the block closes nothing."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""

    @property
    def shard_marks(self) -> tuple[tuple[int, str], ...]:
        """(rows, digest of the row digests) of every shard, by which an index knows the rows it was made of."""
        return tuple((shard.rows, shard.columns["digest"]) for shard in self.manifest.shards)

    def card(self) -> dict[str, str]:
        """What the store is, for people."""
        split = f"{self.split}, {self.manifest.n} rows" + ("" if self.complete else f", {len(self)} stored so far")
        size = f"{format_bytes(self.nbytes)} in {len(self.manifest.shards)} shards"
        return {**super().card(), "split": split, "size": size, "computed by": self._computed_by()}

    def _computed_by(self) -> str:
        """Which revisions of the computation made the rows, and which rows where there are several."""
        stretches = [
            (number, list(some)) for number, some in groupby(self.manifest.shards, key=lambda shard: shard.computation)
        ]
        if len(stretches) <= 1:
            return ", ".join(computation_name(number) for number, _ in stretches) or "nothing yet"
        spans = [
            (number, self.manifest.rows_of(some[0].index).start, self.manifest.rows_of(some[-1].index).stop - 1)
            for number, some in stretches
        ]
        return "; ".join(f"rows {first} to {last}: {computation_name(number)}" for number, first, last in spans)


def computation_name(number: int) -> str:
    """What people are told of `Shard.computation`."""
    return f"revision {number}" if number else "a revision that was not put down"
