"""Annotations from a table: a CSV file with a column `row`, and `label`, `poisoned` or both."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np

from gradstore.errors import UsageError
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.disk import Disk, MissingFileError

_BYTES_A_ROW = 4200  # a name of 4096 bytes, and numbers
_YES, _NO = {"1", "true", "yes"}, {"0", "false", "no", ""}


def read_annotation_table(path: Path, store: FeatureStore) -> dict[str, np.ndarray]:
    """Read what a table says of some rows; of others, the store's own annotations hold.

    Args:
        path: CSV in UTF-8 with a header. A label is the name or the number of a class, or -1; `poisoned` is 1 or 0.
        store: whose rows they are.

    Returns:
        "labels" int64 [n] and "poisoned" bool [n], those of them that the table has.

    Raises:
        UsageError: there is no such file, or a line cannot be read; names it.
    """
    try:
        data = Disk().read_file(path.absolute(), len(store) * _BYTES_A_ROW + (1 << 16))
        lines = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        names = next(lines, [])
    except MissingFileError as error:
        raise UsageError("there is no such file", where=path) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError("this is no CSV file in UTF-8", where=path, got=error) from error
    columns = set(names)
    known = "row" in columns and columns & {"label", "poisoned"} and not columns - {"row", "label", "poisoned"}
    if not known or len(columns) < len(names):
        expected, got = "row, and label, poisoned or both", ", ".join(sorted(names))[:100]
        raise UsageError("unknown columns", where=path, expected=expected, got=got)
    labels = store.labels.copy()
    poisoned = np.zeros(len(store), bool) if store.poisoned is None else store.poisoned.copy()
    try:
        for cells in lines:
            if not cells:  # an empty line
                continue
            line = _named(cells, names)
            row = _row(line["row"], len(store))
            if "label" in columns:
                labels[row] = _label(line["label"], store)
            if "poisoned" in columns:
                poisoned[row] = _mark(line["poisoned"])
    except (ValueError, csv.Error) as error:
        raise UsageError(f"line {lines.line_num} cannot be read", where=path, got=error) from error
    found = {"labels": labels, "poisoned": poisoned}
    return {name: array for name, array in found.items() if name.removesuffix("s") in columns}


def _named(cells: list[str], names: list[str]) -> dict[str, str]:
    """A line's cells by column; a line that was cut says nothing of what it lacks."""
    if len(cells) != len(names):
        raise ValueError(f"{len(cells)} cells under {len(names)} columns")
    return dict(zip(names, cells, strict=True))


def _whole(text: str) -> int:
    """A number as spreadsheets write it; Python's own reading would also take 1_0 for ten, and digits of any script."""
    if not re.fullmatch(r"\s*[+-]?\d{1,18}\s*", text, re.ASCII):
        raise ValueError(f"{text!r:.40} is no whole number")
    return int(text)


def _row(text: str, n: int) -> int:
    row = _whole(text)
    if not 0 <= row < n:
        raise ValueError(f"row {row} of {n}")
    return row


def _label(text: str, store: FeatureStore) -> int:
    if text in store.classes:
        return store.classes.index(text)
    label = _whole(text)
    if not -1 <= label < max(store.schema.classes, 2):
        raise ValueError(f"label {label} of {store.schema.classes} classes")
    return label


def _mark(text: str) -> bool:
    word = text.strip().lower()
    if word not in _YES | _NO:
        raise ValueError(f"{word!r:.40} is neither 1 nor 0")
    return word in _YES
