"""What a feature file contains: every dataset with its shape, dtype and meaning, and the header that says so.

A shard is plain HDF5 (libver v110, so its metadata is checksummed): contiguous datasets aligned to 4096 bytes,
no filters, no links. Its header is composed in memory and written once; libhdf5 never has the file on disk open
while rows are written, and gradstore reads rows by position, so a malformed header is never parsed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import h5py
import numpy as np

FORMAT = "gradstore"
FORMAT_VERSION = 1
PAGE = 4096
DTYPES = ("float16", "float32", "int8")
LAYOUTS = ("per-class", "sum")
BULK = ("features", "preview")  # datasets too large to be held for all rows at once


@dataclass(frozen=True)
class Column:
    """One dataset of a shard: `shape` is that of a single row, so the dataset has shape [n, *shape]."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: str
    meaning: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Schema:
    """The shape of a store's rows.

    Attributes:
        c: class axis of the features: the number of logits, or 1 in layout "sum".
        K: projected dimension.
        classes: number of logits.
        dtype: dtype of the stored features.
        preview: shape of one row's picture or text in uint8, () for none.
        truth: whether it is known which rows are poisoned.
    """

    c: int
    K: int
    classes: int
    dtype: str = "float16"
    preview: tuple[int, ...] = ()
    truth: bool = False

    @property
    def columns(self) -> tuple[Column, ...]:
        """Every dataset in the order of the file; `digest` covers the bytes of all the others."""
        rows = [
            ("features", (self.c, self.K), self.dtype, "n c K", "P g^c / sqrt(K), divided by scale"),
            ("scale", (self.c,), "float32", "n c", "factor that restores the features"),
            ("sq_norm", (self.c,), "float32", "n c", "exact squared norm of g^c before projection"),
            ("logits", (self.classes,), "float32", "n classes", "outputs of the network"),
            ("label", (), "int64", "n", "true class, -1 where there is none"),
            ("row", (), "int64", "n", "index in the split"),
            ("norm", (self.c,), "float64", "n c", "norm of the features as stored, scale included"),
        ]
        if self.truth:
            rows.append(("poisoned", (), "uint8", "n", "1 where the example is poisoned"))
        if self.preview:
            rows.append(("preview", self.preview, "uint8", "n ...", "picture, or UTF-8 text padded with zeros"))
        rows.append(("digest", (16,), "uint8", "n 16", "first 16 bytes of SHA-256 over the row in the datasets above"))
        return tuple(Column(name, shape, np.dtype(dtype), axes, meaning) for name, shape, dtype, axes, meaning in rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in all datasets."""
        return sum(column.row_bytes for column in self.columns)


@dataclass(frozen=True)
class ShardLayout:
    """Where things are in a shard of a given number of rows.

    Attributes:
        size: bytes of the whole file.
        offsets: position of each dataset's first byte.
        header: (position, bytes) pieces that hold everything but the rows.
    """

    size: int
    offsets: Mapping[str, int]
    header: tuple[tuple[int, bytes], ...]


def shard_layout(schema: Schema, rows: int, attributes: Mapping[str, str | int]) -> ShardLayout:
    """Compose the HDF5 header of a shard in memory; holds a few kilobytes, whatever the number of rows."""
    image = _SparseImage()
    offsets = {}
    with h5py.File(
        image, "w", libver=("v110", "v110"), alignment_threshold=1, alignment_interval=PAGE
    ) as file:
        for name, value in {"format": FORMAT, "version": FORMAT_VERSION, **attributes}.items():
            _set_attribute(file, name, value)
        for column in schema.columns:
            dataset = _create_contiguous(file, column, rows)
            _set_attribute(dataset, "axes", column.axes)
            _set_attribute(dataset, "meaning", column.meaning)
            offsets[column.name] = dataset.id.get_offset()
    size = max(image.size, *(offsets[column.name] + rows * column.row_bytes for column in schema.columns))
    return ShardLayout(size, offsets, image.pieces())


def _create_contiguous(file: h5py.File, column: Column, rows: int) -> h5py.Dataset:
    """A dataset whose place is fixed now and whose bytes HDF5 never touches."""
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
        view[:] = bytes(len(view))
        for start, data in self._writes:
            low, high = max(start, self._at), min(start + len(data), self._at + len(view))
            if low < high:
                view[low - self._at : high - self._at] = data[low - start : high - start]
        self._at += len(view)
        return len(view)

    def pieces(self) -> tuple[tuple[int, bytes], ...]:
        """Non-overlapping (position, bytes), ascending, later writes winning."""
        edges = sorted({edge for start, data in self._writes for edge in (start, start + len(data))})
        found = []
        for low, high in zip(edges, edges[1:], strict=False):
            if any(start <= low and high <= start + len(data) for start, data in self._writes):
                piece = bytearray(high - low)
                self.seek(low)
                self.readinto(piece)
                found.append((low, bytes(piece)))
        return tuple(found)
