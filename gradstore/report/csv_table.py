"""Tables as CSV files, there whole or not at all."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from gradstore.store.files.disk import Disk


def write_csv(path: str | os.PathLike[str], rows: Iterable[Sequence[object]]) -> Path:
    """Write rows, the header among them, to a file that replaces one of that name; makes its folder if need be.

    Holds the text of the whole table.

    Returns:
        Path of the file.

    Raises:
        UsageError: the file cannot be written there.
        NoSpaceError: the disk is full.
    """
    text, disk, target = io.StringIO(newline=""), Disk(), Path(path)
    csv.writer(text).writerows(rows)
    disk.make_directory(target.parent)
    disk.replace_file(target, text.getvalue().encode())
    return target
