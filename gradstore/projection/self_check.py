"""A path proves itself: small odd problems, on the device, against float64 products with the entries of P.

Signs must come out bit for bit where gradients are small integers or one-hot, normals and uneven gradients within the
precision's tolerance. Between them the problems have ragged rows, K and p, starts that are not aligned and lie beyond
2^32, rows of P up to 2^31, several spans, and more work than a device does at once.

Run as a program it checks one path of one device, a JSON line before each problem, so that a device that hangs or dies
takes a process of its own with it; see `check_apart.py`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gradstore.projection.device_paths import PATHS, Accumulate
from gradstore.projection.entries import Entries
from gradstore.projection.kinds import kind_of

TOLERANCE = {"fast": 4e-4, "exact": 3e-6}  # relative error of the feature vectors of a problem
FINISH_SECONDS = 5.0  # for a problem that takes milliseconds
_SEED, _STREAM = 2**63 + 5, 3
_WIDER = 16  # more rows of a sparse P, of which 1 in 1024 of a column is not zero
_OUTLIER = 30.0  # times the tolerance of a typical value, from which a single value is called wrong


@dataclass(frozen=True)
class Problem:
    """A product to compute, and to what it is added.

    Attributes:
        gradients: "one-hot", "integers" or "uneven".
        rows: of gradients.
        columns: parameters.
        count: rows of P.
        start: the first parameter.
        first_k: the first row of P.
        dtype: of the gradients; one-hot ones and small integers are exact in each.
        workspace: bytes for a launch; None for what the path takes of itself.
    """

    gradients: str
    rows: int
    columns: int
    count: int
    start: int
    first_k: int
    dtype: torch.dtype = torch.float32
    workspace: int | None = None

    def __str__(self) -> str:
        """As messages name it."""
        shape = f"{self.rows} x {self.columns} by {self.count} rows of P"
        kind = f"{self.gradients} {str(self.dtype).removeprefix('torch.')} gradients"
        launches = "" if self.workspace is None else f", {self.workspace >> 20} MB a launch"
        return f"{kind}, {shape}, from parameter {self.start} and row {self.first_k} on{launches}"

    def block(self) -> Tensor:
        """The gradients, `dtype` [rows, columns]."""
        generator = torch.Generator().manual_seed(self.rows + self.columns)
        shape = self.rows, self.columns
        if self.gradients == "one-hot":
            block = torch.zeros(shape, dtype=self.dtype)
            block[torch.arange(self.rows), torch.arange(self.rows) * 5 % self.columns] = 1.0
            return block
        if self.gradients == "integers":
            return torch.randint(-8, 9, shape, generator=generator, dtype=torch.int8).to(self.dtype)
        spread = torch.randn(shape, generator=generator).mul_(2).exp_()
        return (torch.randn(shape, generator=generator) * spread).to(self.dtype)


class CheckError(Exception):
    """A problem that was not solved; its text is one clause.

    Attributes:
        lasting: whether it says something of the path, and not only of this moment: memory that ran out, or a device
            that is busy and looks as if it hung.
    """

    def __init__(self, text: str, *, lasting: bool) -> None:
        super().__init__(text)
        self.lasting = lasting


class HangError(CheckError):
    """A product that did not end: nothing else can be done on the device by this process."""


def problems(tiles: tuple[int, ...], *, crowd: bool, sparse: bool = False) -> Iterator[Problem]:
    """List the problems for a path whose compiled variants compute these numbers of rows at a time.

    Args:
        tiles: the numbers of rows.
        crowd: also some that are more work than a large device does at once.
        sparse: with `_WIDER` times as many rows of P, so that every column has non-zeros in them.

    Yields:
        The problems, always the same.
    """
    for problem in _narrow_problems(tiles, crowd=crowd):
        count = problem.count * (_WIDER if sparse else 1)
        yield replace(problem, count=count, first_k=min(problem.first_k, 2**31 - count))


def _narrow_problems(tiles: tuple[int, ...], *, crowd: bool) -> Iterator[Problem]:
    """See `problems`."""
    for rows in tiles:
        yield Problem("one-hot", rows, 256, 128, 0, 0)
        yield Problem("integers", rows - 3, 777, 300, 2**40 + 100, 9, torch.float16)
        yield Problem("uneven", rows, 9000, 257, 8192 * 3 - 129, 2**31 - 257)
    most = tiles[-1]
    yield Problem("one-hot", most + 1, 1300, 333, 2**33 + 7, 2**20)
    yield Problem("integers", 1, 1, 1, 0, 0)
    # Scales that differ from row to row and span to span, in several tiles.
    yield Problem("uneven", most + 1, 9000, 129, 4096 * 7 + 5, 3)
    # Carries of the generator's counter; many launches, whose memory is used again and again.
    yield Problem("integers", 5, 2000, 40, (2**32 - 7) * 128, 0, torch.bfloat16)
    yield Problem("integers", most + 1, 60000, 70, 8192 - 128, 1, torch.float16, 1 << 20)
    if crowd:
        yield Problem("integers", 3 * most + 1, 40000, 3000, 8192 - 128, 1)
        yield Problem("integers", 3 * most + 1, 100000, 1500, 128, 1, torch.bfloat16, 8 << 20)


def check(
    accumulate: Accumulate,
    kind: str,
    precision: str,
    tiles: tuple[int, ...],
    device: torch.device,
    *,
    finished: Callable[[], Callable[[], bool]],
    begin: Callable[[Problem], None] = lambda problem: None,
    crowd: bool = True,
) -> int:
    """Solve all problems on a device and compare.

    Args:
        accumulate: of the path.
        kind: of the entries, a name of `kinds.KINDS`.
        precision: "fast" or "exact".
        tiles: see `problems`.
        device: where the tensors are.
        finished: after a product was queued, gives a call that says whether it has ended.
        begin: told of each problem before it is solved.
        crowd: see `problems`.

    Returns:
        How many problems there were.

    Raises:
        CheckError: the first problem that came out wrong, or raised, and how.
        HangError: the first that did not end within `FINISH_SECONDS`.
    """
    solved = 0
    for problem in problems(tiles, crowd=crowd, sparse=kind_of(kind).sparse is not None):
        begin(problem)
        _solve(accumulate, Entries(kind, _SEED, _STREAM), precision, problem, device, finished)
        solved += 1
    return solved


def _solve(
    accumulate: Accumulate,
    entries: Entries,
    precision: str,
    problem: Problem,
    device: torch.device,
    finished: Callable[[], Callable[[], bool]],
) -> None:
    block = problem.block()
    out = torch.full((problem.rows, problem.count), 2.0, device=device)
    try:
        workspace = problem.workspace
        product = accumulate if workspace is None else partial(accumulate, workspace=workspace)
        product(entries, out, block.to(device), problem.start, problem.first_k, precision)
        _wait(finished(), problem)
        got = out.cpu()
    except CheckError:
        raise
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        raise CheckError(f"{type(error).__name__}: {line} ({problem})", lasting=not _passing(error)) from error
    k = _sample(problem.count) if entries.record.sparse is None else torch.arange(problem.count)
    want = 2 + expected(entries, block, problem.start, problem.first_k + k)
    exact = entries.record.integers and problem.gradients != "uneven"
    require_equal(got[:, k], want, 0.0 if exact else TOLERANCE[precision], problem, k)


def expected(entries: Entries, block: Tensor, start: int, k: Tensor) -> Tensor:
    """Multiply by the entries of a dense P, or by the non-zeros of a sparse one, in float64.

    Args:
        entries: the matrix P.
        block: any float dtype [rows, p].
        start: the first parameter.
        k: int64 [m] on the block's device; of a sparse P neighbours, ascending.

    Returns:
        ``block @ P[k, start : start + p].T``.
    """
    rows = block.double()
    if entries.record.sparse is None:
        return rows @ entries.columns(k, start, start + block.shape[1]).T
    first, stop, size = int(k[0]), int(k[-1]) + 1, entries.record.sparse.block
    places, values = entries.nonzeros(first, stop, start + torch.arange(block.shape[1], device=block.device))
    total = torch.zeros(len(places) * size, len(block), dtype=torch.float64, device=block.device)
    for place, value in zip(places - first // size * size, values, strict=True):
        total.index_add_(0, place, rows.T * value[:, None])
    return total[first % size : first % size + len(k)].T


def _passing(error: Exception) -> bool:
    """Whether an error says more of the moment than of the path."""
    text = str(error).lower().replace("_", " ")
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError, OSError)) or "out of memory" in text


def _sample(count: int) -> Tensor:
    """Which rows of P are compared: all of a few, and some of each tile of many."""
    return torch.arange(count) if count <= 400 else torch.arange(0, count, count // 150)


def require_equal(got: Tensor, want: Tensor, tolerance: float, problem: object, k: Tensor) -> None:
    """Compare values [rows, k] with float64 ones; a tolerance of 0 asks for the same bits.

    Raises:
        CheckError: names the first wrong value, and how many there are.
    """
    got = got.double()
    error = float((got - want).norm() / want.norm())
    if bool(torch.isfinite(got).all()) and (torch.equal(got, want) if tolerance == 0 else error < tolerance):
        return
    typical = want.abs().mean() * tolerance * _OUTLIER
    wrong = torch.nonzero(~((got - want).abs() <= typical))
    if len(wrong) == 0:  # many small differences
        text = f"relative error {error:.1e} where {tolerance:.0e} is allowed ({problem})"
        raise CheckError(text, lasting=True)
    row, place = wrong[0].tolist()
    values = f"{got[row, place].item():.7g} instead of {want[row, place].item():.7g}"
    where = f"{len(wrong)} of {got.numel()} values are wrong, first row {row}, k {int(k[place])}"
    raise CheckError(f"{where}: {values} ({problem})", lasting=True)


def _wait(finished: Callable[[], bool], problem: Problem) -> None:
    """Poll, since waiting for a device that hangs would never end."""
    end = time.monotonic() + FINISH_SECONDS
    while not finished():
        if time.monotonic() > end:
            raise HangError(f"it did not end within {FINISH_SECONDS:.0f} s ({problem})", lasting=False)
        time.sleep(0.0002)


def on_device(index: int) -> Callable[[], Callable[[], bool]]:
    """For `check`: looks at an event behind what was queued on a CUDA device."""
    return lambda: torch.cuda.current_stream(index).record_event().query


def main(arguments: list[str]) -> None:
    """Check one path of one device: index, path, kind, precision."""
    index, (name, kind, precision) = int(arguments[0]), arguments[1:4]
    path = next(path for path in PATHS if path.name == name)
    device = torch.device("cuda", index)
    try:
        torch.zeros(1, device=device)
        torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:  # as where it is for one process alone
        _say(unavailable=str(error).split("\n")[0])
        return
    report(path.product(index), kind, precision, path.rows(kind, precision), device, on_device(index))


def report(
    accumulate: Accumulate,
    kind: str,
    precision: str,
    tiles: tuple[int, ...],
    device: torch.device,
    finished: Callable[[], Callable[[], bool]],
    *,
    crowd: bool = True,
) -> None:
    """Print what `check` finds, as `check_apart` reads it, and leave the process."""
    _say(ready=True)
    try:
        count = check(
            accumulate,
            kind,
            precision,
            tiles,
            device,
            finished=finished,
            begin=lambda problem: _say(problem=str(problem)),
            crowd=crowd,
        )
        _say(proved=count)
    except CheckError as failure:
        _say(fault=str(failure), lasting=failure.lasting)
    os._exit(0)  # leaving in the ordinary way would wait for the device


def _say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
