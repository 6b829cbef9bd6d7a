"""Which path a GPU takes: the first that proved itself there. Verdicts are kept, by device, versions and sources.

A kernel that is wrong on a card must not cost a user anything but speed. So each path is checked once, in a process of
its own: one that hangs, or leaves the device in an error, takes nothing of the caller's with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from threading import Timer

import torch

from gradstore.errors import GradstoreError
from gradstore.projection import self_check
from gradstore.projection.cuda.source import cache_folder, publish
from gradstore.projection.paths import PATHS, GpuPath

_log = logging.getLogger(__name__)

CHECK_SECONDS = 180.0  # for a whole check: some seconds for torch, one for each variant to compile, and the products
_OWN_SOURCES = ("self_check.py", "entries.py", "philox.py")


@dataclass(frozen=True)
class Verdict:
    """What a check of a path found.

    Attributes:
        fault: what went wrong, or "" if nothing did.
        problems: how many were solved.
        seconds: that it took.
        at: when, in UTC.
    """

    fault: str
    problems: int
    seconds: float
    at: str


@dataclass(frozen=True)
class Report:
    """How a check ended.

    Attributes:
        fault: what went wrong, or "" if nothing did.
        problems: how many were solved.
        hang: whether a product did not end.
    """

    fault: str
    problems: int
    hang: bool = False


@dataclass(frozen=True)
class Choice:
    """The path that a device takes.

    Attributes:
        path: None for the reference in torch.
        passed_over: why each faster path that the device could have is not taken.
    """

    path: GpuPath | None
    passed_over: tuple[str, ...]


@cache
def chosen(index: int | None, kind: str, precision: str) -> Choice:
    """The path for a CUDA device (None: the current one); the first call checks what has no verdict yet.

    Warns once where a faster path is passed over.
    """
    number = torch.cuda.current_device() if index is None else index
    choice = choose(PATHS, number, kind, precision)
    if choice.passed_over:
        taken = f"by {choice.path.name}" if choice.path else "with the slow reference"
        reasons = "; ".join(choice.passed_over)
        warnings.warn(f"projecting {taken} on {torch.cuda.get_device_name(number)}: {reasons}", RuntimeWarning, 4)
    return choice


def choose(paths: Sequence[GpuPath], index: int, kind: str, precision: str) -> Choice:
    """The first of some paths that the device could have, that is installed, and that has proved itself."""
    passed_over: list[str] = []
    for path in paths:
        if not path.suits(index, kind):
            continue
        why = path.missing(index) or verdict(path, index, kind, precision).fault
        if not why:
            return Choice(path, tuple(passed_over))
        passed_over.append(f"{path.name}: {why}")
    return Choice(None, tuple(passed_over))


def verdict(path: GpuPath, index: int, kind: str, precision: str, *, again: bool = False) -> Verdict:
    """The verdict on a path: the one that is kept, or, where there is none or `again` is set, that of a new check."""
    kept = None if again else kept_verdict(path, index, kind, precision)
    if kept is not None:
        return kept
    began = time.monotonic()
    device = torch.cuda.get_device_name(index)
    _log.info("checking %s for %s %s products on %s; its verdict is kept", path.name, kind, precision, device)
    report = check_apart([str(index), path.name, kind, precision])
    if report is None:  # no process of its own can be had, as where a device is for one process alone
        report = _check_here(path, index, kind, precision)
    found = Verdict(report.fault, report.problems, round(time.monotonic() - began, 1), _now())
    # A device that is busy with other work can look like one that hangs, so that is asked again by the next process.
    return found if report.hang else _kept(path, index, kind, precision, found)


@contextmanager
def explained(index: int | None, kind: str, precision: str) -> Iterator[None]:
    """Within: a device that fails because a product gave up waiting says so, and its path is trusted no more.

    Raises:
        GradstoreError: instead of the device's own error, which it has as its cause.
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
        _kept(path, number, kind, precision, Verdict(fault, 0, 0.0, _now()))
        raise GradstoreError(
            "the projection does not go on",
            where=f"cuda:{number}",
            got=f"{path.name} gave up waiting for {why}",
            hint="It will not be used again here: the same command with --allow-other-versions goes on by another way. "
            "`gradstore doctor --again` checks it anew",
        ) from error


def kept_verdict(path: GpuPath, index: int, kind: str, precision: str) -> Verdict | None:
    """The verdict that is kept on a path, without a check; None where there is none."""
    try:
        return Verdict(**json.loads(_file(path, index, kind, precision).read_bytes()))
    except (OSError, ValueError, TypeError):  # missing, or damaged
        return None


def outlook(index: int, kind: str = "rademacher", precision: str = "fast") -> str:
    """Which path a device takes, for people, as far as it is known without a check."""
    passed_over: list[str] = []
    for path in (path for path in PATHS if path.suits(index, kind)):
        why = path.missing(index)
        kept = None if why else kept_verdict(path, index, kind, precision)
        if not why and (kept is None or not kept.fault):
            known = "not checked yet; its first use does that" if kept is None else f"checked {kept.at}"
            return "; ".join((f"{path.name} ({known})", *passed_over))
        passed_over.append(f"not {path.name}: {why or (kept.fault if kept else '')}")
    return "; ".join(("the slow reference in torch", *passed_over))


def check_apart(arguments: Sequence[str], program: Sequence[str] = ("-m", self_check.__name__)) -> Report | None:
    """Check a path in a process of its own.

    Args:
        arguments: of `self_check.main`.
        program: what the interpreter runs; for tests.

    Returns:
        How it ended; None if the process could not even open the device.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, *program, *arguments]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
    except OSError:
        return None
    timer = Timer(CHECK_SECONDS, process.kill)
    timer.start()
    try:
        text, _ = process.communicate()
    finally:
        timed_out = not timer.is_alive()
        timer.cancel()
    return _read_report(text.splitlines(), process.returncode, timed_out=timed_out)


def _read_report(lines: Sequence[str], code: int, *, timed_out: bool) -> Report | None:
    facts: dict[str, object] = {}
    problems = 0
    for line in lines:
        with suppress(ValueError):  # what else the process printed
            said = json.loads(line)
            if isinstance(said, dict):
                facts |= said
                problems += "problem" in said
    if "proved" in facts:
        return Report("", problems)
    solved = max(0, problems - 1)
    if "fault" in facts:
        return Report(str(facts["fault"]), solved, bool(facts.get("hang")))
    if "ready" not in facts:
        return None
    end = "did not end" if timed_out else f"ended with status {code}"
    where = facts.get("problem", "before the first problem")
    return Report(f"the process that checked it {end} ({where})", solved, timed_out)


def _kept(path: GpuPath, index: int, kind: str, precision: str, found: Verdict) -> Verdict:
    with suppress(OSError):  # a cache that cannot be written costs time only
        publish(_file(path, index, kind, precision), json.dumps(asdict(found)).encode())
    return found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _check_here(path: GpuPath, index: int, kind: str, precision: str) -> Report:
    device, tiles = torch.device("cuda", index), path.rows(kind, precision)
    try:
        solved = self_check.check(path.accumulate, kind, precision, tiles, device, finished=self_check.on_device(index))
    except self_check.CheckError as failure:
        return Report(str(failure), 0, isinstance(failure, self_check.HangError))
    return Report("", solved)


def _file(path: GpuPath, index: int, kind: str, precision: str) -> Path:
    """Where a verdict is kept; another device, driver, version or source has another place."""
    properties = torch.cuda.get_device_properties(index)
    device = [properties.name, str(getattr(properties, "uuid", index)), _driver_version()]
    versions = {"torch": torch.__version__, **path.versions()}
    digest = hashlib.sha256(json.dumps([device, versions, path.name, kind, precision]).encode())
    own = (Path(__file__).parent / name for name in _OWN_SOURCES)
    for file in (*own, *path.sources()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return cache_folder() / "proved" / f"{digest.hexdigest()[:32]}.json"


def _driver_version() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return str(torch.version.cuda or torch.version.hip)
