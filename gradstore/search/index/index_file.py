"""An index on disk: one safetensors file inside the store it belongs to, bound to the rows it was computed from.

It is a cache. Its metadata name the store's fingerprint and, shard by shard, the digest of the row digests, and end
with a digest of everything in the file. Whatever does not agree is computed again, never repaired or believed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.errors import CorruptError, GradstoreError, NoSpaceError, UnsafeError, UsageError
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.output import write_output
from gradstore.store.files.tensor_file import plain_json, read_tensors, under_digest
from gradstore.store.files.tensor_header import tensor_pieces

VERSION = 3
_DAMAGED = "it is damaged"


@dataclass(frozen=True)
class Saved:
    """What a valid index file holds.

    Attributes:
        arrays: by name.
        facts: plain values that were saved with them.
        shards: (rows, digest) of each shard covered.
    """

    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]
    shards: tuple[tuple[int, str], ...]

    def covered(self, store: FeatureStore) -> int:
        """Leading rows of the store that are still those the index was computed from."""
        rows = 0
        for mine, theirs in zip(self.shards, store.shard_marks, strict=False):
            if mine != theirs:
                break
            rows += mine[0]
        return rows


def save_index(path: Path, store: FeatureStore, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Put an index beside the shards of its store, in one atomic step.

    Raises:
        NoSpaceError: the disk has no room for it.
        UsageError: the store cannot be written to.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    disk = store.disk
    need, free = sum(array.nbytes for array in arrays.values()) + (1 << 16), disk.free_bytes(path.parent)
    if need > free:
        raise NoSpaceError("the index does not fit the disk", where=path, expected=f"{need} bytes free", got=free)
    binding = _dump({"version": VERSION, "fingerprint": store.fingerprint, "shards": store.shard_marks, "facts": facts})
    metadata = under_digest("binding", binding, arrays)
    pieces = tensor_pieces(arrays, metadata)
    try:
        write_output(path, pieces, size=sum(map(len, pieces)), of_store=True, disk=disk)
    except (UsageError, CorruptError) as error:
        raise UsageError(
            "the index cannot be saved in its store",
            where=path,
            got=error.line,
            hint="Use mode exact, which needs none",
        ) from error


def load_index(path: Path, store: FeatureStore, most: int) -> Saved | str:
    """Read the index of a store.

    Args:
        path: the file.
        store: that it belongs to.
        most: bytes that it may have.

    Returns:
        What it holds, or one clause that says why there is none to use.
    """
    if not os.path.lexists(path):
        return "there is none yet"
    try:
        found = read_tensors(path, "binding", most)
        if not found.sealed:
            return _DAMAGED
        content = plain_json(found.text, depth=4)
        if content["version"] != VERSION:
            return "another version of gradstore wrote it"
        if content["fingerprint"] != store.fingerprint:
            return "it belongs to another store"
        shards = tuple((int(rows), str(digest)) for rows, digest in content["shards"])
        return Saved(found.arrays, dict(content["facts"]), shards)
    except UnsafeError:
        return "it is not a regular file"
    except (GradstoreError, OSError, MemoryError, KeyError, ValueError, TypeError, AttributeError, OverflowError):
        return _DAMAGED


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
