"""A shard whose header this version of HDF5 would not have composed: looked at in a subprocess, or refused.

Rows are read by position whatever the header says, so it cannot mislead gradstore; this keeps a store from carrying
external storage, links, virtual datasets or filters to the next tool that opens it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from gradstore.errors import UnsafeError
from gradstore.store.files.manifest import Shard
from gradstore.store.schema import Schema

_SECONDS = 20
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
    """What the parser says: dataset -> [shape, dtype, offset], or text that names a problem."""
    # Nothing of the user's environment reaches the parser, so no HDF5 plug-in path does.
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    environment = {**kept, "HDF5_PLUGIN_PRELOAD": "::", "HDF5_USE_FILE_LOCKING": "FALSE", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(_PARSER), path]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _unread(path, f"no answer within {_SECONDS} s") from error
    except OSError as error:
        raise _unread(path, f"no parser: {error.strerror}") from error
    if done.returncode:
        raise _unread(path, f"a parser that ended with status {done.returncode}")
    try:
        return json.loads(done.stdout)
    except ValueError:
        return "an answer that cannot be read"


def _unread(path: str, got: str) -> UnreadHeaderError:
    return UnreadHeaderError(
        "the header of this shard is not the one that gradstore composes, and reading it has failed",
        where=path,
        got=got,
        hint="Try again with more free memory; do not open it with other HDF5 tools",
    )


def _first_difference(found: Any, expected: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return str(found)[:200]
    names = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    return f"/{names[0]} {found.get(names[0])} instead of {expected.get(names[0])}"[:200]
