"""Where the datasets of a shard lie, and the HDF5 header that says so.

A shard is plain HDF5 (libver v110, so its metadata is checksummed): contiguous datasets aligned to 4096 bytes,
no filters, no links. Its header is composed in memory and written once; libhdf5 never has the file on disk open
while rows are written, and gradstore reads rows by position, so a malformed header is never parsed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from gradstore.store.files.uninterrupted import uninterrupted
from gradstore.store.schema import FORMAT, Column, Schema

if TYPE_CHECKING:
    import h5py

PAGE = 4096


@dataclass(frozen=True)
class ShardLayout:
    """Where things are in a shard of a given number of rows.

    Attributes:
        size: bytes of the whole file.
        offsets: position of each dataset's first byte.
        header: (position, bytes) pieces that hold everything but the rows; zeros between them.
        digest: SHA-256 of every byte that belongs to no dataset.
    """

    size: int
    offsets: Mapping[str, int]
    header: tuple[tuple[int, bytes], ...]
    digest: str


@lru_cache(maxsize=64)
def shard_layout(schema: Schema, rows: int, fingerprint: str, split: str) -> ShardLayout:
    """Compose the header of a shard in memory: a few kilobytes, whatever the number of rows.

    The same arguments give the same bytes under one version of HDF5, at any time and place.

    Returns:
        Where things are, and the header.
    """
    attributes: dict[str, str | int] = {
        "format": FORMAT,
        "version": schema.version,
        "fingerprint": fingerprint,
        "split": split,
    }
    return file_layout(schema.columns, rows, attributes)


def file_layout(columns: Sequence[Column], rows: int, attributes: Mapping[str, str | int]) -> ShardLayout:
    """The same for any datasets that share their first axis."""
    import h5py  # when a header is composed: what only opens stores need not wait for it

    image = _SparseImage()
    offsets = {}
    options = {"libver": ("v110", "v110"), "alignment_threshold": 1, "alignment_interval": PAGE}
    with uninterrupted(), h5py.File(image, "w", **options) as file:  # HDF5 calls the image's methods
        for name, value in attributes.items():
            _set_attribute(file, name, value)
        for column in columns:
            dataset = _create_contiguous(file, column, rows)
            _set_attribute(dataset, "axes", column.axes)
            _set_attribute(dataset, "meaning", column.meaning)
            offsets[column.name] = dataset.id.get_offset()
    size = max(image.size, *(offsets[column.name] + rows * column.row_bytes for column in columns))
    digest = hashlib.sha256()
    for start, stop in gaps(columns, rows, offsets, size):
        digest.update(image.between(start, stop))
    return ShardLayout(size, offsets, image.pieces(), digest.hexdigest())


def gaps(columns: Sequence[Column], rows: int, offsets: Mapping[str, int], size: int) -> Iterable[tuple[int, int]]:
    """(start, stop) of every stretch of a file that belongs to no dataset, ascending."""
    at = 0
    for start, length in sorted((offsets[c.name], rows * c.row_bytes) for c in columns):
        yield at, start
        at = start + length
    yield at, size


def _create_contiguous(file: h5py.File, column: Column, rows: int) -> h5py.Dataset:
    """A dataset whose place is fixed now and whose bytes HDF5 never touches."""
    import h5py

    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_layout(h5py.h5d.CONTIGUOUS)
    options.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    options.set_obj_track_times(False)
    dtype = h5py.h5t.py_create(column.dtype)
    space = h5py.h5s.create_simple((rows, *column.shape))
    return h5py.Dataset(h5py.h5d.create(file.id, column.name.encode(), dtype, space, options))


def _set_attribute(owner: h5py.File | h5py.Dataset, name: str, value: str | int) -> None:
    """A fixed-length string or an integer: variable-length ones would need a heap that older readers trip over."""
    owner.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else np.int64(value)


class _SparseImage(io.RawIOBase):
    """A file that remembers only what was written to it, so a 256 MB shard's header costs kilobytes."""

    def __init__(self) -> None:
        self.size = 0
        self._at = 0
        self._writes: list[tuple[int, bytes]] = []

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        return self.size

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._writes.append((self._at, bytes(data)))
        self._at += len(data)
        self.size = max(self.size, self._at)
        return len(data)

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        view[:] = self.between(self._at, self._at + len(view))
        self._at += len(view)
        return len(view)

    def between(self, start: int, stop: int) -> bytes:
        """What was written to start:stop, later writes winning; zeros elsewhere."""
        found = bytearray(stop - start)
        for at, data in self._writes:
            low, high = max(at, start), min(at + len(data), stop)
            if low < high:
                found[low - start : high - start] = data[low - at : high - at]
        return bytes(found)

    def pieces(self) -> tuple[tuple[int, bytes], ...]:
        """Non-overlapping (position, bytes), ascending, later writes winning."""
        edges = sorted({edge for start, data in self._writes for edge in (start, start + len(data))})
        spans = pairwise(edges)
        return tuple(
            (low, self.between(low, high))
            for low, high in spans
            if any(start <= low and high <= start + len(data) for start, data in self._writes)
        )
