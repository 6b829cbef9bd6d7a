"""Inner products of feature rows in one of three arithmetics, cut into jobs for worker threads.

"bfloat16x2" multiplies rows as they are stored, each value as two bfloat16 limbs, on the processor's matrix unit
(`gradstore.matrix_unit.product`); "float32" multiplies float32 rows by BLAS; "int8" multiplies rounded rows exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import UsageError
from gradstore.matrix_unit import product
from gradstore.rounding import MOST_COLUMNS, exact_product, round_rows
from gradstore.threads import Workers

LIMBS = "bfloat16x2"
ARITHMETICS = ("float32", LIMBS, "int8")

_CPU = torch.device("cpu")
# Rows of one job of BLAS: enough for a good product, few enough to share a tile out evenly.
_JOB_ROWS = 256
# Rows that the matrix unit computes together.
_WHOLE = 32
# Multiply-adds below which handing a job to another thread costs more than the job.
_SMALL = 1 << 22


def choose_arithmetic(name: str, device: torch.device = _CPU) -> str:
    """The arithmetic of a name; "auto" is bfloat16x2 on a processor with a matrix unit, and float32 elsewhere.

    Raises:
        UsageError: there is none of that name, or none on this machine or device.
    """
    if name not in ("auto", *ARITHMETICS):
        raise UsageError(
            "unknown arithmetic",
            where="--arithmetic",
            expected=f"one of auto, {', '.join(ARITHMETICS)}",
            got=repr(name),
        )
    if device.type == "cuda":
        if name in ("auto", "float32"):
            return "float32"
        raise UsageError(
            "not an arithmetic of a GPU",
            where="--arithmetic",
            expected="float32",
            got=repr(name),
            hint="Use --device cpu for another",
        )
    if name == LIMBS and not product.available():
        raise UsageError(
            "this processor has no matrix unit, or gradstore was installed without a C++ compiler",
            where="--arithmetic",
            expected="AMX with bfloat16",
            got=repr(name),
            hint="Use --arithmetic auto",
        )
    if name == "auto":
        return LIMBS if product.available() else "float32"
    return name


@dataclass(frozen=True, eq=False)
class Operand:
    """Rows of a feature map Φ, ready to be multiplied.

    Attributes:
        values: [n, D]; float32, int8, or as stored.
        worth: float32 [pieces, n], what one unit of `values` is worth in each piece of columns; None for float32.
        pieces: the columns that are multiplied together.
        normalised: the kernel is a cosine.
        arithmetic: how they are multiplied, one of `ARITHMETICS`.
        whole: rows that these are a part of, and the place of the first in them; None where they are all.
    """

    values: Tensor
    worth: Tensor | None
    pieces: tuple[slice, ...]
    normalised: bool
    arithmetic: str
    whole: tuple[Operand, int] | None = None

    def __len__(self) -> int:
        """Rows."""
        return len(self.values)

    @classmethod
    def empty(
        cls, n: int, c: int, K: int, *, normalised: bool, arithmetic: str, dtype: torch.dtype = torch.float32
    ) -> Operand:
        """Room for n rows of D = c · K values, `bytes_a_row` each; K values in a row share what they are worth.

        Args:
            n: rows.
            c: classes, or 1.
            K: values of a class.
            normalised: the kernel is a cosine.
            arithmetic: one of `ARITHMETICS`.
            dtype: float16 or float32, of the values of bfloat16x2.
        """
        held = _held_dtype(arithmetic, dtype)
        # by NumPy, which asks for huge pages; torch does not
        values = torch.from_numpy(np.empty((n, c * K), str(held).removeprefix("torch.")))
        if arithmetic == "float32":
            return cls(values, None, (slice(0, c * K),), normalised, arithmetic)
        most = MOST_COLUMNS if arithmetic == "int8" else K
        pieces = tuple(slice(j * K + at, j * K + min(at + most, K)) for j in range(c) for at in range(0, K, most))
        return cls(values, torch.empty(len(pieces), n), pieces, normalised, arithmetic)

    def to(self, device: torch.device) -> Operand:
        """The same rows on a device; of float32 only."""
        return replace(self, values=self.values.to(device))

    def part(self, start: int, stop: int) -> Operand:
        """Some of the rows, sharing memory."""
        worth = None if self.worth is None else self.worth[:, start:stop]
        return replace(self, values=self.values[start:stop], worth=worth, whole=(self, start))

    def fill(self, start: int, phi: Tensor, factors: Tensor, rows: Sequence[int]) -> None:
        """Put some rows in their place.

        Args:
            start: place of the first.
            phi: [r, c, K], float32 and overwritten; for bfloat16x2 of any dtype that this operand's holds.
            factors: float64 [r, c], by which rows are multiplied; one over a norm where products might overflow.
            rows: their indices, for messages.

        Raises:
            UsageError: rounding would lose too much of a row.
        """
        places = self.values[start : start + len(phi)].view(phi.shape)
        if self.worth is None:
            torch.mul(phi, factors.float()[..., None], out=places)
        elif self.arithmetic == LIMBS:
            places.copy_(phi)
            self.set_worth(start, factors)
        else:
            self.set_worth(start, round_rows(phi, factors, places, rows, normalised=self.normalised))

    def set_worth(self, start: int, worth: Tensor) -> None:
        """Say what values of some rows are worth, [r, c]; with the values in place they are then ready."""
        assert self.worth is not None
        each = len(self.worth) // worth.shape[1]
        self.worth[:, start : start + len(worth)] = worth.T.repeat_interleave(each, dim=0)


def bytes_a_row(D: int, arithmetic: str, dtype: torch.dtype = torch.float32) -> int:
    """What an operand holds of one row of D values, what they are worth excepted."""
    return D * _held_dtype(arithmetic, dtype).itemsize


def workspace_bytes(arithmetic: str, width: int) -> tuple[int, int]:
    """Bytes that a job takes beside operands and result: always, and for each of the columns' rows.

    Args:
        arithmetic: one of `ARITHMETICS`.
        width: values of a class.
    """
    return product.workspace_bytes(width) if arithmetic == LIMBS else (0, 0)


def multiply(a: Sequence[Operand], b: Operand, workers: Workers | None = None) -> np.ndarray:
    """Inner products of prepared rows, float32 [Σ n_a, n_b].

    Args:
        a: operands of consecutive rows; parts of one operand that follow one another are multiplied together.
        b: the columns' operand; it may be the last of the rows', and then only one half of their square is computed.
        workers: share the work; None computes in the calling thread, or where the operands are on a GPU there.

    Holds the result, and for int8 two values of 4 bytes for each value of the jobs at work.
    """
    out = torch.empty(sum(map(len, a)), len(b), device=b.values.device)
    square = len(out) - len(b) if a[-1] is b else None
    jobs: list[Callable[[], None]] = []
    at = 0
    for rows in _joined(a):
        count = len(rows)
        for low, high in _cuts(rows, at, len(b), square, workers.count if workers else 1):
            diagonal = None if square is None else at + low - square
            jobs.append(partial(_product, rows.part(low, high), b, out[at + low : at + high], diagonal))
        at += count
    if workers is None or out.numel() * b.values.shape[1] < _SMALL:
        for job in jobs:
            job()
    else:
        workers.map(lambda job: job(), jobs)
    if square is not None:
        own = out[square:]
        own.copy_(own.triu() + own.triu(1).T)  # symmetric to the last bit
        if b.normalised:
            own.fill_diagonal_(1.0)
    return out.cpu().numpy()


def _joined(operands: Sequence[Operand]) -> Iterator[Operand]:
    """The same rows in order, those that lie side by side in one operand together."""
    first, count = operands[0], 0
    for operand in operands:
        if count and _follows(operand, first, count):
            count += len(operand)
            continue
        if count:
            yield _longer(first, count)
        first, count = operand, len(operand)
    yield _longer(first, count)


def _follows(operand: Operand, first: Operand, count: int) -> bool:
    if operand.whole is None or first.whole is None:
        return False
    return operand.whole[0] is first.whole[0] and operand.whole[1] == first.whole[1] + count


def _longer(first: Operand, count: int) -> Operand:
    return first.whole[0].part(first.whole[1], first.whole[1] + count) if first.whole else first


def _cuts(rows: Operand, at: int, columns: int, square: int | None, workers: int) -> list[tuple[int, int]]:
    """Jobs' rows: of equal size for BLAS, and for the matrix unit, which gains by long ones, a share a worker."""
    if rows.arithmetic == LIMBS:
        return equal_shares(len(rows), columns, None if square is None else at - square, workers)
    return [(low, min(low + _JOB_ROWS, len(rows))) for low in range(0, len(rows), _JOB_ROWS)]


def equal_shares(rows: int, columns: int, diagonal: int | None, workers: int) -> list[tuple[int, int]]:
    """Rows [low, high) of a product for each worker, that make equal work.

    Args:
        rows: of the product.
        columns: of the product.
        diagonal: the column of the first row's diagonal, left of which nothing is computed; None where all is.
        workers: that share the work.
    """
    places = np.arange(rows) + (-rows if diagonal is None else diagonal)
    work = np.cumsum(columns - np.clip(places, 0, columns))
    ends = np.searchsorted(work, work[-1] * np.arange(1, workers + 1) / workers) + 1
    ends = np.unique(np.minimum(-(-ends // _WHOLE) * _WHOLE, rows)).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _product(a: Operand, b: Operand, out: Tensor, diagonal: int | None) -> None:
    """Rows `a` times rows `b`, to float32 `out`; where the first of `a` is b's row `diagonal`, only right of that."""
    first = 0 if diagonal is None else max(0, diagonal)
    if a.worth is None or b.worth is None:
        torch.mm(a.values, b.values[first:].T, out=out[:, first:])
        return
    out.zero_()
    if a.arithmetic == LIMBS:
        for i, piece in enumerate(b.pieces):
            product.add_product(
                a.values[:, piece],
                b.values[:, piece],
                out,
                left_factors=a.worth[i],
                right_factors=b.worth[i],
                diagonal=diagonal,
            )
        return
    for i, piece in enumerate(b.pieces):
        part = exact_product(a.values[:, piece], b.values[first:, piece]).float()
        out[:, first:].addcmul_(part.mul_(a.worth[i][:, None]), b.worth[i][first:])


def _held_dtype(arithmetic: str, dtype: torch.dtype) -> torch.dtype:
    return {"float32": torch.float32, "int8": torch.int8}.get(arithmetic, dtype)
