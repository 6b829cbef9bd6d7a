"""Digests of rows: the first 16 bytes of the hash of a row's bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, starmap

import numpy as np

from gradstore.store.schema import BULK, Schema, hash_of

THREADS = min(os.cpu_count() or 1, 8)
BYTES = 16
_SHORT = 128  # bytes of a row that are hashed faster together, for all that it takes to copy them


def row_digests(schema: Schema, columns: Mapping[str, np.ndarray], threads: int = THREADS) -> np.ndarray:
    """Hash each row's bytes in every dataset but `digest`, in order.

    The hash function is that of the schema's version. Rows of more than a megabyte in all are spread over threads:
    hashing releases the interpreter lock. Holds a copy of the small datasets, and two of rows of up to 128 bytes.

    Returns:
        First 16 bytes of each hash, uint8 [n, 16].
    """
    return hash_rows(schema.version, list(_parts(schema, columns)), threads)


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
        n = len(features)
        # Features come first in a row.
        return hash_rows(self._version, [_bytes_of(features), *(part[low : low + n] for part in self._rest)])


def hash_rows(version: int, parts: Sequence[np.ndarray], threads: int = 1) -> np.ndarray:
    """Digests uint8 [n, 16] of rows, each its slices of all parts uint8 [n, size], by a format version's hash."""
    n = len(parts[0])
    if threads == 1 or sum(part.nbytes for part in parts) < 1 << 20:
        return _hash_rows(version, parts)
    step = -(-n // threads)
    with ThreadPoolExecutor(threads) as pool:
        spans = ([part[low : low + step] for part in parts] for low in range(0, n, step))
        return np.concatenate(list(pool.map(lambda span: _hash_rows(version, span), spans)))


def _hash_rows(version: int, parts: Sequence[np.ndarray]) -> np.ndarray:
    digests = _digests_of_short if sum(part.shape[1] for part in parts) <= _SHORT else _digests_of_long
    return np.frombuffer(bytearray().join(digests(version, parts)), np.uint8).reshape(-1, BYTES)


def _digests_of_short(version: int, parts: Sequence[np.ndarray]) -> Iterable[bytes]:
    """Of rows whose time goes into calls: one a row, on bytes that are cut from one piece."""
    new, rows = hash_of(version), np.concatenate(parts, axis=1)
    size, data = rows.shape[1], rows.tobytes()
    return [new(data[at : at + size]).digest()[:BYTES] for at in range(0, len(data), size)]


def _digests_of_long(version: int, parts: Sequence[np.ndarray]) -> Iterable[bytes]:
    """Of rows that are better not copied."""
    new = hash_of(version)

    def digest_of(first: np.ndarray, *rest: np.ndarray) -> bytes:
        row = new(first)
        for piece in rest:
            row.update(piece)
        return row.digest()[:BYTES]

    return starmap(digest_of, zip(*parts, strict=True))


def _parts(schema: Schema, columns: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """Lay out the bytes of all rows for hashing.

    A row is hashed in as many calls as there are parts, and a call costs as much as a kilobyte.

    Yields:
        uint8 [n, size]: large datasets as they are, small ones side by side.
    """
    hashed = [column for column in schema.columns if column.name != "digest" and column.name in columns]
    for bulk, group in groupby(hashed, lambda column: column.name if column.name in BULK else ""):
        flat = [_bytes_of(np.ascontiguousarray(columns[c.name])) for c in group]
        yield flat[0] if bulk else np.concatenate(flat, axis=1)


def _bytes_of(rows: np.ndarray) -> np.ndarray:
    """The bytes of contiguous rows, uint8 [n, size], not copied."""
    return rows.reshape(-1, 1).view(np.uint8).reshape(len(rows), -1)
