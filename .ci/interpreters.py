"""The Python interpreters of this machine that gradstore promises to install on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

OLDEST = (3, 10)  # `requires-python` in pyproject.toml
_PROBE = """import sys
print(sys.implementation.name, "t" in getattr(sys, "abiflags", ""), *sys.version_info[:3])
print(sys.executable)"""


class Interpreter(NamedTuple):
    """A Python that runs.

    Attributes:
        version: such as (3, 12, 1).
        path: of its executable, as it calls it itself; a shim of pyenv's that leads there is none.
    """

    version: tuple[int, int, int]
    path: Path

    def __str__(self) -> str:
        return f"Python {'.'.join(map(str, self.version))} at {self.path}"


def probe(path: Path) -> Interpreter | None:
    """Ask what is at a path which Python it is.

    Returns:
        The interpreter; None where nothing runs there, or what gradstore does not promise: a Python older than
        `OLDEST`, one other than CPython, or one without the interpreter lock.
    """
    try:
        done = subprocess.run([path, "-c", _PROBE], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    described, _, executable = done.stdout.strip().partition("\n")
    words = described.split()
    if done.returncode or words[:2] != ["cpython", "False"]:
        return None
    major, minor, micro = map(int, words[2:])
    return Interpreter((major, minor, micro), Path(executable)) if (major, minor) >= OLDEST else None


def candidates() -> Iterable[Path]:
    """Where interpreters are looked for: ``python3`` and ``python3.N`` on PATH, then the versions of pyenv."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    for pattern in ("python3", "python3.[0-9]", "python3.[0-9][0-9]"):
        for folder in folders:
            yield from sorted(folder.glob(pattern))
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted((root / "versions").glob("*/bin/python"))


def find() -> list[Interpreter]:
    """One interpreter for each promised minor version that is here, the oldest version first."""
    found: dict[tuple[int, int], Interpreter] = {}
    for path in candidates():
        interpreter = probe(path)
        if interpreter:
            found.setdefault(interpreter.version[:2], interpreter)
    return [found[minor] for minor in sorted(found)]
