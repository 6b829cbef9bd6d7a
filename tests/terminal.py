"""A command in a pseudo-terminal, as a person runs it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROGRAM = "import sys, gradstore_cli; sys.argv = ['gradstore', *sys.argv[1:]]; gradstore_cli.main()"
SCREENS = [  # columns, and what people have set
    (40, {}),
    (80, {}),
    (160, {}),
    (80, {"TERM": "dumb"}),
    (80, {"NO_COLOR": "1"}),
    (80, {"FORCE_COLOR": "1"}),
]


@dataclass(frozen=True)
class Screen:
    """What a command left: its exit status, and all that it wrote."""

    status: int
    text: str

    @property
    def went_well(self) -> bool:
        return self.status == 0 and "Traceback" not in self.text and "bug:" not in self.text


def in_terminal(folder: Path, *words: str, columns: int = 80, **more: str) -> Screen:
    """Run ``gradstore words`` in a folder, in a terminal of so many columns."""
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "PYTHONPATH": path, **more}
    master, slave = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, *words]
    process = subprocess.Popen(command, cwd=folder, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    text = b""
    while part := _read(master):
        text += part
    os.close(master)
    return Screen(process.wait(60), text.decode())


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other side has been closed
        return b""
