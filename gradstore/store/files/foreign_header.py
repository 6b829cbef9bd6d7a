"""HDF5 headers that this process has not composed itself: looked at in a confined process, or refused.

Of a shard, rows are read by position whatever the header says, so it cannot mislead gradstore; this keeps a store from
carrying external storage, links, virtual datasets or filters to the next tool that opens it. Of a Gram matrix, this is
how it is learnt what and where its values are.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from gradstore.errors import UnsafeError
from gradstore.store.files.confined import Unanswered, answer_of
from gradstore.store.files.manifest import Shard
from gradstore.store.schema import Schema

_PARSER = Path(__file__).with_name("foreign_parser.py")


class UnreadHeaderError(UnsafeError):
    """Nobody could say what a header holds."""


def require_plain_hdf5(path: Path, schema: Schema, shard: Shard) -> None:
    """Refuse a shard whose HDF5 header is not exactly that of its schema.

    Allowed are the datasets of the schema with their shapes and dtypes, contiguous at the manifest's offsets, and short
    attributes; nothing else: no further objects, links, filters, external storage, virtual datasets or type names.

    Raises:
        UnsafeError: anything else is in the file.
        UnreadHeaderError: parsing it crashes, hangs or takes more than 1 GB.
    """
    expected = {
        column.name: [[shard.rows, *column.shape], column.dtype.str, shard.offsets[column.name]]
        for column in schema.columns
    }
    found = _parse(str(path), shard.header)
    if found != expected:
        raise UnsafeError(
            "the header of this shard holds other things than a feature file",
            where=path,
            expected="the datasets of the format page, contiguous, unfiltered, unlinked",
            got=_first_difference(found, expected),
            hint="Do not open it with other HDF5 tools either; get the store again from where it was written",
        )


@lru_cache(maxsize=256)
def _parse(path: str, header: str) -> Any:
    """What `plain_contents` says of a shard's datasets, asked once for a file of this header."""
    found = plain_contents(path)
    if isinstance(found, Unanswered):
        raise UnreadHeaderError(
            "the header of this shard is not the one that gradstore composes, and reading it has failed",
            where=path,
            got=found,
            hint="Try again with more free memory; do not open it with other HDF5 tools",
        )
    return found if isinstance(found, str) else found.get("datasets", found.get("unreadable"))


def plain_contents(path: str) -> Any:
    """What an HDF5 file consists of, where that is plain contiguous datasets of numbers and short attributes alone.

    Args:
        path: of the file; it is parsed, and of its data nothing is read.

    Returns:
        {"datasets": name -> [shape, dtype, offset], "attributes": name -> text or integer}; or {"unreadable": what HDF5
        says}; or text that names the first other thing in it, `Unanswered` where the parser did not end well.
    """
    return answer_of(_PARSER, path)


def _first_difference(found: Any, expected: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return str(found)[:200]
    names = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    return f"/{names[0]} {found.get(names[0])} instead of {expected.get(names[0])}"[:200]
