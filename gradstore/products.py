"""Inner products of feature rows, in float32 or of rows rounded to integers, cut into jobs for worker threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gradstore.rounding import MOST_COLUMNS, PLANES, exact_product, round_rows
from gradstore.threads import Workers

ARITHMETICS = ("float32", "int14", "int8")

# Rows of one job: enough for a good product, few enough to share a tile out evenly.
_JOB_ROWS = 256
# Multiply-adds below which handing a job to another thread costs more than the job.
_SMALL = 1 << 22


@dataclass(frozen=True)
class Operand:
    """Rows of a feature map Φ, ready to be multiplied.

    Attributes:
        values: float32 [1, n, D], or int8 [planes, n, D].
        units: float32 [n, pieces], what one unit of `values` is worth in each piece of columns; None for float32.
        pieces: the columns that are multiplied together.
        normalised: the kernel is a cosine.
        arithmetic: how they are multiplied, one of `ARITHMETICS`.
    """

    values: Tensor
    units: Tensor | None
    pieces: tuple[slice, ...]
    normalised: bool
    arithmetic: str

    def __len__(self) -> int:
        """Rows."""
        return self.values.shape[1]

    @classmethod
    def empty(cls, n: int, c: int, K: int, *, normalised: bool, arithmetic: str) -> Operand:
        """Room for n rows of D = c · K values, `bytes_a_row` each; K values in a row share a unit."""
        dtype = np.float32 if arithmetic == "float32" else np.int8
        shape = (PLANES.get(arithmetic, 1), n, c * K)
        values = torch.from_numpy(np.empty(shape, dtype))  # by NumPy, which asks for huge pages; torch does not
        if arithmetic == "float32":
            return cls(values, None, (slice(0, c * K),), normalised, arithmetic)
        starts = range(0, K, MOST_COLUMNS)
        pieces = tuple(slice(j * K + at, j * K + min(at + MOST_COLUMNS, K)) for j in range(c) for at in starts)
        return cls(values, torch.empty(n, len(pieces)), pieces, normalised, arithmetic)

    def fill(self, start: int, phi: Tensor, factors: Tensor, rows: Sequence[int]) -> None:
        """Put some rows in their place.

        Args:
            start: place of the first.
            phi: float32 [r, c, K]; overwritten.
            factors: float64 [r, c], by which rows are multiplied; one over a norm where products might overflow.
            rows: their indices, for messages.

        Raises:
            UsageError: rounding would lose too much of a row.
        """
        r, c, K = phi.shape
        values = self.values[:, start : start + r]
        if self.units is None:
            torch.mul(phi, factors.float()[..., None], out=values[0].unflatten(1, (c, K)))
            return
        places = values.unflatten(2, (c, K))
        units = round_rows(phi, factors, self.arithmetic, places, rows, normalised=self.normalised)
        self.units[start : start + r] = units.repeat_interleave(len(self.pieces) // c, dim=1)


def bytes_a_row(D: int, arithmetic: str) -> int:
    """What an operand holds of one row of D values, its units excepted."""
    return 4 * D if arithmetic == "float32" else PLANES[arithmetic] * D


def multiply(a: Sequence[Operand], b: Operand, workers: Workers | None = None) -> np.ndarray:
    """Inner products of prepared rows, float32 [Σ n_a, n_b].

    Args:
        a: operands of consecutive rows.
        b: the columns' operand; it may be one of the rows', and then only one half of their square is computed.
        workers: share the work; None computes in the calling thread.

    Holds the result, and where rows were rounded four values of 4 bytes for each value of the jobs at work.
    """
    out = torch.empty(sum(map(len, a)), len(b))
    jobs: list[Callable[[], None]] = []
    at, square = 0, None
    for rows in a:
        tile = out[at : at + len(rows)]
        for low in range(0, len(rows), _JOB_ROWS):
            high = min(low + _JOB_ROWS, len(rows))
            left = low if rows is b else 0
            jobs.append(partial(_product, rows, slice(low, high), b, slice(left, None), tile[low:high, left:]))
        square = tile if rows is b else square
        at += len(rows)
    if workers is None or out.numel() * b.values.shape[2] < _SMALL:
        for job in jobs:
            job()
    else:
        workers.map(lambda job: job(), jobs)
    if square is not None:
        square.copy_(square.triu() + square.triu(1).T)  # symmetric to the last bit
        if b.normalised:
            square.fill_diagonal_(1.0)
    return out.numpy()


def _product(a: Operand, rows: slice, b: Operand, columns: slice, out: Tensor) -> None:
    """Some rows of `a` times some of `b`, to float32 `out`."""
    left, right = a.values[:, rows], b.values[:, columns]
    if a.units is None or b.units is None:
        torch.mm(left[0], right[0].T, out=out)
        return
    left_units, right_units = a.units[rows], b.units[columns]
    part = torch.empty(out.shape)
    out.zero_()
    for i, piece in enumerate(b.pieces):
        exact_product(left[:, :, piece], right[:, :, piece], part)
        out.addcmul_(part.mul_(left_units[:, i : i + 1]), right_units[:, i])
