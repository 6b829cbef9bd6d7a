"""Rows of a feature map Φ, ready for inner products: blocks of a store or an array, read as often as a fit needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import UsageError
from gradstore.kernels.feature_map import FeatureMap
from gradstore.machine.byte_counts import format_bytes
from gradstore.machine.prefetch import prefetched
from gradstore.store.rows import Rows

# Of a block in float32: memory that the allocator hands out again, where a larger block is fresh pages every time.
_BLOCK_BYTES = 8 << 20
_COPY_BYTES = 16 << 20


class PhiRows(Protocol):
    """Φ of n examples, each of length D and divided by its norm where the kernel is a cosine.

    Attributes:
        n: rows.
        length: D.
        bytes: that all rows take as `blocks` gives them.
    """

    n: int
    length: int
    bytes: int

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, Φ [rows, D] float32 or float64) over all rows in order."""


class ArrayRows:
    """Rows that are already in memory, float64 [n, D].

    Args:
        values: [n, D]; only copied where they are normalised or read-only.
        normalised: divide each row by its norm.

    Raises:
        ValueError: a row is zero, so that its cosine is undefined.
    """

    def __init__(self, values: np.ndarray, *, normalised: bool) -> None:
        self.n, self.length = values.shape
        self.bytes = values.nbytes
        if normalised:
            norms = np.linalg.norm(values, axis=1, keepdims=True)
            if not norms.all():
                raise ValueError(f"row {int(np.argmin(norms))} is zero, so its cosine is undefined")
            values = values / norms
        self._values = torch.from_numpy(np.require(values, requirements=("C", "W")))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """One block: all of it."""
        yield slice(0, self.n), self._values


class StoreRows:
    """Φ of stored rows, float32, as a kernel on stored features defines it.

    Blocks are read and converted one ahead of the arithmetic; digests are checked the first time. Where all rows fit
    half of the memory, they are kept.

    Args:
        store: complete rows.
        phi: which Φ.
        memory: bytes.
        share: the blocks may take one part in `share` of them.

    Raises:
        UsageError: not even one row fits the memory.
    """

    def __init__(self, store: Rows, phi: FeatureMap, memory: int, share: int = 1) -> None:
        n, c, K = store.shape
        self.n, self.length = n, phi.length
        self.bytes = 4 * n * self.length
        self._store, self._phi = store, phi
        self._checked = False
        # As read, decoded and normalised, three times: one block in use, one ready, one being made. And twice in
        # float64: what `doubled` gave last, and what it makes next.
        row = 3 * (store.schema.row_bytes + 4 * c * K + 4 * self.length + phi.making) + 16 * self.length
        if share * row > memory:
            raise UsageError(
                "too little memory",
                where="--memory",
                expected=f"at least {format_bytes(share * row)}",
                got=format_bytes(memory),
            )
        memory //= share
        kept = 2 * self.bytes + row * 16 <= memory
        self._kept: list[tuple[slice, Tensor]] | None = [] if kept else None
        most = max(1, _BLOCK_BYTES // (4 * self.length))
        self._rows = min(most, max(1, (memory - (self.bytes if kept else 0)) // row))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows; from memory where they are kept."""
        if self._kept and self._checked:
            yield from self._kept
            return
        spans = [slice(at, min(at + self._rows, self.n)) for at in range(0, self.n, self._rows)]
        found = []
        for span, phi in prefetched(self._load, spans):
            if self._kept is not None:
                found.append((span, phi))
            yield span, phi
        self._checked = True
        if self._kept is not None:
            self._kept = found

    def _load(self, span: slice) -> Tensor:
        columns = self._store.read(span.start, span.stop, check=not self._checked)
        return self._phi.unit_rows(columns, self._store.where)


def doubled(rows: PhiRows) -> Iterator[tuple[slice, Tensor]]:
    """Blocks in float64, small enough that the copies stay in cache.

    Sums in float32 would be too coarse: an objective that is only known to 1e-7 hides its minimum from L-BFGS.

    Yields:
        (rows, Φ float64 [rows, D]).
    """
    step = max(1, _COPY_BYTES // (8 * rows.length))
    for span, phi in rows.blocks():
        if phi.dtype == torch.float64:
            yield span, phi
            continue
        for at in range(0, len(phi), step):
            part = phi[at : at + step].double()
            yield slice(span.start + at, span.start + at + len(part)), part


def weighted_sum(rows: PhiRows, weights: np.ndarray) -> np.ndarray:
    """Σ_i weights[·, i] Φ(x_i), float64 [classes, D]: the one vector per class that a surrogate amounts to."""
    w = torch.from_numpy(np.ascontiguousarray(weights))
    total = torch.zeros(len(w), rows.length, dtype=torch.float64)
    for span, phi in doubled(rows):
        total += w[:, span] @ phi
    return total.numpy()


def scores(rows: PhiRows, vectors: np.ndarray) -> np.ndarray:
    """⟨vectors_c, Φ(x_i)⟩, float64 [n, classes]."""
    v = torch.from_numpy(np.ascontiguousarray(vectors)).T
    out = np.empty((rows.n, v.shape[1]))
    for span, phi in doubled(rows):
        out[span] = (phi @ v).numpy()
    return out
