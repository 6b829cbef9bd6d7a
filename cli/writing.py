"""Commands that write files: where each may go is asked before the work, so that none fails at the end of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from .options import PathType

F = TypeVar("F", bound=Callable[..., Any])


class OutputFile(PathType):
    """The type of an option that names a file to write.

    Args:
        streams: whether it may be a pipe or a terminal.
    """

    def __init__(self, *, streams: bool = True) -> None:
        super().__init__(streams=True)  # where it may go, `target_of` says
        self.streams = streams


class Writing(click.Command):
    """A command with options of type `OutputFile`."""

    def invoke(self, context: click.Context) -> Any:
        """See `click.Command`.

        Returns:
            What the command does.

        Raises:
            UsageError: an output cannot be written, or is one of the command's other files.
        """
        from gradstore.errors import UsageError
        from gradstore.store.files.target import target_of

        others = list(_paths(context))
        for parameter in self.params:
            path = context.params.get(parameter.name or "")
            if not isinstance(parameter.type, OutputFile) or path is None:
                continue
            target = target_of(path, streams=parameter.type.streams)
            if not target.stream and [_real(other) for other in others].count(_real(path)) > 1:
                raise UsageError(
                    "the output is another file of this command",
                    where=path,
                    expected="a file of its own",
                    hint="Name another file; nothing was touched",
                )
        return super().invoke(context)


def output_option(name: str, what: str, *, required: bool = False, streams: bool = True) -> Callable[[F], F]:
    """An option that names a file to write; `what` is its help."""
    return click.option(name, required=required, type=OutputFile(streams=streams), help=what)


def _paths(context: click.Context) -> Iterator[Path]:
    for value in context.params.values():
        yield from (part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Path))


def _real(path: Path) -> str:
    return os.path.realpath(path)
