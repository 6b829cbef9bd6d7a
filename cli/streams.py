"""Standard input, output and error as commands need them: there at all, with letters for everything, failing in a line.

Results go to stdout: where they cannot be written, the command ends. Messages go to stderr, and never stop a command.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO, cast

PIPE_CLOSED = 141
"""Exit status where nobody reads stdout any more, as of a program that SIGPIPE ends."""


def prepare() -> None:
    """Make `sys.stdin`, `sys.stdout` and `sys.stderr` usable, whatever this process was started with."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, _nowhere("r" if name == "stdin" else "w"))
    sys.stdout, sys.stderr = _made_printable(sys.stdout, _end), _made_printable(sys.stderr, _go_on)


class _Stream:
    """A stream of which click and rich learn no failure: they would end the command with 1, and without a word."""

    def __init__(self, stream: TextIO, failed: Callable[[OSError], object]) -> None:
        self._stream, self._failed = stream, failed
        self._error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self._error is not None:  # click tries a stream, and passes over what that raises
            self._failed(self._error)
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        """Call it; where that fails, what is left goes nowhere, since Python writes it once more at its end."""
        try:
            call()
        except OSError as error:
            self._error = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self._failed(error)


def _nowhere(mode: str) -> TextIO:
    """A stand-in for a stream that was closed; it takes its number, which the next data file would get otherwise."""
    number = os.open(os.devnull, os.O_RDWR)
    os.set_inheritable(number, True)
    return cast(TextIO, open(number, mode, encoding="utf-8", closefd=False))


def _made_printable(stream: TextIO, failed: Callable[[OSError], object]) -> TextIO:
    """No × or label stops a command where the locale has none; ASCII is taken for a mistake, as click takes it."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # of somebody who calls `main` from Python
    is_ascii = codecs.lookup(stream.encoding).name == "ascii"
    stream.reconfigure(encoding="utf-8" if is_ascii else stream.encoding, errors="backslashreplace")
    return cast(TextIO, _Stream(stream, failed))


def _end(error: OSError) -> None:
    from gradstore.errors import NoSpaceError, UsageError

    if isinstance(error, BrokenPipeError):
        sys.exit(PIPE_CLOSED)
    kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else UsageError
    raise kind("the results cannot be written", where="stdout", got=error.strerror) from error


def _go_on(error: OSError) -> None:
    """Without messages."""
