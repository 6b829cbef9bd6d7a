"""Rows of a store a few at a time: whatever is done with them is done while they are in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gradstore.store.rows import Rows
from gradstore.store.schema import Schema

# Bytes of features read together. Smaller pieces would stay in a nearer cache, and threads would wait more often for
# the interpreter lock: a megabyte at a time took a seventh longer.
_PIECE_BYTES = 4 << 20
_MOST = 256


class Streamed:
    """What a worker reuses to read block after block of rows.

    Args:
        store: holds them.
        block: rows of a block.
        piece: rows that are read together, at most.

    Attributes:
        columns: every dataset but the features, of the rows of the block that were read so far.

    Holds `streamed_bytes`.
    """

    def __init__(self, store: Rows, block: int, piece: int = _MOST) -> None:
        schema, rows = store.schema, piece_rows(store.schema, piece)
        self._store, self.columns = store, schema.empty(block, features=False)
        self._room = np.empty((rows, schema.c, schema.K), schema.dtype)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[slice, Tensor, dict[str, np.ndarray]]]:
        """Rows start:stop: where some are in the block, their features as stored [r, c, K], and their other columns.

        Yields:
            (where, features, columns), views that the next replaces.

        Raises:
            CorruptError: a row does not match its digest; names it.
        """
        for first, features in self._store.stream(start, stop, self.columns, self._room):
            at = slice(first - start, first - start + len(features))
            yield at, torch.from_numpy(features), {name: column[at] for name, column in self.columns.items()}


def piece_rows(schema: Schema, most: int = _MOST) -> int:
    """Rows that are read together, at most `most`."""
    return int(np.clip(_PIECE_BYTES // schema.column("features").row_bytes, 1, most))


def streamed_bytes(schema: Schema, block: int, piece: int = _MOST, making: int = 0) -> int:
    """Bytes that a `Streamed` of so many rows takes; small columns are copied to be hashed, a piece is decoded.

    Args:
        schema: of the store.
        block: rows of a block.
        piece: rows that are read together, at most.
        making: bytes a row that a feature map takes beside.

    Returns:
        Bytes.
    """
    features = schema.column("features").row_bytes
    made, rows = 4 * (schema.c if schema.dtype == "int8" else 1) * schema.K, piece_rows(schema, piece)
    return rows * (features + made) + min(rows, block) * making + 2 * block * (schema.row_bytes - features)
