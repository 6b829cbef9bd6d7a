"""Which path a GPU takes: the first that proved itself there.

A kernel that is wrong on a card must not cost a user anything but speed. So each path is checked before it is first
used on a device, and what was found is kept.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from gradstore.errors import GradstoreError
from gradstore.machine.clock import now_utc
from gradstore.projection import self_check, verdicts
from gradstore.projection.check_apart import check_apart
from gradstore.projection.device_paths import PATHS, GpuPath
from gradstore.projection.kinds import DEFAULT
from gradstore.projection.verdicts import Verdict

_log = logging.getLogger(__name__)

Judge = Callable[[GpuPath, int, str, str], Verdict]


@dataclass(frozen=True)
class Choice:
    """The path that a device takes.

    Attributes:
        path: None for the reference in torch.
        passed_over: why each faster path is not taken.
    """

    path: GpuPath | None
    passed_over: tuple[str, ...]


def chosen(index: int | None, kind: str, precision: str) -> Choice:
    """Choose the path of a CUDA device (None: the current one); the first call checks what has no verdict yet.

    Warns once where a faster path is passed over.

    Returns:
        The first that proved itself, or the reference.
    """
    return _chosen(torch.cuda.current_device() if index is None else index, kind, precision)


@cache
def _chosen(index: int, kind: str, precision: str) -> Choice:
    choice = choose(PATHS, index, kind, precision, verdict)
    if choice.passed_over:
        taken = f"by {choice.path.name}" if choice.path else "with the slow reference"
        reasons = "; ".join(choice.passed_over)
        again = "; `gradstore doctor --again` checks anew"
        text = f"projecting {taken} on {torch.cuda.get_device_name(index)}: {reasons}{again}"
        warnings.warn(text, RuntimeWarning, stacklevel=5)
    return choice


def choose(paths: Sequence[GpuPath], index: int, kind: str, precision: str, judge: Judge) -> Choice:
    """The first of some paths that the device could have, that is installed, and that is judged to be right."""
    passed_over: list[str] = []
    for path in (path for path in paths if path.suits(index, kind)):
        why = path.missing(index) or judge(path, index, kind, precision).fault
        if not why:
            return Choice(path, tuple(passed_over))
        passed_over.append(f"{path.name}: {why}")
    return Choice(None, tuple(passed_over or [f"no path is for {kind} products on such a device"]))


def verdict(path: GpuPath, index: int, kind: str, precision: str, *, again: bool = False) -> Verdict:
    """Judge a path.

    Returns:
        The verdict that is kept or, where there is none or `again` is set, that of a new check.

    Raises:
        GradstoreError: the path had to be checked by this process, and hung the device.
    """
    found = None if again else verdicts.kept(path, index, kind, precision)
    if found is None:
        device = torch.cuda.get_device_name(index)
        _log.info("checking %s for %s %s products on %s, once", path.name, kind, precision, device)
        found = check_apart([str(index), path.name, kind, precision]) or _check_here(path, index, kind, precision)
        if found.lasting:
            verdicts.keep(path, index, kind, precision, found)
    return found


def outlook(index: int, kind: str = DEFAULT, precision: str = "fast") -> str:
    """Which path a device takes, for people, as far as it is known without a check."""
    unknown = Verdict("", at="")

    def known(path: GpuPath, *asked: object) -> Verdict:
        return verdicts.kept(path, index, kind, precision) or unknown

    choice = choose(PATHS, index, kind, precision, known)
    reasons = [f"not {reason}" for reason in choice.passed_over]
    if choice.path is None:
        return "; ".join(["the slow reference in torch", *reasons])
    at = known(choice.path).at
    return "; ".join([f"{choice.path.name} ({f'checked {at}' if at else 'its first use checks it'})", *reasons])


@contextmanager
def explained(index: int | None, kind: str, precision: str) -> Iterator[None]:
    """Within: a device that fails because a product gave up waiting says so, and its path is trusted no more.

    Raises:
        GradstoreError: instead of the device's own error, which it has as its cause.
        RuntimeError: the device's own, where no product gave up waiting.
    """
    try:
        yield
    except RuntimeError as error:
        number = torch.cuda.current_device() if index is None else index
        path = chosen(number, kind, precision).path
        why = path.gave_up(number) if path else ""
        if path is None or not why:
            raise
        fault = f"it gave up waiting for {why} in a run"
        verdicts.keep(path, number, kind, precision, Verdict(fault, at=now_utc()))
        raise GradstoreError(
            "the projection does not go on",
            where=f"cuda:{number}",
            got=f"{path.name} gave up waiting for {why}",
            hint="The same command with --allow-other-versions goes on by another way; "
            "`gradstore doctor --again` checks this one anew",
        ) from error


def _check_here(path: GpuPath, index: int, kind: str, precision: str) -> Verdict:
    """In this process, where no other can have the device; a path that hangs leaves it of no use."""
    device, tiles, began = torch.device("cuda", index), path.rows(kind, precision), time.monotonic()
    try:
        with torch.cuda.device(index):
            finished = self_check.on_device(index)
            solved = self_check.check(path.product(index), kind, precision, tiles, device, finished=finished)
    except self_check.HangError as hang:
        verdicts.keep(path, index, kind, precision, Verdict(str(hang), at=now_utc()))
        raise GradstoreError(
            f"{path.name} hung the device when it was checked",
            where=f"cuda:{index}",
            got=str(hang),
            hint="Run the same command again, which takes another way",
        ) from hang
    except self_check.CheckError as failure:
        return Verdict(str(failure), 0, failure.lasting, round(time.monotonic() - began, 1), now_utc())
    return Verdict("", solved, seconds=round(time.monotonic() - began, 1), at=now_utc())
