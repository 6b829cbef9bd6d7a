"""Which rows: every argument that chooses rows, an index or classes by their indices goes through here.

Rows are a bool mask of all of them, or their indices as a list, range, slice, array or tensor; one integer is one row.
Indices are counted from 0 and never from the end, where -1 is likelier a mistake; a slice is cut to what there is, as
everywhere in Python. What could be read in two ways is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import numpy as np

from gradstore.errors import GradstoreError, UsageError, shown
from gradstore.tensors import is_tensor

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = object  # named for type checkers alone: to import torch takes longer than most commands

RowChoice = int | slice | range | Sequence[int] | Sequence[bool] | np.ndarray | Tensor
"""Some of n rows."""


def chosen_rows(
    rows: RowChoice | None,
    n: int,
    *,
    where: str,
    what: str = "row",
    once: bool = False,
    error: type[GradstoreError] = UsageError,
    masks: str = "A mask is boolean: .astype(bool)",
) -> np.ndarray:
    """Find which rows are meant.

    Args:
        rows: a mask [n] or indices; None for all rows, but where they are a set.
        n: how many there are.
        where: the argument, for errors.
        what: what is chosen, for errors, such as "query row".
        once: a row may be named once only, as in a set.
        error: what is raised.
        masks: how a mask is given, for errors.

    Returns:
        Their indices, int64 [m], in the order given.

    Raises:
        UsageError: or `error`: a row that does not exist, a mask of another length, floats, a nested list, a row named
            twice where that makes no sense, or n zeros and ones, which are likely a mask.
    """
    if rows is None and not once:
        return np.arange(n)
    expected = f"{n} booleans, or row indices below {n}"

    def refuse(problem: str, got: object, hint: str | None = None, expected: str = expected) -> NoReturn:
        raise error(problem, where=where, expected=expected, got=got, hint=hint)

    array = _as_array(rows, n)
    if array is None:
        kinds = "Give a list, a range, a slice, an array or a tensor"
        refuse("neither a mask nor indices of rows", shown(rows), kinds)
    if array.dtype == bool:
        if array.shape != (n,):
            got = f"{_size(array)} booleans" if array.ndim else f"the single boolean {array}"
            refuse("the mask is for another number of rows", got)
        return np.flatnonzero(array)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        refuse("neither a mask nor indices of rows", f"{array.dtype} {list(array.shape)}", _meant(array, n, masks))
    repeated = len(np.unique(array)) < len(array)
    if _is_binary(array, n) and (once or repeated) and np.ndim(rows) == 1 and not isinstance(rows, range):  # type: ignore[arg-type]
        problem = f"{n} zeros and ones are likelier a mask than indices of rows"
        refuse(problem, f"{array.dtype} [{n}]", masks)
    bad = array[(array < 0) | (array >= n)]
    if bad.size:
        hint = "Rows are counted from 0; a slice can count from the end" if bad[0] < 0 else None
        refuse(f"no such {what}", int(bad[0]), hint, expected if once else _those(n))
    if once and repeated:
        values, counts = np.unique(array, return_counts=True)
        refuse("a row is named twice", int(values[counts > 1][0]), expected="every row once")
    return array.astype(np.int64)


def chosen_row(row: SupportsIndex, n: int, *, where: str, what: str = "row") -> int:
    """Read one index.

    Returns:
        The index as an int.

    Raises:
        UsageError: it is no integer from 0 to n - 1.
    """
    boolean = isinstance(row, bool) or str(getattr(row, "dtype", "")) == "torch.bool"
    try:
        index = -1 if boolean else operator.index(row)
    except TypeError:
        index = -1
    if not 0 <= index < n:
        raise UsageError(f"no such {what}", where=where, expected=_those(n), got=shown(row))
    return index


def row_mask(
    rows: RowChoice,
    n: int,
    *,
    where: str,
    what: str = "row",
    error: type[GradstoreError] = UsageError,
    masks: str = "A mask is boolean: .astype(bool)",
) -> np.ndarray:
    """Make a mask of a mask or of indices, each named once; the arguments are those of `chosen_rows`.

    Returns:
        bool [n].

    Raises:
        UsageError: or `error`: as `chosen_rows`; n zeros and ones are always refused.
    """
    mask = np.zeros(n, bool)
    mask[chosen_rows(rows, n, where=where, what=what, once=True, error=error, masks=masks)] = True
    return mask


def class_indices(labels: Sequence[int] | np.ndarray | Tensor, *, where: object) -> np.ndarray:
    """Read labels; whether there are such classes is for others to say.

    Returns:
        int64 of their own shape.

    Raises:
        UsageError: they are no whole numbers; names the first that is none.
    """
    try:
        array = np.asarray(labels.detach().cpu() if is_tensor(labels) else labels)
        if array.dtype == object:
            array = np.array(array.tolist())
    except (TypeError, ValueError, RuntimeError):
        array = np.array(None)
    if isinstance(labels, np.ma.MaskedArray) and np.ma.is_masked(labels):
        raise UsageError("labels are masked", where=where, expected="whole numbers, -1 for none", got=shown(labels))
    if array.dtype.kind in "bi" or array.size == 0:
        return array.astype(np.int64)
    values = array.astype(np.float64) if array.dtype.kind in "uf" else np.full(array.shape, np.nan)
    whole = (values == np.round(values)) & (np.abs(values) < 2**53)
    if not whole.all():
        first = shown(array[~whole].tolist()[0] if array.ndim else labels)
        raise UsageError("labels are no indices of classes", where=where, expected="whole numbers", got=first)
    return array.astype(np.int64)


def _as_array(rows: Any, n: int) -> np.ndarray | None:
    """The rows as an array, an integer as [1]; None where they are nothing of the kind."""
    if isinstance(rows, slice):
        try:
            return np.arange(n)[rows]
        except (TypeError, ValueError):
            return None
    if isinstance(rows, tuple) and len(rows) == 1 and np.ndim(rows[0]) == 1:
        rows = rows[0]  # what np.where and np.nonzero give
    if isinstance(rows, range):
        rows = rows[: n + 1]  # more of them cannot all exist
    if isinstance(rows, (list, tuple)) and len({isinstance(row, (bool, np.bool_)) for row in rows}) == 2:
        return None  # NumPy would make integers of the booleans
    try:
        array = np.asarray(rows.cpu() if is_tensor(rows) else rows)
    except (TypeError, ValueError, RuntimeError):
        return None
    if array.dtype.kind not in "biuf" or isinstance(rows, np.ma.MaskedArray):
        return None
    if array.shape == (0,) and array.dtype.kind == "f":
        return array.astype(np.int64)
    return array[None] if array.ndim == 0 and array.dtype.kind in "iu" else array


def _those(n: int) -> str:
    return f"0 to {n - 1}" if n else "none, for there are no rows"


def _size(array: np.ndarray) -> object:
    return len(array) if array.ndim == 1 else list(array.shape)


def _is_binary(array: np.ndarray, n: int) -> bool:
    return array.shape == (n,) and n > 0 and bool(np.isin(array, (0, 1)).all())


def _meant(array: np.ndarray, n: int, masks: str) -> str | None:
    """What floats or a nested array were probably meant to be."""
    if array.ndim != 1:
        return "Give one dimension: .ravel()" if array.dtype.kind in "iu" else None
    return masks if _is_binary(array, n) else "Indices are integers: .astype(int)"


def spans(rows: Sequence[int] | np.ndarray, limit: int = 8) -> str:
    """Rows as people write them: "3, 7-9, 12"; the first `limit` stretches."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    parts = [f"{part[0]}" if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in np.split(np.array(rows), breaks)]
    return ", ".join(parts[:limit]) + (f" and {len(parts) - limit} more stretches" if len(parts) > limit else "")
