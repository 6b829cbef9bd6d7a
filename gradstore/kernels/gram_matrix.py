"""A finished Gram matrix on disk: where its values lie, and reading them, each row's digest compared.

    /gram      [n, m]      float32 or float64   the whole matrix, both halves of a symmetric one
    /finished  [n, m/16]   uint8                1 where 16 columns of a row are written; all 1 in a finished file
    /digest    [n, 16]     uint8                first 16 bytes of BLAKE3 over what the matrix is, row number, row

What the matrix is are its attributes, shape and dtype: a row of another matrix does not match, nor any row where an
attribute has changed. Version 1 had no digests; its files are read, and a note says so.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from gradstore.errors import CorruptError, UnsafeError, UsageError
from gradstore.kernels.gram_tiles import CELL
from gradstore.store.files.digests import BYTES, THREADS, hash_rows
from gradstore.store.files.disk import Disk
from gradstore.store.files.foreign_header import plain_contents
from gradstore.store.files.layout import ShardLayout, file_layout, gaps
from gradstore.store.schema import NEWEST, Column, raw

_log = logging.getLogger(__name__)

FORMAT = "gradstore-gram"
VERSIONS = (2, 1)  # the first is written
_PIECE_BYTES = 8 << 20  # read at a time where not all of it is wanted
_TEXTS = ("kernel", "formula", "split_a", "split_b", "data_a", "data_b")
_AGAIN = "Remove the file and run the command that wrote it again"


@dataclass(frozen=True)
class Gram:
    """A finished Gram matrix on disk; `gram[i, j]`, `gram[:100]` and the like read just the rows that they ask for.

    Attributes:
        path: the HDF5 file.
        shape: (n, m).
        attributes: what the matrix is: kernel, formula, fingerprint, splits, digests of the data, arithmetic.
        dtype: of the values, "<f4" or "<f8".
        offsets: place of each dataset's first byte.
    """

    path: Path
    shape: tuple[int, int]
    attributes: Mapping[str, str | int]
    dtype: str
    offsets: Mapping[str, int]

    @property
    def kernel(self) -> str:
        """Name of the kernel."""
        return str(self.attributes["kernel"])

    @property
    def symmetric(self) -> bool:
        """Whether both sides are the same rows."""
        return bool(self.attributes["symmetric"])

    def __len__(self) -> int:
        """Rows."""
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """Read values, as NumPy indexes them.

        Args:
            key: an index of rows, and one of columns; of these, one at most is a list or an array. Rows are read whole.

        Returns:
            The values; held besides are 8 MB, and them once more where rows are out of order.

        Raises:
            IndexError: there are no such rows or columns.
            CorruptError: a row does not match its digest.
        """
        rows, columns = self._parts(key)
        wanted = np.arange(len(self))[rows]
        distinct, back = np.unique(wanted, return_inverse=True)
        found = self._read(distinct, columns)
        return found if np.array_equal(wanted, distinct) else found[back.reshape(np.shape(wanted))]

    def read(self, start: int, stop: int, *, check: bool = True) -> np.ndarray:
        """Read rows start:stop.

        Args:
            start: first row.
            stop: one past the last.
            check: compare digests; whoever passes over the same rows many times may do so the first time only.

        Returns:
            [stop - start, m].

        Raises:
            CorruptError: a row does not match its digest.
        """
        return self._read(np.arange(start, stop), slice(None), check=check)

    def _parts(self, key: Any) -> tuple[Any, Any]:
        parts = [part for part in (key if isinstance(key, tuple) else (key,)) if part is not Ellipsis]
        lists = sum(not isinstance(part, slice) and np.ndim(part) > 0 for part in parts)
        if len(parts) > 2 or lists > 1 or any(part is None for part in parts):
            raise IndexError("a Gram matrix has an index of rows and one of columns, of which one may be a list")
        everything = [slice(None)] * (2 - len(parts))
        rows, columns = [*everything, *parts] if isinstance(key, tuple) and key[:1] == (...,) else [*parts, *everything]
        return rows, columns

    def _read(self, rows: np.ndarray, columns: Any, *, check: bool = True) -> np.ndarray:
        """Columns of some rows, ascending and distinct."""
        m = self.shape[1]
        one = np.broadcast_to(np.zeros((), bool), (1, m))[:, columns]
        out = np.empty((len(rows), *one.shape[1:]), self.dtype)
        whole = isinstance(columns, slice) and columns == slice(None)
        step = max(1, _PIECE_BYTES // max(1, m * out.itemsize))
        disk, room = Disk(), np.empty((0 if whole else min(step, len(rows)), m), self.dtype)
        with disk.open(Path(os.path.realpath(self.path))) as fd:
            for low, high in _runs(rows, step):
                part = out[low:high] if whole else room[: high - low]
                self._fill(fd, int(rows[low]), part, disk, check=check)
                if not whole:
                    out[low:high] = part[:, columns]
        return out

    def _fill(self, fd: int, row: int, values: np.ndarray, disk: Disk, *, check: bool) -> None:
        """Read rows from one on, [r, m], and compare their digests."""
        disk.read_into(fd, raw(values), self.offsets["gram"] + row * values[0].nbytes, self.path)
        if not check or "digest" not in self.offsets:
            return
        digests = np.empty((len(values), BYTES), np.uint8)
        disk.read_into(fd, raw(digests), self.offsets["digest"] + row * BYTES, self.path)
        found = row_digests_of(self.shape, self.attributes, row, values, threads=THREADS)
        bad = np.flatnonzero((found != digests).any(axis=1))
        if len(bad):
            raise CorruptError(
                f"row {row + int(bad[0])} of the Gram matrix does not match its digest", where=self.path, hint=_AGAIN
            )


def row_digests_of(
    shape: tuple[int, int], attributes: Mapping[str, str | int], row: int, values: np.ndarray, *, threads: int = 1
) -> np.ndarray:
    """Digests uint8 [r, 16] of rows [r, m] from a number on, of a matrix with these attributes."""
    said = json.dumps([list(shape), values.dtype.str, dict(sorted(attributes.items()))])
    what = np.frombuffer(blake3(said.encode()).digest(), np.uint8)
    r = len(values)
    numbers = np.arange(row, row + r, dtype="<i8").view(np.uint8).reshape(r, 8)
    return hash_rows(NEWEST, [np.broadcast_to(what, (r, len(what))).copy(), numbers, values.view(np.uint8)], threads)


def gram_layout(shape: tuple[int, int], dtype: str, attributes: Mapping[str, str | int], version: int) -> ShardLayout:
    """Where the datasets of a matrix lie, and the header that says so."""
    columns = _columns(shape[1], dtype, version, str(attributes["formula"]))
    return file_layout(columns, shape[0], {"format": FORMAT, "version": version, **attributes})


def gram_at(path: Path, shape: tuple[int, int], dtype: str, attributes: Mapping[str, str | int], version: int) -> Gram:
    """The matrix in a file whose header is known to be the one that these arguments give."""
    offsets = gram_layout(shape, dtype, attributes, version).offsets
    said = {"format": FORMAT, "version": version, **attributes}
    return _noted(Gram(path, shape, said, np.dtype(dtype).str, dict(offsets)))


def open_gram(path: str | os.PathLike[str]) -> Gram:
    """Open a Gram matrix that `gram` or `exact_gram` wrote.

    Its header is parsed in a process of its own, and nothing is followed that it may name.

    Returns:
        The matrix, of which values are read when it is indexed.

    Raises:
        UsageError: there is no such file, or it is something else.
        CorruptError: HDF5 cannot read it, or it says what cannot be.
        UnsafeError: there is more in it than plain datasets: links, external storage, filters.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError("there is no Gram matrix", where=path)
    found = plain_contents(os.path.realpath(path))
    if isinstance(found, str):
        raise UnsafeError(
            "this HDF5 file holds other things than a Gram matrix",
            where=path,
            expected="plain datasets, contiguous, unfiltered, unlinked",
            got=found[:200],
            hint="Do not open it with other HDF5 tools either",
        )
    if "unreadable" in found:
        raise CorruptError("HDF5 cannot read this Gram matrix", where=path, got=found["unreadable"][:200], hint=_AGAIN)
    attributes = found["attributes"]
    if attributes.get("format") != FORMAT or attributes.get("version") not in VERSIONS:
        got = f"{attributes.get('format')!s:.40} {attributes.get('version')!s:.20}"
        raise UsageError("this is not a Gram matrix", where=path, expected=f"{FORMAT} 1 or 2", got=got)
    try:
        opened = _noted(_checked(path, attributes, found["datasets"]))
        opened[:1]  # with which what the attributes say is compared as well
        return opened
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptError(
            "this Gram matrix says what cannot be", where=path, got=str(error)[:120], hint=_AGAIN
        ) from error


def _checked(path: Path, attributes: Mapping[str, str | int], datasets: Mapping[str, Any]) -> Gram:
    """The matrix, of which each dataset has its shape, lies inside the file, and overlaps no other."""
    (n, m), dtype, _ = datasets["gram"]
    columns = _columns(m, dtype, int(attributes["version"]), "")
    expected = {column.name: [[n, *column.shape], column.dtype.str] for column in columns}
    if dtype not in ("<f4", "<f8") or {name: said[:2] for name, said in datasets.items()} != expected or not n * m:
        raise ValueError("other datasets than a Gram matrix has")
    offsets = {name: offset for name, (_, _, offset) in datasets.items()}
    placed = all(isinstance(offset, int) and offset >= 0 for offset in offsets.values())
    if not placed or any(a > b for a, b in gaps(columns, n, offsets, os.stat(path).st_size)):
        raise ValueError("datasets that overlap or leave the file")
    if not all(isinstance(attributes.get(name), str) for name in _TEXTS):
        raise ValueError(f"its attributes are not {', '.join(_TEXTS)}")
    if attributes.get("symmetric") not in (0, 1) or (attributes["symmetric"] and n != m):
        raise ValueError("symmetric, and not square")
    return Gram(path, (n, m), attributes, dtype, offsets)


def _noted(gram: Gram) -> Gram:
    if "digest" not in gram.offsets:
        _log.warning("%s is of an earlier version and has no digests, so damage to it is not noticed", gram.path)
    return gram


def _columns(m: int, dtype: str, version: int, formula: str) -> tuple[Column, ...]:
    cells = -(-m // CELL)
    values = Column("gram", (m,), np.dtype(dtype), "n m", formula)
    finished = Column("finished", (cells,), np.dtype("uint8"), f"n m/{CELL}", f"1 where {CELL} columns are written")
    digest = Column(
        "digest", (BYTES,), np.dtype("uint8"), f"n {BYTES}", "BLAKE3 of what the matrix is, row number, row"
    )
    return (values, finished, digest) if version > 1 else (values, finished)


def _runs(rows: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """(low, high) of places in `rows` that follow one another without a gap, `most` at a time."""
    ends = [*(np.flatnonzero(np.diff(rows) > 1) + 1).tolist(), len(rows)]
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        for low in range(start, stop, most):
            yield low, min(low + most, stop)
