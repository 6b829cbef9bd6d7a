"""Reading one shard: checks of its size, header and digests first, then plain positioned reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from gradstore.errors import CorruptError
from gradstore.store.files.digests import row_digests
from gradstore.store.files.disk import Disk
from gradstore.store.files.foreign_header import require_plain_hdf5
from gradstore.store.files.layout import gaps
from gradstore.store.files.manifest import Manifest, Shard
from gradstore.store.schema import BULK, hash_of, raw

# Bytes of a small column between two rows that are read with them, and of one such read: beyond, another costs less.
_NEAR, _TOGETHER = 8 << 10, 256 << 10
VERIFY = "Run `gradstore verify` on the store to list the damaged rows; `gradstore featurize` computes them again"


class ShardFile:
    """One published shard on the disk.

    Args:
        directory: the store.
        manifest: lists the shard.
        index: which one.
        disk: where bytes come from.
    """

    def __init__(self, directory: Path, manifest: Manifest, index: int, disk: Disk) -> None:
        self.path = directory / manifest.file_of(index)
        self.manifest, self.index, self.disk = manifest, index, disk
        self.schema = manifest.schema
        shard = manifest.shard(index)
        if shard is None:
            raise ValueError(f"shard {index} is not listed")
        self.shard: Shard = shard

    def check(self) -> np.ndarray:
        """Size, header and digest column, which together vouch for every byte of every row.

        Returns:
            the checked digests, uint8 [rows, 16].

        Raises:
            CorruptError: one of them is not what was written.
            UnsafeError: the header is not that of a plain gradstore shard, or the file is no regular file.
        """
        with self.disk.open(self.path) as fd:
            size = self.disk.stat(fd, self.path).st_size
            if size != self.shard.size:
                raise CorruptError(
                    "the file has another size", where=self.path, expected=self.shard.size, got=size, hint=VERIFY
                )
            if self._header_digest(fd) != self.shard.header:
                raise CorruptError("the header is not what was written", where=self.path, hint=VERIFY)
        self._require_known_header()
        return self.column("digest")

    def column(self, name: str) -> np.ndarray:
        """One small column, checked as a whole."""
        column = self.schema.column(name)
        data = np.empty((self.shard.rows, *column.shape), column.dtype)
        with self.disk.open(self.path) as fd:
            self.disk.read_into(fd, raw(data), self.shard.offsets[name], self.path)
        digest = hash_of(self.schema.version)()
        digest.update(raw(data))
        if digest.hexdigest() != self.shard.columns[name]:
            raise CorruptError(f"the dataset /{name} is not what was written", where=self.path, hint=VERIFY)
        return data

    def fill(self, low: int, views: Mapping[str, np.ndarray]) -> None:
        """Read columns from row `low` of the shard into arrays, nothing checked."""
        with self.disk.open(self.path) as fd:
            self._fill(fd, low, views)

    def stream(
        self, low: int, high: int, views: Mapping[str, np.ndarray], room: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Read columns of rows low:high into arrays, then the features of some rows after others; nothing checked.

        Args:
            low: first row in the shard.
            high: one past the last.
            views: arrays of high - low rows for other columns, filled before the first features are given.
            room: [r, c, K], overwritten by the features of up to r rows again and again.

        Yields:
            (first row, features [≤ r, c, K]).
        """
        with self.disk.open(self.path) as fd:
            self._fill(fd, low, views)
            for at in range(low, high, len(room)):
                features = room[: high - at]
                self._fill(fd, at, {"features": features})
                yield at, features

    def gather(self, rows: np.ndarray, views: Mapping[str, np.ndarray]) -> None:
        """Read columns of some rows, ascending numbers in the shard, into arrays; nothing checked.

        Small columns are read with what lies between rows that are near to one another: a read takes as long as some
        kilobytes of it.
        """
        with self.disk.open(self.path) as fd:
            for at in _runs(rows, 1):
                self._fill(fd, int(rows[at.start]), {name: views[name][at] for name in views if name in BULK})
            for name, view in views.items():
                if name not in BULK:
                    self._gather_small(fd, rows, name, view)

    def _gather_small(self, fd: int, rows: np.ndarray, name: str, view: np.ndarray) -> None:
        column = self.schema.column(name)
        for at in _runs(rows, max(1, _NEAR // column.row_bytes), max(1, _TOGETHER // column.row_bytes)):
            low, high = int(rows[at.start]), int(rows[at.stop - 1]) + 1
            between = np.empty((high - low, *column.shape), column.dtype)
            self._fill(fd, low, {name: between})
            view[at] = between[rows[at] - low]

    def _fill(self, fd: int, low: int, views: Mapping[str, np.ndarray]) -> None:
        for name, view in views.items():
            offset = self.shard.offsets[name] + low * self.schema.column(name).row_bytes
            self.disk.read_into(fd, raw(view), offset, self.path)

    def damaged(self, views: Mapping[str, np.ndarray], digests: np.ndarray) -> np.ndarray:
        """Positions in `views` whose bytes do not match their checked digests."""
        return np.flatnonzero((row_digests(self.schema, views, threads=1) != digests).any(axis=1))

    def _header_digest(self, fd: int) -> str:
        digest = hashlib.sha256()
        for start, stop in gaps(self.schema.columns, self.shard.rows, self.shard.offsets, self.shard.size):
            gap = bytearray(stop - start)
            self.disk.read_into(fd, memoryview(gap), start, self.path)
            digest.update(gap)
        return digest.hexdigest()

    def _require_known_header(self) -> None:
        """The header is the one that gradstore composes for this shard, or, of another HDF5, says just the same."""
        layout = self.manifest.layout_of(self.index)
        if (layout.digest, layout.size, layout.offsets) != (self.shard.header, self.shard.size, self.shard.offsets):
            require_plain_hdf5(self.path, self.schema, self.shard)


def _runs(rows: np.ndarray, most: int, span: int | None = None) -> Iterator[slice]:
    """Places of ascending numbers whose neighbours are at most so far from one another, none of a wider span."""
    ends = [*(np.flatnonzero(np.diff(rows) > most) + 1).tolist(), len(rows)]
    for low, high in zip([0, *ends[:-1]], ends, strict=True):
        while low < high:
            stop = high if span is None else int(np.searchsorted(rows[:high], rows[low] + span))
            yield slice(low, stop)
            low = stop
