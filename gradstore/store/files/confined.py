"""Run a script on what nobody trusts, in a process of its own that may take little memory and time, and write nothing.

What may crash, hang or take all memory does so there. This file is also what that process runs first: it gives up what
the script must not have, then becomes the script.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

_SECONDS_MORE = 10  # of real time than of the processor's, before an answer is given up


class Unanswered(str):
    """Why there is no answer: "a process that …"."""


def answer_of(script: Path, *arguments: str, memory: int = 1 << 30, seconds: int = 10) -> Any:
    """What a script prints as JSON, or text that says why it prints none.

    Args:
        script: a file of this package; it need not be importable.
        *arguments: of the script; no zero bytes.
        memory: bytes of address space that it may take.
        seconds: of processor time that it may take.

    Returns:
        The value, or `Unanswered` where the script crashed, hung, took too much or could not be started.
    """
    # Nothing of the user's environment reaches the script, so no HDF5 plug-in path does.
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = {**kept, **one_thread, "HDF5_PLUGIN_PRELOAD": "::", "HDF5_USE_FILE_LOCKING": "FALSE"}
    command = [sys.executable, "-I", __file__, str(memory), str(seconds), str(script), *arguments]
    most = seconds + _SECONDS_MORE
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, timeout=most, stdin=subprocess.DEVNULL, check=False
        )
        return json.loads(done.stdout) if done.returncode == 0 else _ended(done.returncode, memory, done.stderr)
    except subprocess.TimeoutExpired:
        return Unanswered(f"a process that gave no answer within {most} s")
    except OSError as error:
        return Unanswered(f"a process that could not be started: {error.strerror}")
    except ValueError:
        return Unanswered("a process whose answer cannot be read")


def _ended(status: int, memory: int, said: bytes) -> Unanswered:
    if b"MemoryError" in said or b"bad_alloc" in said:
        return Unanswered(f"a process that took more than {memory >> 20} MB")
    if status >= 0:
        return Unanswered(f"a process that ended with status {status}")
    known = {number.value: number.name for number in signal.Signals}
    return Unanswered(f"a process that was ended by {known.get(-status, f'signal {-status}')}")


def confine(memory: int, seconds: int) -> None:
    """Give up writing files, and all but some memory and time."""
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


if __name__ == "__main__":
    confine(int(sys.argv[1]), int(sys.argv[2]))
    del sys.argv[:3]
    runpy.run_path(sys.argv[0], run_name="__main__")
