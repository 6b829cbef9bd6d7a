"""`StoreWriter`: shards are written under a temporary name and published whole; a row counts only after that."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.disk import Disk
from gradstore.errors import NoSpaceError, UsageError
from gradstore.fingerprint import require_same
from gradstore.lock import LOCK, writer_lock
from gradstore.manifest import MANIFEST, Manifest, Shard, read_manifest, write_manifest
from gradstore.schema import BULK, ShardLayout, shard_layout
from gradstore.store import header_digest, row_digests

RUN_LOG = "run.jsonl"


class StoreWriter:
    """The one writer of a store; made by `open_writer`, which holds the lock.

    Attributes:
        manifest: what is published so far.
    """

    def __init__(self, path: Path, manifest: Manifest, disk: Disk) -> None:
        self.path = path
        self.manifest = manifest
        self.disk = disk
        self._layouts: dict[int, ShardLayout] = {}

    @property
    def bytes_missing(self) -> int:
        """Bytes that the missing shards will take."""
        return sum(self._layout(len(self.manifest.rows_of(i))).size for i in self.manifest.missing)

    def require_space(self) -> None:
        """Refuse to start what the disk cannot hold.

        Raises:
            NoSpaceError: fewer bytes are free than the missing shards take.
        """
        need, free = self.bytes_missing, self.disk.free_bytes(self.path)
        if need > free:
            raise NoSpaceError(
                "the store does not fit the disk",
                where=self.path,
                expected=f"{need / 1e9:.2f} GB free",
                got=f"{free / 1e9:.2f} GB",
                hint="Choose another --out, a smaller --proj-dim, --dtype int8, or --layout sum",
            )

    @contextmanager
    def shard(self, index: int) -> Iterator[ShardWriter]:
        """Write shard `index`; it is published when the block ends, and removed when the block raises."""
        rows = len(self.manifest.rows_of(index))
        layout = self._layout(rows)
        final = self.path / Shard(index, rows, 0, {}, "", {}).file
        temporary = self.path / f".{final.name}.tmp"
        try:
            with self.disk.create(temporary, layout.size) as fd:
                writer = ShardWriter(self, index, layout, fd, temporary)
                yield writer
                shard = writer.finish()
            self.disk.publish(temporary, final)
        except BaseException:
            self.disk.remove(temporary)
            raise
        self.manifest = self.manifest.with_shard(shard)
        write_manifest(self.path, self.manifest, self.disk)

    def log(self, **event: Any) -> None:
        """Add one line to the run log, which is a record for people and no part of the store's identity."""
        with (self.path / RUN_LOG).open("a") as file:
            file.write(json.dumps(event) + "\n")

    def _layout(self, rows: int) -> ShardLayout:
        if rows not in self._layouts:
            attributes = {"fingerprint": self.manifest.fingerprint, "split": self.manifest.split}
            self._layouts[rows] = shard_layout(self.manifest.schema, rows, attributes)
        return self._layouts[rows]


class ShardWriter:
    """Rows of one shard, written at their final positions in ascending order."""

    def __init__(self, store: StoreWriter, index: int, layout: ShardLayout, fd: int, path: Path) -> None:
        self._store, self._layout, self._fd, self._path = store, layout, fd, path
        self._index = index
        self._rows = store.manifest.rows_of(index)
        self._next = self._rows.start
        self._sums = {c.name: hashlib.sha256() for c in store.manifest.schema.columns if c.name not in BULK}
        for position, data in layout.header:
            store.disk.write(fd, data, position, path)

    def write(self, columns: Mapping[str, np.ndarray]) -> None:
        """Write the next rows: every dataset but `digest`, each [rows, ...] in its stored shape and dtype."""
        schema = self._store.manifest.schema
        data = {**columns, "digest": row_digests(schema, columns)}
        rows = len(data["row"])
        if not np.array_equal(data["row"], np.arange(self._next, self._next + rows)) or self._next + rows > self._rows.stop:
            raise ValueError(f"rows of shard {self._index} come in order from {self._next}")
        for column in schema.columns:
            array = np.ascontiguousarray(data[column.name])
            if array.dtype != column.dtype or array.shape != (rows, *column.shape):
                raise ValueError(f"/{column.name} is {array.dtype} {array.shape}, not {column.dtype} {(rows, *column.shape)}")
            offset = self._layout.offsets[column.name] + (self._next - self._rows.start) * column.row_bytes
            if array.nbytes:
                self._store.disk.write(self._fd, memoryview(array).cast("B"), offset, self._path)
            if column.name in self._sums:
                self._sums[column.name].update(array)
        self._next += rows

    def finish(self) -> Shard:
        """Put the shard on the medium and describe it."""
        if self._next != self._rows.stop:
            raise ValueError(f"shard {self._index} ends at row {self._next}, not {self._rows.stop}")
        disk, schema = self._store.disk, self._store.manifest.schema
        disk.sync(self._fd)
        columns = {name: total.hexdigest() for name, total in self._sums.items()}
        shard = Shard(self._index, len(self._rows), self._layout.size, self._layout.offsets, "", columns)
        return replace(shard, header=header_digest(disk, self._fd, self._path, schema, shard))


@contextmanager
def open_writer(path: Path, plan: Manifest, disk: Disk | None = None) -> Iterator[StoreWriter]:
    """Create the store that `plan` describes, or continue it, as its only writer.

    Args:
        path: directory of the store; created where missing.
        plan: what the store shall be. Of a store that exists, the row groups and shard size are kept as they are.
        disk: where bytes go.

    Raises:
        UsageError: `path` exists and is not a store.
        MismatchError: `path` is a store of another identity; the difference is listed field by field.
        LockedError: another process is writing it.
    """
    disk = disk or Disk()
    _require_store_or_nothing(path)
    path.mkdir(parents=True, exist_ok=True)
    with writer_lock(path):
        if (path / MANIFEST).exists():
            manifest = read_manifest(path, disk)
            require_same(manifest.identity, plan.identity, where=path, theirs="the store", ours="this run")
        else:
            manifest = plan
            write_manifest(path, manifest, disk)
        for leftover in [*path.glob(".shard-*.h5.tmp"), path / f".{MANIFEST}.tmp"]:
            disk.remove(leftover)
        yield StoreWriter(path, manifest, disk)


def _require_store_or_nothing(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError("the output exists and is not a directory", where=path, hint="Choose another --out")
    if not path.exists() or (path / MANIFEST).exists():
        return
    ours = {LOCK, RUN_LOG}
    foreign = [n for n in sorted(os.listdir(path)) if n not in ours and not (n.startswith(".") and n.endswith(".tmp"))]
    if foreign:
        raise UsageError(
            "the output exists and is not a gradstore store",
            where=path,
            got=f"it contains {', '.join(foreign[:5])}",
            hint="Choose another --out; nothing was touched",
        )
