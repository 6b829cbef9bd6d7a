"""A published shard written anew: under another name, listed in place of the old file, which is removed last.

Whatever ends this in between, the store is whole: the manifest lists the one file or the other, and the next writer
removes the one that it does not list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from gradstore.errors import CorruptError
from gradstore.store.files.shard_file import VERIFY, ShardFile
from gradstore.store.store_writer import StoreWriter

Columns = Mapping[str, np.ndarray]


def rewrite_shard(writer: StoreWriter, index: int, together: int, change: Callable[[range, Columns], Columns]) -> None:
    """Write a shard anew.

    Args:
        writer: of the store.
        index: of a shard that is listed.
        together: rows that are read and changed at a time.
        change: what is to be stored of some rows, given what is; called in order.

    Raises:
        CorruptError: a row does not match its digest; nothing is changed.
        NoSpaceError: the disk has no room for a second copy of the shard.
    """
    manifest = writer.manifest
    rows, file = manifest.rows_of(index), ShardFile(writer.path, manifest, index, writer.disk)
    digests = file.check()
    with writer.shard(index) as new:
        for start in range(0, len(rows), together):
            some = slice(start, min(start + together, len(rows)))
            stored = manifest.schema.empty(some.stop - start)
            file.fill(start, stored)
            damaged = file.damaged(stored, digests[some])
            if damaged.size:
                row = rows[start + int(damaged[0])]
                raise CorruptError(f"row {row} does not match its digest", where=file.path, hint=VERIFY)
            new.write(change(rows[some], stored))


def absent_of(writer: StoreWriter, index: int) -> np.ndarray:
    """Why rows of a listed shard are absent, uint8; see `gradstore.store.schema.REASONS`."""
    manifest = writer.manifest
    if not manifest.schema.has_inputs:
        return np.zeros(len(manifest.rows_of(index)), np.uint8)
    return ShardFile(writer.path, manifest, index, writer.disk).column("absent")
