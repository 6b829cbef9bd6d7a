"""The command line: each command parses, makes one call of the library, and prints."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from gradstore.errors import GradstoreError

from .attribute import attribute
from .check import check
from .demo import demo
from .doctor import doctor
from .evaluate import evaluate
from .export import export
from .featurize import featurize
from .fit import fit
from .forensics import forensics
from .gram import gram
from .importing import import_command
from .index import index
from .info import info
from .init import init
from .output import say
from .residual import residual
from .topk import topk
from .verify import verify

TRACEBACK = "--traceback"


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@click.group(
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


for _command in (
    demo,
    init,
    check,
    doctor,
    featurize,
    info,
    index,
    topk,
    forensics,
    gram,
    residual,
    fit,
    attribute,
    evaluate,
    verify,
    export,
    import_command,
):
    gradstore.add_command(_command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status; an error is one line on stderr."""
    given = sys.argv[1:] if arguments is None else arguments
    traceback = TRACEBACK in given
    # Before torch is imported: large buffers in huge pages halve the time it takes to write Jacobian blocks.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_status([word for word in given if word != TRACEBACK], traceback))


def _status(arguments: list[str], traceback: bool) -> int:
    try:
        with _said_in_a_line():
            gradstore.main(arguments, prog_name="gradstore", standalone_mode=False)
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort as stop:
        return _stopped(arguments, stop.__cause__ or stop.__context__)
    except KeyboardInterrupt as stop:
        return _stopped(arguments, stop)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except GradstoreError as error:
        if traceback:
            raise
        say(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except Exception as error:
        if traceback:
            raise
        line = str(error).splitlines()[0] if str(error) else ""
        click.echo(f"bug: {type(error).__name__}: {line} Please report it with the output of {TRACEBACK}.", err=True)
        return 1


class _Notes(logging.Handler):
    """Says what the library logs."""

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
            warnings.showwarning = lambda message, *_, **__: say(f"note: {' '.join(str(message).split())}")
            yield
    finally:
        log.removeHandler(notes)
        log.setLevel(level)


def _terminate(number: int, frame: FrameType | None) -> Any:
    raise Terminated


def _stopped(arguments: list[str], cause: BaseException | None) -> int:
    click.echo(f"stopped; the same command continues:\n  {shlex.join(['gradstore', *arguments])}", err=True)
    return 143 if isinstance(cause, Terminated) else 130
