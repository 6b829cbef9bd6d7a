"""SHA-256 digests of rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gradstore.schema import Schema

THREADS = min(os.cpu_count() or 1, 8)


def row_digests(schema: Schema, columns: Mapping[str, np.ndarray], threads: int = THREADS) -> np.ndarray:
    """First 16 bytes of SHA-256 over each row's bytes in every dataset but `digest`, uint8 [n, 16].

    Rows of more than a megabyte in all are spread over threads: hashing releases the interpreter lock.
    """
    views = [np.ascontiguousarray(columns[c.name]) for c in schema.columns if c.name != "digest"]
    n = len(views[0])
    flat = [view.reshape(n, -1).view(np.uint8) for view in views]
    out = np.empty((n, 16), np.uint8)

    def hash_rows(span: range) -> None:
        for i in span:
            digest = hashlib.sha256()
            for view in flat:
                digest.update(view[i])
            out[i] = np.frombuffer(digest.digest()[:16], np.uint8)

    if threads == 1 or n * schema.row_bytes < 1 << 20:
        hash_rows(range(n))
    else:
        step = -(-n // threads)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(hash_rows, [range(i, min(i + step, n)) for i in range(0, n, step)]))
    return out
