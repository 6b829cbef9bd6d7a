"""`remove`: take rows out of a store for good, as the law or a person may ask."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gradstore.errors import UsageError
from gradstore.indices import RowChoice, row_mask
from gradstore.machine.clock import now_utc
from gradstore.store.absent_rows import blanked
from gradstore.store.annotations import read_annotations, write_annotations
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.disk import Disk
from gradstore.store.rewrite import Columns, absent_of, rewrite_shard
from gradstore.store.schema import REMOVED
from gradstore.store.store_writer import StoreWriter, open_for_repair

_TOGETHER = 32 << 20  # bytes of rows that are held


def remove(
    store: str | os.PathLike[str],
    rows: RowChoice,
    *,
    lock: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    disk: Disk | None = None,
) -> FeatureStore:
    """Take rows out of a store for good (`gradstore.remove`): features, logits, labels, pictures, digests.

    The rows keep their places, empty and marked as removed; nothing counts them, and no later run computes them again.
    Their shards are written anew, 32 MB at a time, and published by rename, then the old files are deleted. Indexes are
    deleted, since they hold the rows' coordinates, and built again by who searches; a surrogate or a Gram matrix of the
    store as it was is refused from then on, and is the owner's to delete, as are copies and exports. What a file system
    or a medium keeps of deleted files is beyond this. Called again, it goes on where it was interrupted.

    Args:
        store: directory of the store.
        rows: which, as a bool mask [n] or indices.
        lock: how other writers are kept out; see `gradstore.store.files.lock.LOCKS`.
        progress: called with (shards looked at, shards).
        disk: where bytes go; for tests.

    Returns:
        The store as it now reads.

    Raises:
        UsageError: there is no store or no such row, or the format's version has no absent rows.
        LockedError: another process is writing the store.
        CorruptError: a shard with such a row is damaged; what was removed before stays removed.
        NoSpaceError: the disk has no room for a second copy of a shard.

    Example:
        >>> gs.remove("stores/old", [3, 5]).absent.nonzero()[0]
        array([3, 5])
    """
    path, disk = Path(store), disk or Disk()
    with open_for_repair(path, disk, lock) as writer:
        if not writer.manifest.schema.has_inputs:
            raise UsageError(
                "a store of this version has no absent rows",
                where=path,
                expected="version 3 of the format",
                got=f"version {writer.manifest.schema.version}",
                hint="Featurize the rows that are left into a new store, and delete this one",
            )
        gone = row_mask(rows, writer.manifest.n, where="--rows")
        writer.forget(_spans(gone | writer.manifest.removed_of(range(writer.manifest.n))))
        writer.remove_indexes()  # before the features: an index of rows that are gone would still show them
        _empty_shards(writer, progress)
        _forget_annotations(writer)
        writer.clean()
        writer.log(event="remove", at=now_utc(), rows=int(gone.sum()))
    return FeatureStore(path, disk=disk)


def _empty_shards(writer: StoreWriter, progress: Callable[[int, int], None] | None) -> None:
    manifest = writer.manifest
    together = max(1, _TOGETHER // manifest.schema.row_bytes)

    def empty(rows: range, stored: Columns) -> Columns:
        return blanked(stored, np.where(manifest.removed_of(rows), REMOVED, stored["absent"]).astype(np.uint8))

    for done, shard in enumerate(manifest.shards, 1):
        gone = manifest.removed_of(manifest.rows_of(shard.index))
        if gone.any() and (absent_of(writer, shard.index)[gone] != REMOVED).any():
            rewrite_shard(writer, shard.index, together, empty)
        if progress is not None:
            progress(done, len(manifest.shards))


def _forget_annotations(writer: StoreWriter) -> None:
    """Rows that are gone have no label and no mark."""
    said = read_annotations(writer.path, writer.manifest, writer.disk)
    values = {}
    for name, nothing in (("labels", -1), ("poisoned", False)):
        array = getattr(said, name)
        if array is not None:
            gone = writer.manifest.removed_of(range(len(array)))
            if (array[gone] != nothing).any():
                values[name] = np.where(gone, nothing, array).astype(array.dtype)
    if values:
        writer.require_lock()
        write_annotations(writer.path, writer.manifest, said.changed("removed rows", **values), writer.disk)


def _spans(mask: np.ndarray) -> tuple[tuple[int, int], ...]:
    """(first, one past the last) of every stretch."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return tuple((int(first), int(stop)) for first, stop in edges.reshape(-1, 2))
