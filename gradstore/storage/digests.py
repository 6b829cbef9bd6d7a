"""Digests of rows: in one compiled call where there is one for the version's hash, else a row at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np

from gradstore.hashing import NAMES, hash_of
from gradstore.schema import BULK, Schema, raw
from gradstore.storage import native
from gradstore.storage.native import BYTES

THREADS = min(os.cpu_count() or 1, 8)


def row_digests(schema: Schema, columns: Mapping[str, np.ndarray], threads: int = THREADS) -> np.ndarray:
    """First 16 bytes of the hash of each row's bytes in every dataset but `digest`, in order: uint8 [n, 16].

    The hash function is that of the schema's version. Rows of more than a megabyte in all are spread over threads:
    hashing releases the interpreter lock. Holds a copy of the small datasets.
    """
    n, parts = len(columns["row"]), list(_parts(schema, columns))
    out = np.empty((n, BYTES), np.uint8)

    def hash_span(low: int) -> None:
        _hash_rows(schema.version, [part[low : low + step] for part in parts], out[low : low + step])

    if threads == 1 or n * schema.row_bytes < 1 << 20:
        _hash_rows(schema.version, parts, out)
    else:
        step = -(-n // threads)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(hash_span, range(0, n, step)))
    return out


class PartedDigests:
    """Digests of rows whose features come some at a time, and whose other datasets are at hand; the same.

    Args:
        schema: of the rows.
        columns: every dataset but `features` and `digest`, of all rows. Holds a copy of the small ones.
    """

    def __init__(self, schema: Schema, columns: Mapping[str, np.ndarray]) -> None:
        self._version, self._rest = schema.version, list(_parts(schema, columns))

    def of(self, low: int, features: np.ndarray) -> np.ndarray:
        """uint8 [r, 16] of the r rows from number `low` on, whose features [r, c, K] these are."""
        n, out = len(features), np.empty((len(features), BYTES), np.uint8)
        # Features come first in a row.
        parts = [_bytes_of(features), *(part[low : low + n] for part in self._rest)]
        _hash_rows(self._version, parts, out)
        return out


def _hash_rows(version: int, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
    """Digests uint8 [n, 16] of rows, each its slices of all parts uint8 [n, size]."""
    simd = native.level() if NAMES[version] == "BLAKE3" else ""
    if simd:
        native.hash_rows(parts, out, simd)
        return
    new, digests, data = hash_of(version), raw(out), [(raw(part), part.shape[1]) for part in parts]
    for i in range(len(out)):
        row = new()
        for part, size in data:
            row.update(part[i * size : (i + 1) * size])
        digests[i * BYTES : (i + 1) * BYTES] = row.digest()[:BYTES]


def _parts(schema: Schema, columns: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """The bytes of all rows in these datasets, uint8 [n, size]: large ones as they are, small ones side by side.

    A row is hashed in as many calls as there are parts, and a call costs as much as a kilobyte.
    """
    hashed = [column for column in schema.columns if column.name != "digest" and column.name in columns]
    for bulk, group in groupby(hashed, lambda column: column.name if column.name in BULK else ""):
        flat = [_bytes_of(np.ascontiguousarray(columns[c.name])) for c in group]
        yield flat[0] if bulk else np.concatenate(flat, axis=1)


def _bytes_of(rows: np.ndarray) -> np.ndarray:
    """The bytes of contiguous rows, uint8 [n, size], not copied."""
    return rows.reshape(-1, 1).view(np.uint8).reshape(len(rows), -1)
