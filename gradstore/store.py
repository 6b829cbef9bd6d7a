"""`FeatureStore`: a read-only handle on a store; opens files briefly, reads by position, checks every row's digest.

A handle holds a path and the manifest, so it can be pickled to workers; it needs no lock and sees only published shards.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.disk import Disk
from gradstore.encoding import decode
from gradstore.errors import CorruptError, UsageError
from gradstore.manifest import Manifest, Shard, read_manifest
from gradstore.schema import Schema

if TYPE_CHECKING:
    import torch

_VERIFY = "Run `gradstore verify` on the store to list the damaged rows"


def open_store(path: str | os.PathLike[str], *, verify: bool = True) -> FeatureStore:
    """Open the store at `path` for reading (`gradstore.open`).

    Args:
        path: the directory that `gradstore featurize` wrote.
        verify: check the SHA-256 digest of every row read. Turn it off only after `gradstore verify`.

    Raises:
        UsageError: there is no store at `path`.
        CorruptError: its manifest, or the size of a shard, is not what was written.
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
        self._checked: set[int] = set()

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

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def features(self) -> Features:
        """Lazy features; `store.features[i:j]` is float32 [j - i, c, K]."""
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
    def sq_norms(self) -> np.ndarray:
        """Exact ‖g^c‖² before projection, float32 [n, c]."""
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

    def read(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Every column of rows start:stop as stored, digests checked.

        Returns:
            name of the dataset -> array [stop - start, ...] in its stored dtype. Holds just these arrays.

        Raises:
            CorruptError: a row does not match its digest, or a shard its manifest; names the rows.
        """
        if not 0 <= start <= stop <= len(self):
            raise UsageError("rows out of range", where=self.path, expected=f"within 0:{len(self)}", got=f"{start}:{stop}")
        data = {c.name: np.empty((stop - start, *c.shape), c.dtype) for c in self.schema.columns}
        for shard, low, high in self._spans(start, stop):
            base = shard.index * self.manifest.shard_rows
            views = {name: array[base + low - start : base + high - start] for name, array in data.items()}
            self._read_shard(shard, low, views)
        return data

    def blocks(self, rows: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(first row, columns) over the whole store, `rows` at a time; holds one block."""
        for start in range(0, len(self), rows):
            yield start, self.read(start, min(start + rows, len(self)))

    def dataset(self) -> torch.utils.data.Dataset:
        """A torch Dataset of (features float32 [c, K], label)."""
        from gradstore.torch_dataset import FeatureDataset

        return FeatureDataset(self)

    def damaged_rows(self, shard: Shard) -> np.ndarray:
        """Rows of one shard whose bytes do not match their digest; all of them when the shard cannot be read at all."""
        span = self.manifest.rows_of(shard.index)
        views = {c.name: np.empty((shard.rows, *c.shape), c.dtype) for c in self.schema.columns}
        try:
            self._fill(shard, 0, views)
            self._check_shard(shard)
        except (CorruptError, OSError):
            return np.arange(span.start, span.stop)
        return span.start + np.flatnonzero(~_digests_match(self.schema, views))

    def _spans(self, start: int, stop: int) -> Iterator[tuple[Shard, int, int]]:
        """(shard, first, last) in rows of the shard."""
        size = self.manifest.shard_rows
        by_index = {shard.index: shard for shard in self.manifest.shards}
        for index in range(start // size, -(-stop // size) if stop > start else start // size):
            base = index * size
            yield by_index[index], max(start - base, 0), min(stop - base, by_index[index].rows)

    def _read_shard(self, shard: Shard, low: int, views: Mapping[str, np.ndarray]) -> None:
        if shard.index not in self._checked:
            self._check_shard(shard)
        self._fill(shard, low, views)
        if self.verify:
            bad = np.flatnonzero(~_digests_match(self.schema, views))
            if bad.size:
                first = shard.index * self.manifest.shard_rows + low
                raise CorruptError(
                    f"row {first + bad[0]} does not match its digest",
                    where=self.path / shard.file,
                    got=f"{bad.size} damaged of {len(views['row'])} rows read",
                    hint=_VERIFY,
                )

    def _fill(self, shard: Shard, low: int, views: Mapping[str, np.ndarray]) -> None:
        path = self.path / shard.file
        with self.disk.open(path) as fd:
            for column in self.schema.columns:
                view = views[column.name]
                if view.nbytes:
                    offset = shard.offsets[column.name] + low * column.row_bytes
                    self.disk.read_into(fd, memoryview(view).cast("B"), offset, path)

    def _check_shard(self, shard: Shard) -> None:
        """Size, header and digests of a shard, once for each handle, before any of its rows is used."""
        path = self.path / shard.file
        try:
            with self.disk.open(path) as fd:
                size = os.fstat(fd).st_size
                if size != shard.size:
                    raise CorruptError("the file has another size", where=path, expected=shard.size, got=size, hint=_VERIFY)
                if header_digest(self.disk, fd, path, self.schema, shard) != shard.header:
                    raise CorruptError("the header is not what was written", where=path, hint=_VERIFY)
        except OSError as error:
            raise CorruptError("the shard cannot be read", where=path, got=error.strerror, hint=_VERIFY) from error
        self.shard_column(shard, "digest")
        self._checked.add(shard.index)

    def shard_column(self, shard: Shard, name: str) -> np.ndarray:
        """One small column of one shard, checked as a whole."""
        path = self.path / shard.file
        column = next(c for c in self.schema.columns if c.name == name)
        data = np.empty((shard.rows, *column.shape), column.dtype)
        with self.disk.open(path) as fd:
            self.disk.read_into(fd, memoryview(data).cast("B"), shard.offsets[name], path)
        if hashlib.sha256(data).hexdigest() != shard.columns[name]:
            raise CorruptError(f"the dataset /{name} is not what was written", where=path, hint=_VERIFY)
        return data

    def _column(self, name: str) -> np.ndarray:
        """One small column of all readable rows."""
        shards = [shard for shard, _, _ in self._spans(0, len(self))]
        if not shards:
            column = next(c for c in self.schema.columns if c.name == name)
            return np.empty((0, *column.shape), column.dtype)
        for shard in shards:
            if shard.index not in self._checked:
                self._check_shard(shard)
        return np.concatenate([self.shard_column(shard, name) for shard in shards])

    # -- manners -------------------------------------------------------------------------------------------------

    def __enter__(self) -> FeatureStore:
        """A store holds no open file, so leaving the block closes nothing."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing to close."""

    def card(self) -> dict[str, str]:
        """What the store is, for people."""
        projection = self.identity["projection"]
        n, c, K = self.shape
        return {
            "split": f"{self.manifest.split}, {self.manifest.n} rows" + ("" if self.complete else f", {n} stored so far"),
            "features": f"[{n}, {c}, {K}] {self.schema.dtype}, {self.nbytes / 1e9:.2f} GB in {len(self.manifest.shards)} shards",
            "projection": f"{projection['kind']}, K = {projection['K']}, seed {projection['seed']}, version {projection['version']}",
            "parameters": f"{self.identity['parameters']['count']:,} in {len(self.identity['parameters']['blocks'])} tensors",
            "layout": str(self.identity["layout"]),
            "classes": ", ".join(self.classes[:10]) + (" …" if len(self.classes) > 10 else ""),
            "poisoned": "not known" if self.poisoned is None else f"{int(self.poisoned.sum())} rows",
            "fingerprint": self.fingerprint,
        }

    def __repr__(self) -> str:
        """Path, shape and projection on one line."""
        card = self.card()
        return f"FeatureStore({str(self.path)!r}: {card['features']}; {card['projection']})"

    def _repr_html_(self) -> str:
        """The card as a table for notebooks."""
        from html import escape

        rows = "".join(f"<tr><th style='text-align:left'>{k}</th><td>{escape(v)}</td></tr>" for k, v in self.card().items())
        return f"<table><caption>{escape(str(self.path))}</caption>{rows}</table>"


class Features:
    """Lazy [n, c, K] view of a store's features; indexing reads float32."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self.shape = store.shape
        self.dtype = np.dtype("float32")

    def __len__(self) -> int:
        """Rows."""
        return self.shape[0]

    def __getitem__(self, key: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 features: [c, K] for an integer, [rows, c, K] for a slice or an array of rows."""
        n = self.shape[0]
        if isinstance(key, slice):
            start, stop, step = key.indices(n)
            if step == 1:
                return self._decoded(start, max(stop, start))
            return self[np.arange(start, stop, step)]
        if isinstance(key, (int, np.integer)):
            row = int(key) + (n if key < 0 else 0)
            return self._decoded(row, row + 1)[0]
        rows = np.asarray(key)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        if rows.size == 0:
            return np.empty((0, *self.shape[1:]), np.float32)
        return np.stack([self[int(row)] for row in rows])

    def _decoded(self, start: int, stop: int) -> np.ndarray:
        data = self._store.read(start, stop)
        return decode(data["features"], data["scale"]).numpy()


def header_digest(disk: Disk, fd: int, path: Path, schema: Schema, shard: Shard) -> str:
    """SHA-256 of every byte of a shard that belongs to no dataset."""
    digest = hashlib.sha256()
    at = 0
    extents = sorted((shard.offsets[c.name], shard.offsets[c.name] + shard.rows * c.row_bytes) for c in schema.columns)
    for start, stop in [*extents, (shard.size, shard.size)]:
        gap = bytearray(start - at)
        disk.read_into(fd, memoryview(gap), at, path)
        digest.update(gap)
        at = stop
    return digest.hexdigest()


def row_digests(schema: Schema, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """First 16 bytes of SHA-256 over each row's bytes in every dataset but `digest`, uint8 [n, 16].

    Rows are spread over two threads or more: hashing releases the interpreter lock.
    """
    views = [np.ascontiguousarray(columns[c.name]) for c in schema.columns if c.name != "digest"]
    n = len(views[0])
    flat = [view.reshape(n, -1).view(np.uint8) for view in views]
    out = np.empty((n, 16), np.uint8)

    def hash_rows(span: range) -> None:
        for i in span:
            digest = hashlib.sha256()
            for view in flat:
                digest.update(view[i])
            out[i] = np.frombuffer(digest.digest()[:16], np.uint8)

    workers = min(os.cpu_count() or 1, 8)
    step = -(-n // workers) if n * schema.row_bytes > 1 << 20 else n
    spans = [range(i, min(i + step, n)) for i in range(0, n, max(step, 1))]
    if len(spans) <= 1:
        hash_rows(range(n))
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(hash_rows, spans))
    return out


def _digests_match(schema: Schema, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    return (row_digests(schema, columns) == columns["digest"]).all(axis=1)
