"""Printing: JSON, tables, and text in which no label can move the cursor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def say(message: str = "") -> None:
    """One message on stderr."""
    click.echo(printable(message), err=True)


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Names and values in two columns on stdout."""
    width = max(map(len, pairs))
    for name, value in pairs.items():
        click.echo(f"{name:<{width}}  {printable(value)}")


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A table on stdout, as wide as the terminal; `right` names columns of numbers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(highlight=False).print(table)


def printable(text: str) -> str:
    """The text with control characters replaced, so that a label cannot send escape codes to a terminal."""
    return "".join(ch if ch.isprintable() or ch == "\n" else "\N{REPLACEMENT CHARACTER}" for ch in text)
