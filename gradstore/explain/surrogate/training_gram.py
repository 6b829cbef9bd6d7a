"""The Gram matrix of the training examples, row by row: from memory, or from a file where memory is too small."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gradstore.errors import NonFiniteError, UsageError
from gradstore.kernels.definitions import Kernel
from gradstore.kernels.gram import gram
from gradstore.kernels.gram_matrix import Gram
from gradstore.machine.byte_counts import format_bytes
from gradstore.store.rows import Rows


class TrainingGram:
    """Rows of a symmetric matrix [n, n].

    Args:
        source: array [n, n] or a file.
        memory: bytes for one block of rows in float64.
        keep: rows and columns that take part, bool [n]; None for all.
        scale: values are divided by this.

    Attributes:
        n: rows that take part.
        block_rows: rows read together.

    Raises:
        UsageError: not even one row fits the memory.
    """

    def __init__(
        self, source: np.ndarray | Gram, memory: int, keep: np.ndarray | None = None, scale: float = 1.0
    ) -> None:
        self._source, self._memory, self._scale = source, memory, scale
        self._checked = np.zeros(source.shape[0], bool)
        self._keep = None if keep is None else np.flatnonzero(keep)
        self.n = source.shape[0] if self._keep is None else len(self._keep)
        width = source.shape[0]
        # As read, and taken in another order: two copies of a block.
        self.block_rows = min(self.n, memory // (16 * width))
        if self.block_rows == 0:
            raise UsageError(
                "too little memory",
                where="--memory",
                expected=f"at least {format_bytes(16 * width)}",
                got=format_bytes(memory),
            )

    def rows(self, wanted: np.ndarray) -> np.ndarray:
        """float64 [rows, n] of rows that lie within one block; one read of the file, and checked the first time."""
        at = wanted if self._keep is None else self._keep[wanted]
        low, high = int(at.min()), int(at.max()) + 1
        values = np.asarray(self._stored(low, high), np.float64)[at - low]
        if self._keep is not None:
            values = values[:, self._keep]
        return values / self._scale if self._scale != 1 else np.ascontiguousarray(values)

    def _stored(self, low: int, high: int) -> np.ndarray:
        if isinstance(self._source, np.ndarray):
            return self._source[low:high]
        fresh = not self._checked[low:high].all()
        values = self._source.read(low, high, check=fresh)
        if fresh:
            require_finite(values, low, self._source)
        self._checked[low:high] = True
        return values

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, their values) over all rows in order."""
        for at in range(0, self.n, self.block_rows):
            span = slice(at, min(at + self.block_rows, self.n))
            yield span, self.rows(np.arange(span.start, span.stop))

    def mean_diagonal(self) -> float:
        """Mean of κ(x_i, x_i); one pass."""
        return sum(float(np.trace(values[:, span])) for span, values in self.blocks()) / self.n

    def part(self, keep: np.ndarray | None, scale: float) -> TrainingGram:
        """The same matrix for some rows and columns, divided by `scale`."""
        part = TrainingGram(self._source, self._memory, keep, scale)
        part._checked = self._checked
        return part


def finite_rows(gram: Gram, start: int, stop: int) -> np.ndarray:
    """Rows start:stop of a Gram matrix.

    Returns:
        float64 [stop - start, n].

    Raises:
        NonFiniteError: a value is none, as those of absent rows are.
    """
    values = gram[start:stop]
    require_finite(values, start, gram)
    return values.astype(np.float64)


def require_finite(values: np.ndarray, start: int, gram: Gram) -> None:
    """Refuse rows of a Gram matrix, from `start` on, that hold NaN or infinity; names the first."""
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
        places = np.flatnonzero(~np.isfinite(values[bad[0]]))
        row, what = start + int(bad[0]), "all of it" if len(places) == values.shape[1] else f"column {places[0]}"
        raise NonFiniteError(
            f"row {row} of the Gram matrix is not finite",
            where=gram.path,
            got=what,
            hint="Rows and columns of absent rows are NaN; a surrogate of the store itself leaves these out",
        )


@contextmanager
def store_gram(
    store: Rows, kernel: Kernel, memory: int, scratch: str | os.PathLike[str] | None
) -> Iterator[np.ndarray | Gram]:
    """The Gram matrix of a store: float32 in memory where it fits half of it, otherwise a file that is removed after.

    Args:
        store: the training store.
        kernel: a projected kernel.
        memory: bytes.
        scratch: directory of the file; None for the system's temporary one.

    Yields:
        float32 [n, n], or the file.

    Raises:
        NoSpaceError: the file does not fit the disk.
        Others: as `gradstore.kernels.gram`.
    """
    n = len(store)
    if 4 * n * n <= memory // 2:
        yield assembled(store, kernel, memory - 4 * n * n)
        return
    with tempfile.TemporaryDirectory(prefix="gradstore-", dir=scratch) as folder:
        yield gram(store, None, kernel.name, out=Path(folder) / "gram.h5", memory=memory)


def assembled(store: Rows, kernel: Kernel, memory: int, dtype: type = np.float32) -> np.ndarray:
    """The whole Gram matrix [n, n] of a store; holds it and what `gradstore.kernels.gram` holds."""
    n = len(store)
    found: np.ndarray = np.empty((n, n), dtype)
    for tile in gram(store, None, kernel.name, memory=memory):
        rows, columns = tile.rows, tile.columns
        found[rows.start : rows.stop, columns.start : columns.stop] = tile.values
        found[columns.start : columns.stop, rows.start : rows.stop] = tile.values.T
    return found
