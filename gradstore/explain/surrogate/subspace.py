"""A few directions in the space of Φ, and every row's coordinates along them: small enough to fit on in memory.

The first directions span a sketch of the rows: sums of some of them each, with random signs (Halko, Martinsson and
Tropp, "Finding structure with randomness", 2011). They hold nearly all that the rows vary in, for kernels have
spectra that fall quickly. What a fit on them leaves, its gradient, is where the next directions come from.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gradstore.explain.surrogate.map_rows import PhiRows

_SKETCHED, _NEW, _MOST = 256, 64, 768
"""Directions of the sketch, those added at a time, and those held, at most."""
LEAST = 16
"""With fewer a fit would take as many passes as one without them."""

_PIECE = 2048  # columns of directions in float64 at a time
_ROW_BYTES = 2 << 20  # of rows of coordinates in float64, so many at a time
# Of squared lengths: what is shorter is the rounding of what is longer.
_ROUNDING, _LITTLE = 1e-10, 1e-6


class Coordinates:
    """Rows in a subspace, as `PhiRows`.

    Args:
        values: [n, k].
    """

    def __init__(self, values: Tensor) -> None:
        self.n, self.length = values.shape
        self.bytes = values.nbytes
        self._values = values

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks so small that a copy in float64 stays in cache."""
        step = max(1, _ROW_BYTES // (8 * self.length))
        for at in range(0, self.n, step):
            yield slice(at, min(at + step, self.n)), self._values[at : at + step]


class Subspace:
    """Orthonormal directions [k, D], and coordinates [n, k] of the rows along them, in the dtype of the rows.

    They are right to the rounding of that dtype; whoever fits on them corrects what that makes wrong.

    Args:
        rows: Φ [n, D]; read twice.
        capacity: directions held at most, see `capacity_within`.
        seed: of the sketch.

    Attributes:
        mean_square: mean of ‖Φ(x_i)‖².

    Holds `capacity` · (D + n) values.
    """

    def __init__(self, rows: PhiRows, capacity: int, seed: int) -> None:
        size = min(_SKETCHED, -(-capacity // 2), rows.n, rows.length)
        sums, self.mean_square = _sketch(rows, size, seed)
        self._rows = rows
        self._directions = torch.empty(capacity, rows.length, dtype=sums.dtype)
        self._coordinates = torch.empty(rows.n, capacity, dtype=sums.dtype)
        self._sketched = self._held = _orthonormal(sums, self._directions)
        del sums
        self._project(slice(0, self._held))
        self._rotate()
        self._next = self._sketched

    @property
    def coordinates(self) -> Coordinates:
        """Of all rows, [n, k]."""
        return Coordinates(self._coordinates[:, : self._held])

    def reset(self) -> None:
        """Forget all directions but those of the sketch."""
        self._held = self._next = self._sketched

    def components(self, vectors: np.ndarray) -> np.ndarray:
        """Inner products of vectors float64 [c, D] with the directions, float64 [c, k]."""
        total, v = torch.zeros(len(vectors), self._held, dtype=torch.float64), torch.from_numpy(vectors)
        for span, part in self._pieces():
            total += v[:, span] @ part.T
        return total.numpy()

    def combined(self, components: np.ndarray) -> np.ndarray:
        """Σ_k components[·, k] direction_k, float64 [c, D]."""
        found, v = np.empty((len(components), self._directions.shape[1])), torch.from_numpy(components)
        for span, part in self._pieces():
            found[:, span] = (v @ part).numpy()
        return found

    def extend(self, vectors: np.ndarray) -> None:
        """Add the directions in which vectors float64 [c, D] leave the subspace, the longest first; one pass.

        Where they hardly leave it there are none. Where there is no more room, the oldest go that were added.
        """
        rest = vectors
        for _ in range(2):  # the second time for what rounding left
            rest = rest - self.combined(self.components(rest))
        if float((rest**2).sum()) <= _LITTLE * float((vectors**2).sum()):
            return
        squares, turn = np.linalg.eigh(rest @ rest.T)
        most = min(_NEW, len(self._directions) - self._sketched)
        kept = np.flatnonzero(squares > _LITTLE * squares[-1])[::-1][:most]
        if self._next + len(kept) > len(self._directions):
            self._next = self._sketched
        place = slice(self._next, self._next + len(kept))
        self._directions[place] = torch.from_numpy((turn[:, kept] / np.sqrt(squares[kept])).T @ rest)
        self._project(place)
        self._next, self._held = place.stop, max(self._held, place.stop)

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        return _columns(self._directions[: self._held])

    def _project(self, place: slice) -> None:
        """Coordinates along some directions; one pass over the rows."""
        directions = self._directions[place].T
        for span, phi in self._rows.blocks():
            self._coordinates[span, place] = phi @ directions

    def _rotate(self) -> None:
        """Turn the directions to the principal axes of the coordinates, so that they can be scaled one by one."""
        k = self._held
        square = torch.zeros(k, k, dtype=torch.float64)
        for _, part in self.coordinates.blocks():
            values = part.double()
            square += values.T @ values
        _, turn = torch.linalg.eigh(square)
        for _, part in self.coordinates.blocks():
            part.copy_(part.double() @ turn)
        for span, part in self._pieces():
            self._directions[:k, span] = (turn.T @ part).to(self._directions.dtype)


def capacity_within(memory: int, n: int, length: int, classes: int, value: int, remembered: int) -> tuple[int, int]:
    """How many directions a fit can hold.

    Args:
        memory: bytes for all that the fit holds beside its rows.
        n: rows.
        length: D.
        classes: c.
        value: bytes of a value of Φ.
        remembered: vectors of c coordinates a direction that an optimiser holds.

    Returns:
        (directions, below 1 where there is no room for one; bytes that `LEAST` of them need).
    """
    # Coordinates, directions and the sums that half of them come from; what L-BFGS remembers; copies in float64.
    each = value * (n + length + length // 2) + 8 * classes * remembered + 16 * min(_PIECE, length)
    fixed = 8 * classes * (10 * length + 10 * n) + 3 * min(_ROW_BYTES, 16 * n * length)
    least = min(LEAST, length)
    return min(_MOST, 2 * length, (memory - fixed) // each), fixed + least * each


def _sketch(rows: PhiRows, size: int, seed: int) -> tuple[Tensor, float]:
    """Sums [size, D] of every size-th row with a random sign, and the mean of the rows' squares; one pass."""
    signs = torch.from_numpy(np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), rows.n))
    sums, total = torch.zeros(0), 0.0
    for span, phi in rows.blocks():
        if not len(sums):
            sums = torch.zeros(size, rows.length, dtype=phi.dtype)
        total += float(torch.linalg.vector_norm(phi, dtype=torch.float64)) ** 2
        for at in range(0, len(phi), size):  # no sum twice
            part = phi[at : at + size]
            first = span.start + at
            places = torch.arange(first, first + len(part)) % size
            sums.index_add_(0, places, part * signs[first : first + len(part), None].to(phi.dtype))
    return sums, total / rows.n


def _orthonormal(vectors: Tensor, out: Tensor) -> int:
    """Write an orthonormal basis of what some vectors span into the first rows of `out`; how many those are."""
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for _, part in _columns(vectors):
        gram += part @ part.T
    squares, turn = torch.linalg.eigh(gram)
    kept = squares > _ROUNDING * squares[-1]
    mix = (turn[:, kept] / squares[kept].sqrt()).T
    for span, part in _columns(vectors):
        out[: len(mix), span] = (mix @ part).to(out.dtype)
    return len(mix)


def _columns(vectors: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(columns, those of the vectors in float64), a few at a time."""
    for at in range(0, vectors.shape[1], _PIECE):
        span = slice(at, min(at + _PIECE, vectors.shape[1]))
        yield span, vectors[:, span].double()
