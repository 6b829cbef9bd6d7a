"""`ShardWriter`: the rows of one shard, written under a temporary name and published whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gradstore.store.files.digests import row_digests
from gradstore.store.files.disk import Disk
from gradstore.store.files.manifest import Manifest, Shard
from gradstore.store.schema import BULK, hash_of, raw

_UNHURRIED = 8 << 20  # bytes written before the system is asked to begin moving them to the medium


def temporary_of(path: Path) -> Path:
    """Where a shard is written before it has its name."""
    return path.with_name(f".{path.name}.tmp")


class ShardWriter:
    """Rows of one shard, written at their final positions in ascending order.

    Needs no lock and no manifest on the disk, so workers use it too. `libhdf5` never sees the file.

    Args:
        directory: the store.
        manifest: says what the shard shall hold.
        index: which shard.
        disk: where bytes go.
        fd: the file, already of its full size.
        computation: `Shard.computation` of new rows; a shard that is written anew keeps its own.

    Attributes:
        shard: what was written, known after `finish`.
    """

    shard: Shard

    def __init__(
        self, directory: Path, manifest: Manifest, index: int, disk: Disk, fd: int, computation: int = 0
    ) -> None:
        self.index = index
        earlier = manifest.shard(index)
        self._computation = computation if earlier is None else earlier.computation
        self._revision = revision_after(manifest, index)
        self.final = directory / manifest.name_of(index, self._revision)
        self.temporary = temporary_of(self.final)
        self._disk, self._fd = disk, fd
        self._schema, self._layout = manifest.schema, manifest.layout_of(index)
        self._rows = manifest.rows_of(index)
        self._next = self._rows.start
        self._fresh = 0
        self._sums = {c.name: hash_of(self._schema.version)() for c in self._schema.columns if c.name not in BULK}
        for position, data in self._layout.header:
            disk.write(fd, data, position, self.temporary)

    @property
    def full(self) -> bool:
        """Whether every row is written."""
        return self._next == self._rows.stop

    def write(self, columns: Mapping[str, np.ndarray], digests: np.ndarray | None = None) -> None:
        """Write the next rows.

        Args:
            columns: every dataset but `digest`, each [rows, ...] in its stored shape and dtype.
            digests: what `row_digests` gives for them, where it was called already.

        Raises:
            ValueError: rows out of order, or of another shape or dtype.
        """
        data = self._schema.completed(columns)
        data["digest"] = row_digests(self._schema, data) if digests is None else digests
        rows = len(data["row"])
        if (
            not np.array_equal(data["row"], np.arange(self._next, self._next + rows))
            or self._next + rows > self._rows.stop
        ):
            raise ValueError(f"rows of shard {self.index} come in order from {self._next}")
        for column in self._schema.columns:
            array = np.ascontiguousarray(data[column.name])
            if array.dtype != column.dtype or array.shape != (rows, *column.shape):
                raise ValueError(
                    f"/{column.name} is {array.dtype} {array.shape}, not {column.dtype} {(rows, *column.shape)}"
                )
            offset = self._layout.offsets[column.name] + (self._next - self._rows.start) * column.row_bytes
            self._disk.write(self._fd, raw(array), offset, self.temporary)
            if column.name in self._sums:
                self._sums[column.name].update(raw(array))
        self._next += rows
        self._fresh += rows * self._schema.row_bytes
        if self._fresh >= _UNHURRIED:
            self._disk.begin_sync(self._fd)
            self._fresh = 0

    def finish(self) -> None:
        """Put the shard on the medium and describe it."""
        if not self.full:
            raise ValueError(f"shard {self.index} ends at row {self._next}, not {self._rows.stop}")
        self._disk.sync(self._fd, self.temporary)
        columns = {name: total.hexdigest() for name, total in self._sums.items()}
        layout = self._layout
        self.shard = Shard(
            self.index,
            len(self._rows),
            layout.size,
            layout.offsets,
            layout.digest,
            columns,
            self._revision,
            self._computation,
        )


@contextmanager
def write_shard(
    directory: Path, manifest: Manifest, index: int, disk: Disk, computation: int = 0
) -> Iterator[ShardWriter]:
    """Write shard `index`: published under its final name when the block ends, removed when it raises.

    One that exists gets another name, so that it stays what it is until a manifest lists the new one.

    Yields:
        Takes the rows; after the block, its `shard` describes what was written.
    """
    temporary = temporary_of(directory / manifest.name_of(index, revision_after(manifest, index)))
    try:
        with disk.create(temporary, manifest.layout_of(index).size) as fd:
            writer = ShardWriter(directory, manifest, index, disk, fd, computation)
            yield writer
            writer.finish()
        disk.publish(temporary, writer.final)
    except BaseException:
        disk.try_remove(temporary)
        raise


def revision_after(manifest: Manifest, index: int) -> int:
    """The revision that a shard is written as: one more than a published one's."""
    shard = manifest.shard(index)
    return 0 if shard is None else shard.revision + 1
