"""Which rows, from a file that a person or a script has written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from gradstore.errors import GradstoreError, UsageError
from gradstore.indices import row_mask
from gradstore.store.array_file import read_array
from gradstore.store.files.disk import Disk

_LINE_BYTES = 64  # far more than an index takes


def read_row_list(path: str | os.PathLike[str], n: int, *, what: str) -> np.ndarray:
    """Bool mask [n] from a file: one row index a line, or a `.npy` mask or index array (never unpickled).

    Args:
        path: the file; a link is followed.
        n: rows that there are.
        what: which rows these are, for errors, such as "poisoned rows".

    Returns:
        bool [n].

    Raises:
        UsageError: the file is missing, holds something else, or its rows are not rows of the store.
    """
    stored = str(path).endswith(".npy")
    try:
        value = read_array(Path(path)) if stored else _read_lines(Path(path), n)
    except (GradstoreError, OSError, ValueError) as error:
        raise UsageError(
            f"not a list of {what}",
            where=path,
            expected="one row index a line, or a .npy mask or index array",
            got=str(error).splitlines()[0][:200],
        ) from error
    masks = "A mask is boolean: .astype(bool)" if stored else "One row index a line; a mask is a boolean .npy array"
    return row_mask(value, n, where=str(path), what=what.removesuffix("s"), masks=masks)


def _read_lines(path: Path, n: int) -> np.ndarray:
    """Row indices, one a line, int64; none of a file without a line."""
    real = Path(os.path.realpath(path))  # the user's own links are followed
    text = Disk().read_file(real, _LINE_BYTES * n + (1 << 16)).decode()
    return np.loadtxt(text.splitlines(), dtype=np.int64, ndmin=1) if text.strip() else np.empty(0, np.int64)
