"""Inner products of feature rows, cut into jobs for worker threads; each arithmetic says how it multiplies a job."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from gradstore.arithmetic.names import Choice
from gradstore.errors import UsageError
from gradstore.machine.threads import Workers, one_torch_thread

Rows = TypeVar("Rows", bound="Operand")

# Rows of one job of BLAS: enough for a good product, few enough to share a tile out evenly.
_JOB_ROWS = 256
# Rows that the matrix unit computes together.
_WHOLE = 32
# Multiply-adds below which handing a job to another thread costs more than the job.
_SMALL = 1 << 22


@dataclass(frozen=True, eq=False)
class Operand(ABC):
    """Rows of a feature map Φ, ready to be multiplied in one arithmetic.

    Attributes:
        choice: the arithmetic's name.
        on_gpu: whether rows may be multiplied on a GPU.
        as_stored: whether values are those of a floating-point store, so that rows may be read into them.
        values: [n, D], in the dtype of `held_dtype`.
        worth: float32 [pieces, n], what one unit of `values` is worth in each piece of columns.
        pieces: the columns that share what they are worth, and are multiplied together; none where a value is itself.
        normalised: the kernel is a cosine.
        whole: rows that these are a part of, and the place of the first in them; None where they are all.
    """

    choice: ClassVar[Choice]
    on_gpu: ClassVar[bool] = False
    as_stored: ClassVar[bool] = False
    values: Tensor
    worth: Tensor
    pieces: tuple[slice, ...]
    normalised: bool
    whole: tuple[Operand, int] | None = None

    @classmethod
    def refusal(cls) -> UsageError | None:
        """Why this machine cannot multiply so; None where it can."""
        return None

    @classmethod
    @abstractmethod
    def held_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """In which values are held, of rows whose values fit `dtype`."""

    @classmethod
    @abstractmethod
    def piece_columns(cls, K: int) -> int:
        """The most columns of a class, of K, that are one piece; 0 for no pieces."""

    @classmethod
    def workspace_bytes(cls, width: int) -> tuple[int, int]:
        """Count what a job takes beside operands and result.

        Args:
            width: values of a class.

        Returns:
            Bytes: always, and for each of the columns' rows.
        """
        return 0, 0

    @classmethod
    def bytes_a_row(cls, D: int, dtype: torch.dtype = torch.float32) -> int:
        """What an operand holds of one row of D values, what they are worth excepted."""
        return D * cls.held_dtype(dtype).itemsize

    @classmethod
    def empty(cls: type[Rows], n: int, c: int, K: int, *, normalised: bool, dtype: torch.dtype = torch.float32) -> Rows:
        """Make room for n rows of D = c · K values, `bytes_a_row` each.

        Args:
            n: rows.
            c: classes, or 1.
            K: values of a class.
            normalised: the kernel is a cosine.
            dtype: float16 or float32, in which values fit.

        Returns:
            Operands without values; K values in a row share what they are worth.
        """
        held = str(cls.held_dtype(dtype)).removeprefix("torch.")
        values = torch.from_numpy(np.empty((n, c * K), held))  # by NumPy, which asks for huge pages; torch does not
        most = cls.piece_columns(K)
        starts = [(j * K + at, j * K + min(at + most, K)) for j in range(c) for at in range(0, K, most)] if most else []
        return cls(values, torch.empty(len(starts), n), tuple(slice(*ends) for ends in starts), normalised)

    @abstractmethod
    def fill(self, start: int, phi: Tensor, factors: Tensor, rows: Sequence[int]) -> None:
        """Put some rows in their place.

        Args:
            start: place of the first.
            phi: [r, c, K], float32 and overwritten; where values are `as_stored`, of any dtype that is held.
            factors: float64 [r, c], by which rows are multiplied; one over a norm where products might overflow.
            rows: their indices, for messages.

        Raises:
            UsageError: rounding would lose too much of a row.
        """

    @abstractmethod
    def write_product(self, b: Operand, out: Tensor, diagonal: int | None) -> None:
        """These rows times `b`, of the same arithmetic, to float32 `out` [n, m].

        Args:
            b: the columns' operand.
            out: overwritten.
            diagonal: which of `b` is the first of these rows: values left of that need not be computed; None if none.
        """

    def shares(self, columns: int, diagonal: int | None, workers: int) -> list[tuple[int, int]]:
        """Rows [low, high) of the jobs that a product is cut into; as `equal_shares`."""
        return [(low, min(low + _JOB_ROWS, len(self))) for low in range(0, len(self), _JOB_ROWS)]

    def __len__(self) -> int:
        """Rows."""
        return len(self.values)

    def to(self: Rows, device: torch.device) -> Rows:
        """The same rows on a device; only where rows may be multiplied `on_gpu`."""
        return replace(self, values=self.values.to(device))

    def part(self: Rows, start: int, stop: int) -> Rows:
        """Some of the rows, sharing memory."""
        return replace(self, values=self.values[start:stop], worth=self.worth[:, start:stop], whole=(self, start))

    def places(self, start: int, shape: torch.Size) -> Tensor:
        """Where rows of a shape [r, c, K] are held, from place `start` on."""
        return self.values[start : start + shape[0]].view(shape)

    def set_worth(self, start: int, worth: Tensor) -> None:
        """Say what values of some rows are worth, [r, c]; with the values in place they are then ready."""
        each = len(self.worth) // worth.shape[1]
        self.worth[:, start : start + len(worth)] = worth.T.repeat_interleave(each, dim=0)


def multiply(a: Sequence[Operand], b: Operand, workers: Workers | None = None) -> np.ndarray:
    """Multiply prepared rows.

    Args:
        a: operands of consecutive rows; parts of one operand that follow one another are multiplied together.
        b: the columns' operand; it may be the last of the rows', and then only one half of their square is computed.
        workers: share the work; None computes in the calling thread, or where the operands are on a GPU there.

    Returns:
        Inner products, float32 [Σ n_a, n_b]. Holds them, and for int8 two values of 4 bytes for each value of the jobs
        at work.
    """
    out = torch.empty(sum(map(len, a)), len(b), device=b.values.device)
    square = len(out) - len(b) if a[-1] is b else None
    jobs: list[Callable[[], None]] = []
    at = 0
    for rows in _joined(a):
        count = len(rows)
        diagonal = None if square is None else at - square
        for low, high in rows.shares(len(b), diagonal, workers.count if workers else 1):
            first = None if diagonal is None else diagonal + low
            jobs.append(partial(rows.part(low, high).write_product, b, out[at + low : at + high], first))
        at += count
    if workers is None or out.numel() * b.values.shape[1] < _SMALL:
        with one_torch_thread():  # as a worker would: with some libraries the number of threads decides the last bit
            for job in jobs:
                job()
    else:
        workers.map(lambda job: job(), jobs)
    if square is not None:
        own = out[square:]
        own.copy_(own.triu() + own.triu(1).T)  # symmetric to the last bit
        if b.normalised:
            diagonal_values = own.diagonal()
            diagonal_values.masked_fill_(~diagonal_values.isnan(), 1.0)  # an absent row has no cosine with itself
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


def equal_shares(rows: int, columns: int, diagonal: int | None, workers: int) -> list[tuple[int, int]]:
    """Cut the rows of a product into shares of equal work.

    Args:
        rows: of the product.
        columns: of the product.
        diagonal: the column of the first row's diagonal, left of which nothing is computed; None where all is.
        workers: that share the work.

    Returns:
        (low, high) of the rows of each share, at most one a worker.
    """
    places = np.arange(rows) + (-rows if diagonal is None else diagonal)
    work = np.cumsum(columns - np.clip(places, 0, columns))
    ends = np.searchsorted(work, work[-1] * np.arange(1, workers + 1) / workers) + 1
    ends = np.unique(np.minimum(-(-ends // _WHOLE) * _WHOLE, rows)).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
