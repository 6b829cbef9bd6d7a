"""Arrays in files that other tools wrote, `.npy` or raw: read by position, some rows at a time.

They are not mapped into memory, since a mapped file that gets shorter ends the process. What has changed since it was
opened is refused, and so is what is no regular file; links are followed, for these are the user's own paths.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from gradstore.errors import CorruptError, UsageError
from gradstore.store.files.disk import Disk, MissingFileError
from gradstore.store.schema import raw

_MOST_SMALL = 8 << 30


class ArrayFile:
    """An array on disk; use `open_array` or `open_raw_array`.

    Attributes:
        path: the file.
        shape: of the array.
        dtype: of its values, in the file's byte order.
    """

    def __init__(
        self, path: Path, shape: Sequence[int], dtype: np.dtype, offset: int = 0, *, by_columns: bool = False
    ) -> None:
        self.path, self.shape, self.dtype = path, tuple(shape), dtype
        self._real, self._offset, self._by_columns = Path(os.path.realpath(path)), offset, by_columns
        self._seen = _state(self._real)

    def __len__(self) -> int:
        """Rows."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows start:stop.

        Returns:
            A new array [stop - start, ...], contiguous.

        Raises:
            UsageError: the file is not what it was when it was opened.
            CorruptError: the disk cannot read it.
        """
        self._require_unchanged()
        try:
            values = self._read(start, stop)
        finally:  # whatever it did meanwhile says more than an end that came too early
            self._require_unchanged()
        return values

    def _read(self, start: int, stop: int) -> np.ndarray:
        disk, count, inner = Disk(), stop - start, self.shape[1:]
        each = math.prod(inner)
        if not count * each:
            return np.empty((count, *inner), self.dtype)
        with disk.open(self._real) as fd:
            if not self._by_columns:
                values = np.empty((count, *inner), self.dtype)
                at = self._offset + start * each * self.dtype.itemsize
                disk.read_into(fd, raw(values), at, self.path)
                return values
            columns = np.empty((each, count), self.dtype)
            for i, column in enumerate(columns):
                at = self._offset + (i * len(self) + start) * self.dtype.itemsize
                disk.read_into(fd, raw(column), at, self.path)
        return np.ascontiguousarray(columns.reshape(*reversed(inner), count).T)

    def _require_unchanged(self) -> None:
        if _state(self._real) != self._seen:
            raise UsageError("the file changed while it was read", where=self.path, hint="Wait until it is whole")


def open_array(path: Path, what: str, otherwise: str | None = None) -> ArrayFile:
    """Open an `.npy` file, of which only the header is read.

    Args:
        path: the file, whatever its name.
        what: it should be, for errors, such as "array of features".
        otherwise: what to do where it is not.

    Returns:
        The array; no objects.

    Raises:
        UsageError: it is none, or no regular file.
    """
    _require_file(path, what)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that other versions wrote
            mapped = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # whatever a damaged header makes NumPy raise
        several = "It is several arrays: save the one that is meant" if _is_archive(path) else None
        _refuse(path, what, _clause(error), several or otherwise)
    by_columns = not mapped.flags.c_contiguous
    return ArrayFile(path, mapped.shape, mapped.dtype, mapped.offset, by_columns=by_columns)


def open_raw_array(path: Path, shape: Sequence[int], dtype: str, what: str) -> ArrayFile:
    """Open a raw memory map.

    Returns:
        The array.

    Raises:
        UsageError: the file has not as many bytes as the shape.
    """
    _require_file(path, what)
    if dtype not in ("float16", "float32") or not all(isinstance(size, int) and size > 0 for size in shape):
        _refuse(path, what, f"shape {list(shape)}, dtype {dtype!r}")
    found = ArrayFile(path, shape, np.dtype(dtype))
    size = path.stat().st_size
    if found.nbytes != size:
        _refuse(path, what, f"{size} bytes for shape {list(shape)} of {dtype}")
    return found


def read_array(path: Path) -> np.ndarray:
    """Read a whole `.npy` file of labels or logits.

    Returns:
        Its array; no objects.

    Raises:
        UsageError: it is none, or has more than 8 GiB or two axes.
    """
    found = open_array(path, ".npy array")
    if len(found.shape) not in (1, 2) or found.nbytes > _MOST_SMALL:
        _refuse(path, ".npy array", f"{found.dtype} {list(found.shape)}", expected="labels [n] or logits [n, classes]")
    return found.rows(0, len(found)) if found.nbytes else np.empty(found.shape, found.dtype)


def _require_file(path: Path, what: str) -> None:
    try:
        if Path(path).is_file():
            with Disk().open(Path(os.path.realpath(path))):
                return
    except (CorruptError, ValueError) as error:
        _refuse(path, what, _clause(error))
    _refuse(path, what, "no such file" if not os.path.lexists(path) else "not a regular file")


def _state(path: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise MissingFileError("the file is gone", where=path) from error
    return found.st_ino, found.st_size, found.st_mtime_ns


def _is_archive(path: Path) -> bool:
    with Path(path).open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _clause(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


def _refuse(path: Path, what: str, got: str, hint: str | None = None, expected: str | None = None) -> NoReturn:
    raise UsageError(f"this is no {what}", where=path, expected=expected, got=got, hint=hint)
