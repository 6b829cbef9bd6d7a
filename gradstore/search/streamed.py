"""Rows of a store a few at a time: whatever is done with them is done while they are in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gradstore.heap import pages
from gradstore.rows import Rows
from gradstore.schema import Schema

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
        schema, rows = store.schema, min(piece, piece_rows(store.schema))
        self._store, self.columns = store, schema.empty(block, features=False)
        room = pages(rows * schema.column("features").row_bytes)
        self._room = room.view(schema.dtype).reshape(rows, schema.c, schema.K)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[slice, Tensor, dict[str, np.ndarray]]]:
        """Rows start:stop: where some are in the block, their features as stored [r, c, K], and their other columns.

        Raises:
            CorruptError: a row does not match its digest; names it.
        """
        for first, features in self._store.stream(start, stop, self.columns, self._room):
            at = slice(first - start, first - start + len(features))
            yield at, torch.from_numpy(features), {name: column[at] for name, column in self.columns.items()}


def piece_rows(schema: Schema) -> int:
    """Rows that are read together."""
    return int(np.clip(_PIECE_BYTES // schema.column("features").row_bytes, 1, _MOST))


def streamed_bytes(schema: Schema, block: int) -> int:
    """Bytes that reading blocks of so many rows takes; a copy of the small columns is hashed."""
    features = schema.column("features").row_bytes
    return piece_rows(schema) * features + 2 * block * (schema.row_bytes - features)
