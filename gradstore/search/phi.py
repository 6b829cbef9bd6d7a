"""Φ of stored rows, a piece of columns at a time, so that a search never holds a block of rows in float32.

A row is handled as Φ · 2^-e, with e the exponent of the largest norm of what Φ adds up or has side by side: gradients
of 1e-30 and of 1e+30 multiply in float32 like any other, and scaling by a power of two changes no bit of the mantissa.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import NonFiniteError
from gradstore.kernels.definitions import Kernel

# Columns of a piece: long enough for a matrix product, short enough that a block of rows stays in cache.
PIECE = 2048


@dataclass(frozen=True)
class Phi:
    """A feature map on stored features [n, c, K]: all classes side by side, or a weighted sum over classes.

    Attributes:
        kernel: decides whether a similarity is a cosine.
        c: class axis of the store.
        K: projected dimension.
        weights: None for Φ = (φ^1, …, φ^c), of length c·K; else Φ = Σ_c w_c φ^c, of length K. Two classes weighted 1
            and -1 ask why the network says the one rather than the other; a single 1 asks about one logit.
    """

    kernel: Kernel
    c: int
    K: int
    weights: tuple[float, ...] | None = None
    _per_class: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_per_class", -(-self.K // PIECE))

    @property
    def length(self) -> int:
        """D, the length of Φ."""
        return self.K if self.weights is not None else self.c * self.K

    @property
    def segments(self) -> int:
        """Stretches of K that make up Φ: one a class, or one in all where classes are summed."""
        return 1 if self.weights is not None else self.c

    @property
    def pieces(self) -> int:
        """Pieces that make up Φ."""
        return self._per_class if self.weights is not None else self.c * self._per_class

    @property
    def width(self) -> int:
        """Columns of the widest piece."""
        return -(-self.K // self._per_class)

    def span(self, j: int) -> slice:
        """Columns of piece j within its class, in the features [c, K]."""
        start = j % self._per_class * self.width
        return slice(start, min(start + self.width, self.K))

    def write_piece(self, j: int, features: Tensor, factors: Tensor, out: Tensor, spare: Tensor) -> Tensor:
        """Piece j of Φ · 2^-e for a block of rows.

        Each entry is a chain of single float32 operations in a fixed order, so its bits do not depend on the block.

        Args:
            j: which piece.
            features: as stored, [n, c, K].
            factors: float32 [n, c], from `Scaled.of`.
            out: float32, at least n · width; overwritten.
            spare: the same, used where classes are summed.

        Returns:
            A view [n, columns of the piece] of `out`.
        """
        span = self.span(j)
        shape = (len(features), span.stop - span.start)
        view = out.flatten()[: shape[0] * shape[1]].view(shape)
        if self.weights is None:
            return _decode(view, features, factors, j // self._per_class, span)
        term = spare.flatten()[: shape[0] * shape[1]].view(shape)
        classes = [c for c, weight in enumerate(self.weights) if weight != 0]
        _decode(view, features, factors, classes[0], span)
        for c in classes[1:]:
            view.add_(_decode(term, features, factors, c, span))
        return view

    def write_row(self, features: Tensor, factors: Tensor, out: Tensor) -> None:
        """Φ · 2^-e of one row, features [c, K] and factors [c], into float32 [segments, K]; equal to the pieces."""
        if self.weights is None:
            out.copy_(features).mul_(factors[:, None])
            return
        classes = [c for c, weight in enumerate(self.weights) if weight != 0]
        total = features[classes[0]].to(torch.float32, copy=True).mul_(factors[classes[0]])
        for c in classes[1:]:
            total.add_(features[c].to(torch.float32, copy=True).mul_(factors[c]))
        out[0] = total

    def padded(self) -> tuple[Tensor, Tensor]:
        """Room for a vector cut into pieces: float32 [pieces, width], and its view by class [segments, K].

        The view leaves out the padding of each class's last piece, which is zero.
        """
        room = torch.zeros(self.pieces, self.width)
        return room, room.view(self.segments, -1)[:, : self.K]

    def require_direction(self, norms: np.ndarray, rows: np.ndarray, where: object) -> None:
        """Refuse rows whose norm is not finite, or zero under a cosine.

        Raises:
            NonFiniteError: names the first such row.
        """
        good = np.isfinite(norms) & (norms > 0) if self.kernel.normalised else np.isfinite(norms)
        if not good.all():
            i = int(np.flatnonzero(~good)[0])
            raise NonFiniteError(
                f"the features of row {rows[i]} have no direction, so {self.kernel.name} is undefined",
                where=where,
                expected="a finite norm above zero" if self.kernel.normalised else "a finite norm",
                got=f"norm {norms[i]}",
                hint="Run `gradstore verify` on the store",
            )


@dataclass(frozen=True)
class Scaled:
    """How the rows of a block are scaled.

    Attributes:
        factors: float32 [n, c]; stored features times these are Φ's terms, divided by 2^exponent.
        exponent: int [n].
        norms: float64 [n], ‖Φ‖ / 2^exponent where classes stand side by side; None where they are summed, since that
            takes the features.
    """

    factors: Tensor
    exponent: np.ndarray
    norms: np.ndarray | None

    @classmethod
    def of(cls, phi: Phi, columns: Mapping[str, np.ndarray], where: object) -> Scaled:
        """From the columns of a block of rows.

        Raises:
            NonFiniteError: a row's stored norm is not finite, or zero under a cosine.
        """
        stored = columns["norm"]
        # Of what Φ adds up: a class that is asked about may have gradients far smaller than another.
        terms = stored if phi.weights is None else stored * np.abs(phi.weights)
        peak = terms.max(axis=1) if terms.size else np.zeros(len(stored))
        peak = np.where(np.isnan(stored).any(axis=1), np.nan, peak)
        phi.require_direction(peak, columns["row"], where)
        _, exponent = np.frexp(peak)
        unit = columns["scale"].astype(np.float64)
        if phi.weights is not None:
            unit = np.ldexp(unit * np.asarray(phi.weights), -exponent[:, None])
            return cls(torch.from_numpy(unit.astype(np.float32)), exponent, None)
        factors = np.ldexp(unit, -exponent[:, None]).astype(np.float32)
        squares = np.ldexp(stored, -exponent[:, None]) ** 2
        total = np.zeros(len(stored))
        for c in range(stored.shape[1]):  # in this order for every block, unlike a reduction
            total += squares[:, c]
        return cls(torch.from_numpy(factors), exponent, np.sqrt(total))


def _decode(out: Tensor, features: Tensor, factors: Tensor, c: int, span: slice) -> Tensor:
    return out.copy_(features[:, c, span]).mul_(factors[:, c, None])
