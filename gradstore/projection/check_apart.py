"""A path is checked in a process of its own: one that hangs, or breaks the device, takes nothing else with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from threading import Timer

from gradstore.machine.clock import now_utc
from gradstore.projection import self_check
from gradstore.projection.verdicts import Verdict

CHECK_SECONDS = 180.0  # for a whole check: some seconds for torch, one for each variant to compile, and the products
# Not `-m`, which looks for modules in the working directory first.
_PROGRAM = f"import sys; sys.path.remove(''); from {self_check.__name__} import main; main(sys.argv[1:])"


def check_apart(arguments: Sequence[str], program: Sequence[str] = ("-c", _PROGRAM)) -> Verdict | None:
    """Check a path in a process of its own.

    Args:
        arguments: of `self_check.main`.
        program: what the interpreter runs; for tests.

    Returns:
        What was found. None where no other process can have the device, or no interpreter can be started.
    """
    if not sys.executable or getattr(sys, "frozen", False):  # which would start the application again
        return None
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("PYTHONSAFEPATH", None)
    began = time.monotonic()
    command = [sys.executable, *program, *arguments]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
    except OSError:
        return None
    timer = Timer(CHECK_SECONDS, process.kill)
    timer.start()
    try:
        said, complaints = process.communicate()
    except BaseException:
        process.kill()
        raise
    finally:
        timed_out = not timer.is_alive()
        timer.cancel()
    seconds = round(time.monotonic() - began, 1)
    end = f"did not end within {CHECK_SECONDS:.0f} s" if timed_out else _ending(process.returncode, complaints)
    return read_report(said.splitlines(), end, seconds)


def read_report(lines: Sequence[str], end: str, seconds: float) -> Verdict | None:
    """The verdict in what `self_check.report` printed, given how its process ended."""
    facts: dict[str, object] = {}
    problems = 0
    for line in lines:
        with suppress(ValueError):  # what else the process printed
            said = json.loads(line)
            if isinstance(said, dict):
                facts |= said
                problems += "problem" in said
    if "unavailable" in facts:
        return None
    if "proved" in facts:
        return Verdict("", problems, seconds=seconds, at=now_utc())
    solved = max(0, problems - 1)
    if "fault" in facts:
        return Verdict(str(facts["fault"]), solved, bool(facts.get("lasting")), seconds, now_utc())
    where = facts.get("problem", "before the first problem")
    return Verdict(f"the process that checked it {end} ({where})", solved, False, seconds, now_utc())


def _ending(code: int, complaints: str) -> str:
    last = complaints.strip().splitlines()[-1:]
    return f"ended with status {code}" + "".join(f": {line}" for line in last)
