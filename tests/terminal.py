"""A command in a pseudo-terminal, and what a person then sees."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyte

CTRL_C = b"\x03"
_ROWS = 300  # of every terminal, so that nothing scrolls away
_WIDE = 1000  # columns in which no line is broken
_SECONDS = 120  # after which a command hangs
_REACTION = 0.3  # seconds after which a person presses a key
_OF_TERMINALS = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHONIOENCODING")
_PROGRAM = (  # as the installed command, in the foreground of its terminal
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "import gradstore_cli; sys.argv = ['gradstore', *sys.argv[1:]]; gradstore_cli.main()"
)


@dataclass(frozen=True)
class Screen:
    """What a command left.

    Attributes:
        status: exit status, negative for a signal.
        columns: width of the terminal.
        written: every byte, control sequences included.
    """

    status: int
    columns: int
    written: bytes

    @property
    def text(self) -> str:
        """What is on the screen in the end."""
        return self._shown(self.columns)

    @property
    def whole_lines(self) -> list[str]:
        """The same lines as they would be if the terminal were wide enough for all."""
        return self._shown(_WIDE).split("\n")

    @property
    def is_left_in_order(self) -> bool:
        """Whether the next prompt begins a line, and has a cursor that is seen and no colour that goes on."""
        screen = _emulated(self.written, self.columns)
        plain = pyte.screens.Char(" ")._asdict()
        prompt = {name: value for name, value in screen.cursor.attrs._asdict().items() if name != "data"}
        return screen.cursor.x == 0 and b"\x1b[?25l" not in self.written and prompt.items() <= plain.items()

    def _shown(self, columns: int) -> str:
        return "\n".join(line.rstrip() for line in _emulated(self.written, columns).display).rstrip()


class Terminals:
    """Runs commands in terminals, by forking from a process that has imported everything: `warm_commands.py`."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._own, slave = pty.openpty()
        script = Path(__file__).with_name("warm_commands.py")
        self._server = subprocess.Popen(
            [sys.executable, str(script), str(theirs.fileno())],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            pass_fds=[theirs.fileno()],
            env=_environment({"OMP_NUM_THREADS": "1"}),  # a process that has threads cannot be forked
        )
        os.close(slave)
        theirs.close()
        self._orders = self._socket.makefile("rw")

    def close(self) -> None:
        self._orders.close()
        self._socket.close()
        self._server.wait(60)
        os.close(self._own)

    def run(
        self,
        folder: Path,
        *words: str,
        columns: int = 80,
        press: tuple[str, bytes] | None = None,
        closed: Sequence[str] = (),
        **more: str,
    ) -> Screen:
        """Run ``gradstore words`` in a folder, in a terminal of so many columns.

        Args:
            folder: to run it in.
            words: of the command.
            columns: of the terminal.
            press: a text, and the keys to press when it has been written.
            closed: stdout or stderr, as `>&-` and `2>&-` close them.
            more: environment variables.
        """
        master, slave = _terminal(columns)
        order = {
            "terminal": os.ttyname(slave),
            "folder": str(folder),
            "words": words,
            "closed": closed,
            "environment": _environment(more),
        }
        print(json.dumps(order), file=self._orders, flush=True)
        written = _watched(master, slave, press, [self._socket.fileno()])
        return Screen(int(self._orders.readline()), columns, written)


def in_terminal(
    folder: Path, *words: str, columns: int = 80, press: tuple[str, bytes] | None = None, **more: str
) -> Screen:
    """The same in a process of its own, which starts as a person's does."""
    master, slave = _terminal(columns)
    command = [sys.executable, "-c", _PROGRAM, *words]
    process = subprocess.Popen(
        command, cwd=folder, stdin=slave, stdout=slave, stderr=slave, env=_environment(more), start_new_session=True
    )
    written = _watched(master, slave, press)
    return Screen(process.wait(60), columns, written)


def _emulated(written: bytes, columns: int) -> pyte.Screen:
    screen = pyte.Screen(columns, _ROWS)
    pyte.ByteStream(screen).feed(written)
    return screen


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _OF_TERMINALS}
    path = os.pathsep.join(filter(None, sys.path))
    return {**kept, "TERM": "xterm-256color", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **more}


def _terminal(columns: int) -> tuple[int, int]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
    return master, slave


def _watched(master: int, slave: int, press: tuple[str, bytes] | None = None, ended: Sequence[int] = ()) -> bytes:
    """All that is written to a terminal until the command has ended.

    The slave is closed once the command has it: when something is written, or, to one of `ended`, that it has ended.
    """
    written, until = b"", time.monotonic() + _SECONDS
    while time.monotonic() < until:
        ready = select.select([master, *ended], [], [], 1)[0]
        if ready and slave >= 0:
            os.close(slave)
            slave, ended = -1, ()
        if master not in ready:
            continue
        try:
            written += os.read(master, 65536)
        except OSError:  # nobody has the terminal open any more
            break
        if press is not None and press[0].encode() in written:
            time.sleep(_REACTION)
            os.write(master, press[1])
            press = None
    else:
        raise TimeoutError(f"the command hangs, having written {written!r}")
    os.close(master)
    return written
