"""Writing a Gram matrix to disk: one plain HDF5 file, tile by tile, continued after a kill, named when it is whole.

While it grows the file is called `.<name>.part`, and is locked by its writer. Values reach the medium before their
marks do, so a mark is never wrong. The header is a function of the attributes alone: a part is continued only if its
header is, byte for byte, the one that this run would write. Tiles cut rows differently with every budget, so the
digests of rows are taken when all are there, by reading the file once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from gradstore.errors import GradstoreError, LockedError, MismatchError, NoSpaceError, UsageError
from gradstore.kernels.gram_matrix import VERSIONS, Gram, gram_at, gram_layout, row_digests_of
from gradstore.kernels.gram_tiles import CELL, Tile
from gradstore.machine.byte_counts import format_bytes
from gradstore.store.files.digests import BYTES
from gradstore.store.files.disk import Disk
from gradstore.store.files.layout import ShardLayout
from gradstore.store.files.lock import locked_file
from gradstore.store.files.target import target_of
from gradstore.store.schema import raw

_PIECE_BYTES = 1 << 20  # of rows whose digests are taken together
# Seconds of work that a kill may cost.
_SYNC_EVERY = 2.0
_SIGNATURE = b"\x89HDF\r\n\x1a\n"


class GramWriter:
    """The one writer of an unfinished Gram matrix; made by `open_gram_writer`."""

    def __init__(self, path: Path, fd: int, layout: ShardLayout, gram: Gram, disk: Disk) -> None:
        self._path, self._fd, self._layout, self._gram, self._disk = path, fd, layout, gram, disk
        self._shape, self._dtype = gram.shape, np.dtype(gram.dtype)
        shape = gram.shape
        self._finished = np.empty((shape[0], -(-shape[1] // CELL)), np.uint8)
        disk.read_into(fd, raw(self._finished), layout.offsets["finished"], path)
        self._written = self._finished.copy()
        self._widths = np.full(self._finished.shape[1], CELL)
        self._widths[-1] = shape[1] - CELL * (len(self._widths) - 1)
        self._unmarked: list[tuple[range, range]] = []
        self._synced = time.monotonic()

    @property
    def gram(self) -> Gram:
        """What it will be under its own name."""
        return self._gram

    @property
    def values(self) -> int:
        """Values that are written."""
        return int((self._written @ self._widths).sum())

    def known(self, rows: range, columns: range) -> bool:
        """Whether a rectangle is already written."""
        return bool(self._written[rows.start : rows.stop, _cells(columns)].all())

    def write(self, tile: Tile, mirrored: bool = False) -> None:
        """Write a tile at its place, and its transpose at the mirrored place."""
        self._put(tile)
        if mirrored:
            self._put(Tile(tile.start_b, tile.start_a, tile.values.T))
        if time.monotonic() - self._synced > _SYNC_EVERY:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Put what was written on the medium, and only then mark it."""
        self._disk.sync(self._fd, self._path)
        for rows, columns in self._unmarked:
            cells = _cells(columns)
            self._finished[rows.start : rows.stop, cells] = 1
            self._write_rows("finished", rows.start, cells.start, self._finished[rows.start : rows.stop, cells])
        self._unmarked.clear()
        self._synced = time.monotonic()

    def require_whole(self) -> None:
        """Put the last marks on the medium; a matrix with holes is a fault of the tiling."""
        self.checkpoint()
        self._disk.sync(self._fd, self._path)
        if not self._finished.all():
            missing = self._shape[0] * self._shape[1] - self.values
            raise RuntimeError(f"{missing} values of the Gram matrix were never computed")
        if "digest" in self._layout.offsets:
            self._write_digests()
            self._disk.sync(self._fd, self._path)

    def _write_digests(self) -> None:
        n, m = self._shape
        room = np.empty((max(1, min(n, _PIECE_BYTES // (m * self._dtype.itemsize))), m), self._dtype)
        for row in range(0, n, len(room)):
            values = room[: n - row]
            self._disk.read_into(
                self._fd, raw(values), self._layout.offsets["gram"] + row * values[0].nbytes, self._path
            )
            digests = row_digests_of(self._shape, self._gram.attributes, row, values)
            self._disk.write(self._fd, raw(digests), self._layout.offsets["digest"] + row * BYTES, self._path)

    def _put(self, tile: Tile) -> None:
        self._write_rows("gram", tile.start_a, tile.start_b, np.ascontiguousarray(tile.values, self._dtype))
        self._written[tile.start_a : tile.rows.stop, _cells(tile.columns)] = 1
        self._unmarked.append((tile.rows, tile.columns))

    def _write_rows(self, dataset: str, row: int, column: int, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values)
        width = {"gram": self._shape[1], "finished": self._finished.shape[1]}[dataset]
        offset = self._layout.offsets[dataset]
        if values.shape[1] == width:
            self._disk.write(self._fd, raw(values), offset + row * width * values.itemsize, self._path)
            return
        for i, line in enumerate(values, row):
            self._disk.write(self._fd, raw(line), offset + (i * width + column) * values.itemsize, self._path)


@contextmanager
def open_gram_writer(
    path: Path, shape: tuple[int, int], dtype: str, attributes: Mapping[str, str | int], disk: Disk
) -> Iterator[GramWriter]:
    """Begin or continue the matrix that `attributes` describe; it gets its name when the block ends without an error.

    Yields:
        What tiles are written to.

    Raises:
        UsageError: the directory does not exist.
        MismatchError: an unfinished matrix of that name is another one.
        LockedError: another process is writing it.
        NoSpaceError: the disk cannot hold it; said before anything is computed.
    """
    if not path.parent.is_dir():
        raise UsageError("the directory does not exist", where=path.parent)
    part = path.with_name(f".{path.name}.part")
    refusal = LockedError(
        "another process is writing this Gram matrix",
        where=path,
        hint="Wait for it to finish, or stop it; finished tiles are kept",
    )
    with locked_file(part, disk, refusal) as fd:
        version: int | None = VERSIONS[0]
        if not _is_begun(fd, part, disk):
            _begin(part, fd, gram_layout(shape, dtype, attributes, VERSIONS[0]), disk)
        else:
            version = _version_of(fd, shape, dtype, attributes, part, disk)
        if version is None:
            raise MismatchError(
                "an unfinished Gram matrix of another kind has this name",
                where=part,
                hint="Finish it with the arguments it was begun with, remove it, or choose another --out",
            )
        layout = gram_layout(shape, dtype, attributes, version)
        writer = GramWriter(part, fd, layout, gram_at(path, shape, dtype, attributes, version), disk)
        try:
            yield writer
        except BaseException:
            with suppress(GradstoreError):
                writer.checkpoint()
            raise
        writer.require_whole()
        disk.publish(part, path)


def finished_gram(
    path: Path, shape: tuple[int, int], dtype: str, attributes: Mapping[str, str | int], disk: Disk
) -> Gram | None:
    """The matrix at `path` if it is there and is the one described; None where nothing is there.

    Returns:
        The matrix, or None.

    Raises:
        MismatchError: something else is there.
    """
    if not os.path.lexists(path):
        return None
    with disk.open(path) as fd:
        version = _version_of(fd, shape, dtype, attributes, path, disk)
    if version is not None:
        return gram_at(path, shape, dtype, attributes, version)
    raise MismatchError(
        "the output exists and is not the Gram matrix that was asked for",
        where=path,
        hint="Choose another --out; nothing was touched",
    )


def _begin(part: Path, fd: int, layout: ShardLayout, disk: Disk) -> None:
    """Pay for the whole file, then write its header; an interrupted beginning is begun again."""
    free = disk.free_bytes(part.parent)
    if layout.size > free:
        disk.try_remove(part)
        raise NoSpaceError(
            "the Gram matrix does not fit the disk",
            where=part.parent,
            expected=f"{format_bytes(layout.size)} free",
            got=format_bytes(free),
            hint="Choose another --out, or take its tiles from the iterator",
        )
    try:
        disk.allocate(fd, layout.size, part)
    except NoSpaceError:
        disk.try_remove(part)
        raise
    for position, data in reversed(layout.header):  # the signature at the front comes last
        disk.write(fd, data, position, part)


def _is_begun(fd: int, part: Path, disk: Disk) -> bool:
    """Whether the signature, the last piece of the header to be written, is there."""
    found = bytearray(len(_SIGNATURE))
    if os.fstat(fd).st_size >= len(found):
        disk.read_into(fd, memoryview(found), 0, part)
    return found == _SIGNATURE


def _version_of(
    fd: int, shape: tuple[int, int], dtype: str, attributes: Mapping[str, str | int], path: Path, disk: Disk
) -> int | None:
    """The version of the format in which a file is the matrix described; None where it is another."""
    layouts = ((version, gram_layout(shape, dtype, attributes, version)) for version in VERSIONS)
    return next((version for version, layout in layouts if _has_header(fd, layout, path, disk)), None)


def _has_header(fd: int, layout: ShardLayout, path: Path, disk: Disk) -> bool:
    if os.fstat(fd).st_size != layout.size:
        return False
    for position, data in layout.header:
        found = bytearray(len(data))
        disk.read_into(fd, memoryview(found), position, path)
        if found != data:
            return False
    return True


def _cells(columns: range) -> slice:
    return slice(columns.start // CELL, -(-columns.stop // CELL))


Report = Callable[[int, int], None]
"""Progress: (values written, values of the whole matrix)."""


def write_tiles(
    path: Path,
    shape: tuple[int, int],
    attributes: Mapping[str, str | int],
    tiles: Callable[[Callable[[range, range], bool]], Iterator[Tile]],
    *,
    dtype: str = "float32",
    progress: Report | None = None,
    disk: Disk | None = None,
) -> Gram:
    """Write a whole matrix from its tiles, or what is missing of it; does nothing where it is finished.

    Args:
        path: the file.
        shape: (n, m).
        attributes: what the matrix is; the key "symmetric" says whether tiles are mirrored.
        tiles: makes the tiles, given the rectangles to skip.
        dtype: of the values on disk.
        progress: called after every tile.
        disk: where bytes go; for tests.

    Returns:
        The written matrix.

    Raises:
        Errors: those of `open_gram_writer` and `finished_gram`.
    """
    disk = disk or Disk()
    path = target_of(path, streams=False).path
    found = finished_gram(path, shape, dtype, attributes, disk)
    if found is not None:
        return found
    with open_gram_writer(path, shape, dtype, attributes, disk) as writer:
        for tile in tiles(writer.known):
            writer.write(tile, mirrored=bool(attributes["symmetric"]) and tile.rows != tile.columns)
            del tile  # before the next one is made
            if progress is not None:
                progress(writer.values, shape[0] * shape[1])
        return writer.gram
