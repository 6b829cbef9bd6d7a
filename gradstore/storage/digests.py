"""Digests of rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np

from gradstore.hashing import hash_of
from gradstore.schema import BULK, Schema, raw

THREADS = min(os.cpu_count() or 1, 8)
BYTES = 16  # of a row's digest


def row_digests(schema: Schema, columns: Mapping[str, np.ndarray], threads: int = THREADS) -> np.ndarray:
    """First 16 bytes of the hash of each row's bytes in every dataset but `digest`, in order: uint8 [n, 16].

    The hash function is that of the schema's version. Rows of more than a megabyte in all are spread over threads:
    hashing releases the interpreter lock. Holds a copy of the small datasets.
    """
    n, new = len(columns["row"]), hash_of(schema.version)
    parts = [(raw(part), part.shape[1]) for part in _parts(schema, columns)]
    out = np.empty((n, BYTES), np.uint8)
    digests = raw(out)

    def hash_rows(span: range) -> None:
        for i in span:
            row = new()
            for data, size in parts:
                row.update(data[i * size : (i + 1) * size])
            digests[i * BYTES : (i + 1) * BYTES] = row.digest()[:BYTES]

    if threads == 1 or n * schema.row_bytes < 1 << 20:
        hash_rows(range(n))
    else:
        step = -(-n // threads)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(hash_rows, [range(i, min(i + step, n)) for i in range(0, n, step)]))
    return out


class PartedDigests:
    """Digests of rows whose features come some at a time, and whose other datasets are at hand; the same.

    Args:
        schema: of the rows.
        columns: every dataset but `features` and `digest`, of all rows. Holds a copy of the small ones.
    """

    def __init__(self, schema: Schema, columns: Mapping[str, np.ndarray]) -> None:
        # Features come first in a row.
        self._rest = [(raw(part), part.shape[1]) for part in _parts(schema, columns)]
        self._new, self._size = hash_of(schema.version), schema.column("features").row_bytes

    def of(self, low: int, features: np.ndarray) -> np.ndarray:
        """uint8 [r, 16] of the r rows from number `low` on, whose features [r, c, K] these are."""
        data, size, digests = raw(features), self._size, bytearray()
        for i in range(len(features)):
            row = self._new()
            row.update(data[i * size : (i + 1) * size])
            for part, width in self._rest:
                row.update(part[(low + i) * width : (low + i + 1) * width])
            digests += row.digest()[:BYTES]
        return np.frombuffer(digests, np.uint8).reshape(-1, BYTES)


def _parts(schema: Schema, columns: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """The bytes of all rows in these datasets, uint8 [n, size]: large ones as they are, small ones side by side.

    A row is hashed in as many calls as there are parts, and a call costs as much as a kilobyte.
    """
    hashed = [column for column in schema.columns if column.name != "digest" and column.name in columns]
    for bulk, group in groupby(hashed, lambda column: column.name if column.name in BULK else ""):
        views = [np.ascontiguousarray(columns[c.name]).reshape(-1, 1) for c in group]
        flat = [view.view(np.uint8).reshape(len(columns["row"]), -1) for view in views]
        yield flat[0] if bulk else np.concatenate(flat, axis=1)
