"""Ctrl-C and SIGTERM: what is kept, and how to go on."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click

AGAIN = "the same command begins again"
ON = "the same command continues"


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


class Stopped(Exception):  # noqa: N818 - no error
    """The command was stopped. No `click.Abort`, for which click writes an empty line.

    Args:
        cause: what stopped it.
        kept: what is kept and how to go on, in words.

    Attributes:
        exit_code: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, cause: KeyboardInterrupt, kept: str = AGAIN) -> None:
        super().__init__(kept)
        self.exit_code = 143 if isinstance(cause, Terminated) else 130


# A condition's lock is taken for good by an exception on the way into or out of its context.
_LOCKING = {threading.Condition.__enter__.__code__, threading.Condition.__exit__.__code__}
_MOMENT = 0.001  # seconds in which it is left
_arrived: list[KeyboardInterrupt] = []


def listen() -> None:
    """Let Ctrl-C and SIGTERM stop this process, and remember that they came.

    Their exception may be raised anywhere, also within the clean-up of a library, which then fails with an error of its
    own. Whatever error a command ends with after a signal, it is the signal that ended it. One that is ignored, as in a
    shell's background, stays so. Within a finalizer, from which nothing can be raised, Python would print it and go on;
    it is silent there, and the command stops at its next count.
    """
    _arrived.clear()
    if not isinstance(sys.unraisablehook, _Silent):
        sys.unraisablehook = _Silent(sys.unraisablehook)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)


class _Silent:
    """What reports errors that could not be raised, without those of a signal.

    Args:
        others: reports them.
    """

    def __init__(self, others: Callable[[sys.UnraisableHookArgs], object]) -> None:
        self._others = others

    def __call__(self, found: sys.UnraisableHookArgs) -> None:
        if found.exc_value not in _arrived:
            self._others(found)


def _raise(number: int, frame: FrameType | None) -> None:
    while frame is not None:  # not only the innermost: another signal may come while the first is put off
        if frame.f_code in _LOCKING:
            threading.Thread(target=_send_again, args=(number,), daemon=True).start()
            return
        frame = frame.f_back
    _arrived.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
    raise _arrived[-1]


def _send_again(number: int) -> None:
    time.sleep(_MOMENT)
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def stop_if_asked() -> None:
    """Stop this command where a signal came and something on its way took the exception for one of its own.

    Raises:
        KeyboardInterrupt: the signal's.
    """
    if _arrived:
        raise _arrived[-1]


def signal_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The signal that a command was stopped by, if it was, whatever error came of it."""
    if isinstance(error, KeyboardInterrupt):
        return error
    return _arrived[-1] if _arrived and isinstance(error, Exception) else None


@contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """Say `kept()` of a command that is stopped in here."""
    try:
        yield
    except (Stopped, click.exceptions.Exit):
        raise
    except BaseException as error:
        stop = signal_behind(error)
        if stop is None:
            raise
        raise Stopped(stop, kept()) from error


def rows_kept(store: Path) -> str:
    """What is kept of a store that a command was writing."""
    import gradstore as gs

    try:
        found = gs.open(store)
    except gs.GradstoreError:
        return f"nothing is stored yet; {AGAIN}"
    return f"{len(found):,} of {found.manifest.n:,} rows are stored in {shlex.quote(str(store))}; {ON}"
