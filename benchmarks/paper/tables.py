"""Tables as Markdown and CSV: means over seeds with their standard errors."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

Row = Mapping[str, object]


def over_seeds(values: Sequence[float | None], digits: int = 3, percent: bool = False) -> str:
    """Mean ± standard error of the mean; values that are undefined are left out and counted."""
    known = [v * (100 if percent else 1) for v in values if v is not None]
    missing = f" ({len(values) - len(known)} n/a)" if len(known) < len(values) else ""
    if not known:
        return "n/a"
    text = f"{np.mean(known):.{digits}f}"
    if len(known) > 1:
        text += f" ± {np.std(known, ddof=1) / np.sqrt(len(known)):.{digits}f}"
    return text + missing


def grouped(rows: Sequence[Row], by: Sequence[str]) -> dict[tuple[object, ...], list[Row]]:
    """Rows that agree in some columns, in the order of their first."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in by), []).append(row)
    return found


def summary(
    rows: Sequence[Row], by: Sequence[str], measures: Mapping[str, str], percent: Sequence[str] = ()
) -> list[dict[str, str]]:
    """One row a group: the group's columns, and the mean of each measure under its heading."""
    table = []
    for key, members in grouped(rows, by).items():
        line = {name: str(value) for name, value in zip(by, key, strict=True)}
        for heading, name in measures.items():
            line[heading] = over_seeds([m[name] for m in members], 2 if name in percent else 3, name in percent)  # type: ignore[misc]
        line["seeds"] = str(len(members))
        table.append(line)
    return table


def markdown(title: str, table: Sequence[Mapping[str, str]], notes: Sequence[str] = ()) -> str:
    """A titled table with notes below."""
    names = list(table[0])
    lines = [f"## {title}", "", "| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(row.get(name, "") for name in names) + " |" for row in table]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def read_csv(path: Path) -> list[dict[str, object]]:
    """What `write_csv` wrote: numbers as numbers, nothing as None; no rows where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> object:
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return text or None


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Every measured row; the union of their columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
