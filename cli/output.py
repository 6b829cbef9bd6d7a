"""Printing: JSON, tables, and text in which no label can move the cursor.

A terminal gets lines that fit it; a file or a pipe gets whole lines, however long. Messages on stderr are never broken,
so that a command or a path in one can be copied.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import click
from rich.cells import cell_len

from gradstore.errors import GradstoreError, aligned

_PIECE = 1 << 16  # characters of JSON that are written together
_GAP = 2  # spaces between columns
_UNBOUNDED = 1 << 16  # columns of what is no terminal
_ROOM = 16  # columns within which text is still broken at words
_KEPT = "\n\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"  # Persian and emoji are written with the latter two


def print_json(value: Any) -> None:
    """One JSON value on stdout; an iterator, or what iterators a mapping holds, as lists that are never held."""
    held = ""
    for piece in _json(value):
        held += piece
        if len(held) > _PIECE:
            click.echo(held, nl=False)
            held = ""
    click.echo(held)


def _json(value: Any, indent: str = "") -> Iterator[str]:
    """The text that `json.dumps` with an indent of 2 gives of lists in place of iterators, in pieces."""
    inner = f"\n{indent}  "
    if isinstance(value, Iterator):
        items, brackets = (_json(item, f"{indent}  ") for item in value), "[]"
    elif isinstance(value, Mapping) and any(isinstance(held, Iterator) for held in value.values()):
        items = (chain([f"{json.dumps(name)}: "], _json(held, f"{indent}  ")) for name, held in value.items())
        brackets = "{}"
    else:
        yield json.dumps(value, indent=2, allow_nan=False).replace("\n", f"\n{indent}")
        return
    yield brackets[0]
    some = False
    for item in items:
        yield f",{inner}" if some else inner
        yield from item
        some = True
    yield f"\n{indent}{brackets[1]}" if some else brackets[1]


def say(message: str = "") -> None:
    """One message on stderr; above a bar that is drawn there, whose stand-in for `sys.stderr` click would pass by."""
    print(on_one_line(message), file=sys.stderr, flush=True)


def say_error(error: GradstoreError) -> None:
    """An error on stderr, and below it its table: field by field where a terminal is too narrow for that."""
    say(f"error: {error.line}")
    table = [[on_one_line(cell) for cell in row] for row in error.table]
    lines = aligned(table)
    if max(map(cell_len, lines), default=0) <= _columns(sys.stderr):
        for line in lines:
            say(line)
        return
    (_, *headings), *rows = table
    for field, *values in rows:
        say(f"  {field}")
        for heading, value in zip(headings, values, strict=True):
            say(f"    {heading}: {value}")


def print_path(path: Path) -> None:
    """A path on stdout, as it is for another program and harmless for a terminal."""
    click.echo(on_one_line(str(path)) if sys.stdout.isatty() else path)


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Names and values in two columns on stdout."""
    width = max(map(cell_len, pairs))
    for name, value in pairs.items():
        print_hanging(f"{name}{' ' * (width - cell_len(name) + _GAP)}", value)


def print_hanging(start: str, text: str) -> None:
    """A line on stdout; where it does not fit the terminal, `text` goes on below its own beginning."""
    from rich.console import Console
    from rich.text import Text

    room = max(_columns(sys.stdout) - cell_len(start), _ROOM)
    console = Console(width=_UNBOUNDED)
    lines = [line for part in Text(printable(text)).split("\n") for line in part.wrap(console, room)]
    for i, line in enumerate(lines or [Text()]):
        click.echo(((start if i == 0 else " " * cell_len(start)) + line.plain).rstrip())


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A table on stdout; a paragraph a row where not even its words would fit the terminal.

    Args:
        headings: of the columns.
        rows: a text a column; line breaks are kept.
        right: columns of numbers.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[printable(cell) for cell in row] for row in rows]
    widths = _widths([headings, *cells], _columns(sys.stdout))
    if widths is None:
        for i, row in enumerate(cells):
            click.echo("\n" if i else "", nl=False)
            print_pairs({name: ", ".join(cell.split("\n")) for name, cell in zip(headings, row, strict=True) if cell})
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 0, 0, 1))
    for i, (heading, width) in enumerate(zip(headings, widths, strict=True)):
        table.add_column(heading, justify="right" if i in right else "left", width=width)
    for row in cells:
        table.add_row(*map(Text, row))
    # The widths are fixed above; without a height too, rich would give a dumb terminal 80 columns of whatever it has.
    Console(highlight=False, markup=False, width=_UNBOUNDED, height=1).print(table)


def printable(text: str) -> str:
    """The text with control characters replaced, so that a label cannot send escape codes to a terminal."""
    return "".join(ch if ch.isprintable() or ch in _KEPT else "\N{REPLACEMENT CHARACTER}" for ch in text)


def on_one_line(text: str) -> str:
    """The text as part of a sentence: printable, and with no line break, after which a label could forge a line."""
    return printable(" ".join(text.split("\n")))


def is_drawable() -> bool:
    """Whether stderr is a terminal that can move its cursor, whatever FORCE_COLOR says of a pipe."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def _columns(stream: TextIO) -> int:
    return os.get_terminal_size(stream.fileno()).columns or 80 if stream.isatty() else _UNBOUNDED


def _widths(rows: Sequence[Sequence[str]], columns: int) -> list[int] | None:
    """The widths of a table's columns, the widest ones reduced until it fits; None where a word would be broken."""
    natural = [
        max(cell_len(line) for cell in column for line in cell.split("\n")) for column in zip(*rows, strict=True)
    ]
    least = [
        max((cell_len(word) for cell in column for word in cell.split()), default=0)
        for column in zip(*rows, strict=True)
    ]
    room = columns - _GAP * (len(natural) - 1)
    while sum(natural) > room:
        spare = [width if width > low else 0 for width, low in zip(natural, least, strict=True)]
        if not any(spare):
            return None
        natural[spare.index(max(spare))] -= 1
    return natural
