"""Tables as CSV files, there whole or not at all."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gradstore.store.files.output import write_output

_ROWS = 4096  # held as text


def write_csv(path: str | os.PathLike[str], rows: Iterable[Sequence[object]]) -> Path:
    """Write rows, the header among them, to a file that replaces one of that name; makes its folder if need be.

    Holds the text of some thousand rows; `/dev/stdout` and other streams are written to as they are.

    Returns:
        Path of the file.

    Raises:
        UsageError: the file cannot be written there.
        NoSpaceError: the disk is full.
    """
    return write_output(path, _text(rows))


def _text(rows: Iterable[Sequence[object]]) -> Iterator[bytes]:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    for i, row in enumerate(rows, 1):
        writer.writerow(row)
        if i % _ROWS == 0:
            yield text.getvalue().encode()
            text.seek(0)
            text.truncate()
    yield text.getvalue().encode()
