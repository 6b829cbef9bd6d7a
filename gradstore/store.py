"""`FeatureStore`: a read-only handle on a store; opens files briefly, reads by position, checks every row's digest.

A handle holds a path and the manifest, so it can be pickled; it needs no lock and sees only published shards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.errors import CorruptError, UsageError
from gradstore.features import Features
from gradstore.hashing import NAMES
from gradstore.memory import format_bytes
from gradstore.schema import Schema
from gradstore.storage.digests import THREADS, PartedDigests, row_digests
from gradstore.storage.disk import Disk, MissingFileError
from gradstore.storage.manifest import Manifest
from gradstore.storage.manifest_file import read_manifest
from gradstore.storage.shards import VERIFY, ShardFile

if TYPE_CHECKING:
    import torch

_SPAN_BYTES = 8 << 20  # what one thread reads and hashes at a time


def open_store(path: str | os.PathLike[str], *, verify: bool = True) -> FeatureStore:
    """Open the store at `path` for reading (`gradstore.open`).

    Args:
        path: the directory that `gradstore featurize` wrote.
        verify: check the digest of every row read. Turn it off only after `gradstore verify`.

    Raises:
        UsageError: there is no store at `path`.
        CorruptError: its manifest is not what was written. Shards are checked when they are first read.
    """
    return FeatureStore(path, verify=verify)


class FeatureStore:
    """One split of one project, featurized with one projection: n rows of features [c, K] and what belongs to them.

    `store.features[i:j]` reads float32 features [j - i, c, K]; the small columns (`labels`, `logits`, `norms`,
    `sq_norms`, `rows`, `poisoned`) are read whole on first use and hold some tens of bytes a row and class.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True, disk: Disk | None = None) -> None:
        self.path = Path(path)
        self.verify = verify
        self.disk = disk or Disk()
        self.manifest: Manifest = read_manifest(self.path, self.disk)
        self._files: dict[int, ShardFile] = {}
        self._digests: dict[int, np.ndarray] = {}

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def schema(self) -> Schema:
        """Shape of a row."""
        return self.manifest.schema

    def __len__(self) -> int:
        """Rows that can be read: those before the first missing shard."""
        missing = self.manifest.missing
        return self.manifest.n if not missing else missing[0] * self.manifest.shard_rows

    @property
    def shape(self) -> tuple[int, int, int]:
        """[n, c, K]."""
        return len(self), self.schema.c, self.schema.K

    @property
    def complete(self) -> bool:
        """Whether every row of the split is stored."""
        return not self.manifest.missing

    @property
    def identity(self) -> Mapping[str, Any]:
        """What must agree before rows of two stores may be compared."""
        return self.manifest.identity

    @property
    def fingerprint(self) -> str:
        """Digest of the identity without the data: equal for a training store and its query stores."""
        return self.manifest.fingerprint

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.manifest.classes

    @property
    def nbytes(self) -> int:
        """Bytes of all published shards."""
        return sum(shard.size for shard in self.manifest.shards)

    def require_complete(self) -> FeatureStore:
        """This store, if no row is missing.

        Raises:
            UsageError: rows are missing; names them and how to get them.
        """
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
        """This store, since it is one on the disk; rows in memory refuse, saying that `what` is kept beside a store."""
        return self

    def unchecked(self) -> FeatureStore:
        """A handle on the same rows that does not compare their digests, for who has read them once."""
        return FeatureStore(self.path, verify=False, disk=self.disk)

    def holds_same_rows(self, other: FeatureStore) -> bool:
        """Whether another handle is on the same rows of the same store."""
        return (
            type(other) is type(self)
            and self.path.resolve() == other.path.resolve()
            and self.manifest == other.manifest
        )

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def features(self) -> Features:
        """Features float32 [n, c, K] as an array that is read when it is indexed; see `Features`."""
        return Features(self)

    @cached_property
    def labels(self) -> np.ndarray:
        """True classes, int64 [n]; -1 where there is none."""
        return self._column("label")

    @cached_property
    def logits(self) -> np.ndarray:
        """Outputs of the network, float32 [n, classes]."""
        return self._column("logits")

    @cached_property
    def predicted(self) -> np.ndarray:
        """Predicted classes, int64 [n]; of a single logit 0 or 1; -1 where the logits are not known."""
        logits = self.logits
        found = (logits[:, 0] > 0).astype(np.int64) if logits.shape[1] == 1 else logits.argmax(axis=1)
        return np.where(np.isnan(logits).any(axis=1), -1, found)

    @cached_property
    def sq_norms(self) -> np.ndarray:
        """Exact ‖g^c‖² before projection, float64 [n, c]."""
        return self._column("sq_norm")

    @cached_property
    def norms(self) -> np.ndarray:
        """Norms of the features as stored, float64 [n, c]."""
        return self._column("norm")

    @cached_property
    def rows(self) -> np.ndarray:
        """Index of each row in the split, int64 [n]."""
        return self._column("row")

    @cached_property
    def poisoned(self) -> np.ndarray | None:
        """Which rows are poisoned, bool [n], or None where that is not known."""
        return self._column("poisoned").astype(bool) if self.schema.truth else None

    def preview(self, row: int) -> np.ndarray | str | None:
        """The picture (uint8 [H, W] or [H, W, 3]) or text that shows one row, if the store has any."""
        if not self.schema.preview:
            return None
        value = self.read(row, row + 1)["preview"][0]
        return value.tobytes().rstrip(b"\0").decode(errors="replace") if self.manifest.preview == "text" else value

    def read(self, start: int, stop: int, *, out: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Every column of rows start:stop as stored, digests checked.

        Args:
            start: first row.
            stop: one past the last row.
            out: arrays of at least stop - start rows to read into, such as `schema.empty` makes; default new ones.

        Returns:
            name of the dataset -> array [stop - start, ...] in its stored dtype. Holds just these arrays.

        Raises:
            CorruptError: a row does not match its digest, or a shard its manifest; names the rows.
        """
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
                self._read_span(*job)
        else:
            with ThreadPoolExecutor(THREADS + 1) as pool:
                list(pool.map(lambda job: self._read_span(*job), jobs))
        return data

    def gather(self, rows: np.ndarray, out: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every column of scattered rows as stored, digests checked, by the calling thread.

        Args:
            rows: int64 [r], distinct, ascending.
            out: arrays of at least r rows to read into, such as `schema.empty` makes.

        Returns:
            name of the dataset -> the first r rows of its array. A quarter of a megabyte more is held meanwhile.

        Raises:
            CorruptError: a row does not match its digest, or a shard its manifest; names the row.
        """
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
        """Features of rows start:stop as stored, a few rows at a time, digests checked, by the calling thread.

        For whoever is done with some rows before the next are read: these are still in the processor's cache, and a
        block of many rows is never held.

        Args:
            start: first row.
            stop: one past the last row.
            columns: arrays of at least stop - start rows for every dataset but the features, such as `schema.empty`
                makes; those of a row are filled before its features are given.
            room: array [r, c, K] in the stored dtype, overwritten by up to r rows after others.

        Yields:
            (first row, features [≤ r, c, K], a view of `room`).

        Raises:
            CorruptError: a row does not match its digest, or a shard its manifest; names the row.
        """
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

    def blocks(self, rows: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(first row, columns) over the whole store, `rows` at a time; holds one block.

        Each block is read into the arrays of the one before it: fresh memory would cost half as much as reading.
        """
        block = self.schema.empty(min(rows, len(self)))
        for start in range(0, len(self), rows):
            yield start, self.read(start, min(start + rows, len(self)), out=block)

    def dataset(self) -> torch.utils.data.Dataset:
        """A torch Dataset of (features float32 [c, K], label)."""
        from gradstore.torch_dataset import FeatureDataset

        return FeatureDataset(self)

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

    def _read_span(self, index: int, low: int, views: Mapping[str, np.ndarray]) -> None:
        with self._shard(index) as file:
            file.fill(low, views)
        if self.verify:
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

    def _require_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise UsageError(
                "rows out of range", where=self.path, expected=f"within 0:{len(self)}", got=f"{start}:{stop}"
            )

    def _require_unchanged(self) -> None:
        """A handle sees the store as it was opened; appending removes the short last shard that it knew."""
        if read_manifest(self.path, self.disk) != self.manifest:
            raise UsageError("the store has changed since it was opened", where=self.path, hint="Open it again")

    def _column(self, name: str) -> np.ndarray:
        """One small column of all readable rows."""
        if not len(self):
            return self.schema.empty(0)[name]
        parts = []
        for index in range(-(-len(self) // self.manifest.shard_rows)):
            with self._shard(index) as file:
                parts.append(file.column(name))
        return np.concatenate(parts)

    # -- manners -------------------------------------------------------------------------------------------------

    def __enter__(self) -> FeatureStore:
        """A store holds no open file, so leaving the block closes nothing."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""

    def card(self) -> dict[str, str]:
        """What the store is, for people."""
        projection, parameters = self.identity["projection"], self.identity["parameters"]
        n, c, K = self.shape
        card = {
            "split": f"{self.manifest.split}, {self.manifest.n} rows",
            "features": f"[{n}, {c}, {K}] {self.schema.dtype}",
            "size": f"{format_bytes(self.nbytes)} in {len(self.manifest.shards)} shards",
            "projection": "{kind}, K = {K}, seed {seed}, version {version}".format(**projection),
            "parameters": f"{parameters['count']:,} in {len(parameters['blocks'])} tensors",
            "layout": str(self.identity["layout"]),
            "format": f"version {self.schema.version}, rows under {NAMES[self.schema.version]}",
            "classes": ", ".join(self.classes[:10]) + (" …" if len(self.classes) > 10 else ""),
            "poisoned": "not known" if self.poisoned is None else f"{int(self.poisoned.sum())} rows",
            "fingerprint": self.fingerprint,
        }
        if not self.complete:
            card["split"] += f", {n} stored so far"
        return card

    def __repr__(self) -> str:
        """Path, shape and projection on one line."""
        n, c, K = self.shape
        shape = f"[{n}, {c}, {K}] {self.schema.dtype}"
        return f"{type(self).__name__}({str(self.path)!r}, {shape}, fingerprint {self.fingerprint[:8]}…)"

    def _repr_html_(self) -> str:
        """The card as a table for notebooks."""
        from html import escape

        rows = "".join(
            f"<tr><th style='text-align:left'>{k}</th><td>{escape(v)}</td></tr>" for k, v in self.card().items()
        )
        return f"<table><caption>{escape(str(self.path))}</caption>{rows}</table>"
