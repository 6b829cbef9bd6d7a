"""Ctrl-C and SIGTERM: what is kept, and how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """Say `kept()` of a command that is stopped in here."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(stop, kept()) from stop


def rows_kept(store: Path) -> str:
    """What is kept of a store that a command was writing."""
    import gradstore as gs

    try:
        found = gs.open(store)
    except gs.GradstoreError:
        return f"nothing is stored yet; {AGAIN}"
    return f"{len(found):,} of {found.manifest.n:,} rows are stored in {shlex.quote(str(store))}; {ON}"
