"""`Features`: what a store holds as an array [n, c, K] that is read when it is indexed.

NumPy itself decides what an index means: it is tried on an array of the same shape that takes no memory, then applied
to the rows that it touches.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from gradstore.store.files.decoding import decoder
from gradstore.tensors import is_tensor

if TYPE_CHECKING:
    from gradstore.store.rows import Rows

_PIECE_BYTES = 64 << 20  # read at a time: what all threads of a store's reader have in hand


class Features:
    """Features float32 [n, c, K] of a store; every index that NumPy knows reads just the rows that it touches.

    `x[i]`, `x[i:j]`, `x[::-2]`, `x[rows]`, `x[mask]`, `x[0:5, :, 0:16]`, `x[..., 0]` and mixtures of them give new
    arrays with the values, shapes and errors of the same index on `np.asarray(x)`. Rows are read whole, since digests
    are of whole rows. Held meanwhile are the result, a second time where rows are asked for out of order, and 64 MB;
    where rows are chosen together with other axes by arrays, or `None` adds an axis, all that is of these rows too.

    `np.asarray(x)` reads everything: `x.nbytes` = 4 · n · c · K bytes, and more than memory may hold.

    Attributes:
        shape: (n, c, K).
        dtype: float32, whatever the stored dtype.
    """

    ndim = 3
    dtype = np.dtype("float32")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, store: Rows) -> None:
        self._store = store
        self.shape = store.shape

    @property
    def size(self) -> int:
        """Values, n · c · K."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that `np.asarray` of it takes."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        """Rows."""
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        """The features [c, K] of one row after another."""
        return (self[row] for row in range(len(self)))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """Read all features; holds them once, and 64 MB.

        Returns:
            [n, c, K] in float32 or `dtype`.

        Raises:
            ValueError: `copy` is False, for nothing is in memory yet.
            CorruptError: a row does not match its digest.
        """
        if copy is False:
            raise ValueError(f"the features of {self._store.where} are on the disk, so reading them makes a copy")
        return self._read(np.arange(len(self)), (), self.dtype if dtype is None else np.dtype(dtype))

    def __getitem__(self, key: Any) -> Any:
        """Read some features.

        Args:
            key: what an array [n, c, K] may be indexed with: integers, slices, `...`, `None`, integer or boolean
                arrays, lists and tensors, one for each axis at most.

        Returns:
            A new float32 array, or a single value.

        Raises:
            IndexError: out of range, a mask of another shape, or no index of an array; names the shape.
            CorruptError: a row does not match its digest.
        """
        parts = self._parts(key)
        try:
            _ = _blank(self.shape)[parts]
        except IndexError as error:
            raise self._refusal(str(error)) from None
        place = next(i for i, part in enumerate(parts) if part is not None and part is not Ellipsis)
        chosen, rest = parts[place], parts[place + 1 :]
        rows, inner = _touched(chosen, len(self))
        if not _cuts_rows_apart(chosen, parts[:place], rest):
            return self._read(rows, ())[(*parts[:place], inner, *rest)]
        found = self._read(rows, rest)
        if _is_everything(inner, len(rows)):
            return found
        found = found[inner]
        return np.ascontiguousarray(found) if found.ndim else found

    def __eq__(self, other: object) -> NoReturn:
        """Refuse: what is not read cannot be compared."""
        raise TypeError("features are on the disk; compare np.asarray(features), or some of their rows")

    def __ne__(self, other: object) -> NoReturn:
        """Refuse, as `==`."""
        self.__eq__(other)

    def __repr__(self) -> str:
        """Shape, dtype and place on one line."""
        return f"Features({list(self.shape)} {self.dtype}, read from {self._store.where!r} when indexed)"

    def _refusal(self, problem: str) -> IndexError:
        return IndexError(f"{problem}; the features have the shape {list(self.shape)}")

    def _parts(self, key: Any) -> tuple[Any, ...]:
        """The index as a tuple of which one part stands for the rows; no `...` where it stands for any axis."""
        parts = [_plain(part) for part in (key if isinstance(key, tuple) else (key,))]
        if any(isinstance(part, (bool, np.bool_)) for part in parts):
            raise self._refusal("a single boolean chooses nothing of an array that is read when it is indexed")
        left = self.ndim - sum(map(_axes, parts))
        dots = [i for i, part in enumerate(parts) if part is Ellipsis]
        if left > 0 and len(dots) < 2:
            at = dots[0] if dots else len(parts)
            parts[at : at + 1] = [slice(None)] * left
        return tuple(parts)

    def _read(self, rows: np.ndarray, rest: tuple[Any, ...], dtype: np.dtype | None = None) -> np.ndarray:
        """Some rows int64 [r], ascending and distinct, and of each what the indices `rest` of [c, K] leave."""
        schema, path = self._store.schema, (slice(None), *rest)
        one = _blank((1, *self.shape[1:]))[path]
        out = np.empty((len(rows), *one.shape[1:]), self.dtype if dtype is None else dtype)
        step = max(1, _PIECE_BYTES // (schema.row_bytes + 4 * schema.c * schema.K))
        room, decode = schema.empty(min(step, len(rows))), decoder(len(rows) * schema.c * schema.K)
        for at in range(0, len(rows), step):
            piece = rows[at : at + step]
            first, stop = int(piece[0]), int(piece[-1]) + 1
            if stop - first == len(piece):
                columns = self._store.read(first, stop, out=room)
            else:
                columns = self._store.gather(piece, room)
            out[at : at + len(piece)] = decode(columns["features"], columns["scale"])[path]
        return out


def _blank(shape: tuple[int, ...]) -> np.ndarray:
    """An array of a shape whose values all share one byte."""
    return np.broadcast_to(np.zeros((), bool), shape)


def _plain(part: Any) -> Any:
    """Lists, ranges and tensors as arrays, and integers of every kind as one."""
    if part is None or part is Ellipsis or isinstance(part, (slice, bool)):
        return part
    if is_tensor(part):
        part = part.detach().cpu().numpy()
    if isinstance(part, (list, tuple, range)):
        part = np.asarray(part)
        part = part.astype(np.intp) if part.size == 0 and part.dtype.kind == "f" else part
    if isinstance(part, np.ndarray) and part.ndim:
        return part
    try:
        return operator.index(part)
    except TypeError:
        return part[()] if isinstance(part, np.ndarray) else part


def _axes(part: Any) -> int:
    """Axes of the features that a part of an index stands for."""
    if part is None or part is Ellipsis:
        return 0
    return part.ndim if isinstance(part, np.ndarray) and part.dtype == bool else 1


def _touched(chosen: Any, n: int) -> tuple[np.ndarray, Any]:
    """(rows int64, ascending and distinct; what indexes them as `chosen` indexes all n)."""
    if isinstance(chosen, slice):
        rows = np.arange(n)[chosen]
        backwards = chosen.step is not None and chosen.step < 0
        return (rows[::-1], slice(None, None, -1)) if backwards else (rows, slice(None))
    if not isinstance(chosen, np.ndarray):
        return np.array([chosen % n]), 0
    if chosen.dtype == bool:
        rows = np.flatnonzero(chosen.any(axis=tuple(range(1, chosen.ndim))))
        return rows, chosen[rows]
    rows, inner = np.unique(chosen.astype(np.int64) % max(n, 1), return_inverse=True)
    return rows, inner.reshape(chosen.shape)


def _cuts_rows_apart(chosen: Any, before: tuple[Any, ...], rest: tuple[Any, ...]) -> bool:
    """Whether an index is one of the rows, and then another of each of them by itself."""
    # NumPy joins arrays of indices for several axes, and puts the result first where something stands between them.
    if any(part is None for part in (*before, *rest)):
        return False
    if isinstance(chosen, slice):
        return not any(part is Ellipsis for part in rest)
    arrays = any(isinstance(part, np.ndarray) for part in rest)
    return not arrays and (not isinstance(chosen, np.ndarray) or chosen.ndim == 1)


def _is_everything(inner: Any, r: int) -> bool:
    """Whether an index leaves r rows as they are."""
    if isinstance(inner, np.ndarray):
        return inner.dtype == bool or np.array_equal(inner, np.arange(r))
    return isinstance(inner, slice) and inner.step is None
