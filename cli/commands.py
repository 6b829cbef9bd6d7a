"""All commands, each imported when it is run, and what becomes of their errors."""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from gradstore.errors import ClosedError, GradstoreError, NoSpaceError, UsageError

from .output import on_one_line, say, say_error
from .stopping import Stopped, listen, signal_behind

TRACEBACK = "--traceback"
_OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory")  # torch's, of a processor and of a GPU


_WHERE = {  # by name: module and attribute
    **{
        name: (name, name)
        for name in (
            "demo",
            "init",
            "check",
            "doctor",
            "featurize",
            "info",
            "index",
            "topk",
            "forensics",
            "gram",
            "residual",
            "fit",
            "attribute",
            "evaluate",
            "verify",
            "annotate",
            "remove",
            "export",
        )
    },
    "import": ("importing", "import_command"),
}


class _Imported(Mapping[str, click.Command]):
    """The commands by name; to ask for one imports its module, and no other's."""

    def __getitem__(self, name: str) -> click.Command:
        module, attribute = _WHERE[name]
        command: click.Command = getattr(import_module(f".{module}", __package__), attribute)
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(_WHERE)

    def __len__(self) -> int:
        return len(_WHERE)


class _Commands(click.Group):
    """The group of commands, which says itself that it was stopped."""

    def invoke(self, context: click.Context) -> Any:
        """See `click.Group`."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt as stop:
            raise Stopped(stop) from stop
        except BrokenPipeError as error:  # of a process of ours, since stdout has none; click would end without a word
            raise RuntimeError(f"a process has ended early: {error}") from error


@click.group(
    cls=_Commands,
    commands=_Imported(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Results go to stdout, progress and messages to stderr. Every command takes --json.",
)
@click.version_option(package_name="gradstore", message="gradstore %(version)s")
@click.option(TRACEBACK, is_flag=True, help="Show the whole traceback of an error; may stand anywhere on the line.")
def gradstore(traceback: bool) -> None:
    """Find the training examples behind a prediction, from projected per-example gradients.

    \b
    A first look:       gradstore demo
    With your model:    gradstore init, gradstore check project.py, then
      gradstore featurize project.py --split train --out stores/train
      gradstore featurize project.py --split test --out stores/test
      gradstore topk stores/train stores/test --html topk.html
      gradstore forensics stores/train stores/test --html forensics.html
    """  # noqa: D301 - click wants the control character, which keeps the lines as they are


def run(arguments: list[str]) -> None:
    """Run a command and exit with its status; an error is one line on stderr."""
    traceback = TRACEBACK in arguments
    # Before torch is imported: large buffers in huge pages halve the time it takes to write Jacobian blocks.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # A terminal says itself how large it is; these are what it was when a shell exported them.
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)
    listen()
    sys.exit(_status([word for word in arguments if word != TRACEBACK], traceback))


def _status(arguments: list[str], traceback: bool) -> int:
    try:
        with _said_in_a_line():
            gradstore.main(arguments, prog_name="gradstore", standalone_mode=False, terminal_width=_help_width())
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except Stopped as stop:
        return _stopped(arguments, stop)
    except (KeyboardInterrupt, Exception) as error:
        cause = signal_behind(error)
        if cause is not None:
            return _stopped(arguments, Stopped(cause))
        if traceback and not isinstance(error, click.ClickException):
            raise
        return _failed(error)


def _failed(error: BaseException) -> int:
    """Say what a command failed with; the status to end with."""
    if isinstance(error, click.ClickException):
        message = on_one_line(error.format_message())  # click repeats some words just as they were typed
        error.format_message = lambda: message  # type: ignore[method-assign]
        error.show()
        return error.exit_code
    if isinstance(error, ClosedError):  # as for stdout, of which nobody reads any more
        return error.exit_code
    refused = error if isinstance(error, GradstoreError) else refusal(error)
    if refused is not None:
        say_error(refused)
        return refused.exit_code
    line = str(error).splitlines()[0] if str(error) else ""
    say(f"bug: {type(error).__name__}: {line} Please report it with the output of {TRACEBACK}.")
    return 1


def refusal(error: BaseException) -> GradstoreError | None:
    """What the system refuses, a file or memory, as the error it is for a user; None where it is a mistake of ours."""
    if isinstance(error, OSError) and error.filename is not None:
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else UsageError
        return kind("the system refuses it", where=os.fspath(error.filename), got=error.strerror)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))):
        hint = "Ask for less: fewer rows, a smaller -k or --proj-dim, or another --memory"
        return UsageError("the memory of this machine, or what a process may have of it, does not suffice", hint=hint)
    return None


class _Notes(logging.Handler):
    """Says what the library logs, and warnings."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def say_once(self, warning: str) -> None:
        """Say a warning; Python gives it again wherever somebody has changed its filters."""
        if warning not in self._said:
            self._said.add(warning)
            say(f"note: {warning}")

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        say(f"note: {record.getMessage()}")


@contextmanager
def _said_in_a_line() -> Iterator[None]:
    """Warnings, and what the library logs because it takes its time, as one line each, without places in a source."""
    log, notes = logging.getLogger("gradstore"), _Notes()
    level = log.level
    log.addHandler(notes)
    log.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: notes.say_once(" ".join(str(message).split()))
            yield
    finally:
        log.removeHandler(notes)
        log.setLevel(level)


def _stopped(arguments: list[str], stop: Stopped) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the process ends; pressed again, Ctrl-C would add a traceback
    if sys.stderr.isatty():
        click.echo("\r", nl=False, err=True)  # over the ^C that the terminal has shown
    say(f"stopped: {stop}: {shlex.join(['gradstore', *arguments])}")
    return stop.exit_code


def _help_width() -> int | None:
    """Columns of help in a terminal that is narrower than click cares for."""
    columns = shutil.get_terminal_size().columns
    return max(columns, 20) if columns < 52 else None
