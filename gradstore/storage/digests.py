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


def _parts(schema: Schema, columns: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """The bytes of all rows, uint8 [n, size]: large datasets as they are, small ones side by side.

    A row is hashed in as many calls as there are parts, and a call costs as much as a kilobyte.
    """
    hashed = [column for column in schema.columns if column.name != "digest"]
    for bulk, group in groupby(hashed, lambda column: column.name if column.name in BULK else ""):
        views = [np.ascontiguousarray(columns[c.name]).reshape(-1, 1) for c in group]
        flat = [view.view(np.uint8).reshape(len(columns["row"]), -1) for view in views]
        yield flat[0] if bulk else np.concatenate(flat, axis=1)
