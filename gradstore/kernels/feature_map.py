"""Φ of stored rows, as a kernel on stored features defines it, in the three forms in which rows are multiplied.

- `FeatureMap.rows`: whole rows in float32, and what they are divided by.
- `FeatureMap.stored`: the digits of the store themselves where Φ is them, and the factors that they lack.
- `FeatureMap.scaled`: Φ · 2^-e, a piece of columns or a row at a time, so that a search never holds a block of rows in
  float32. e is the exponent of the largest norm of what Φ adds up or has side by side: gradients of 1e-30 and of 1e+30
  multiply in float32 like any other, and scaling by a power of two changes no bit of the mantissa.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import NonFiniteError, UsageError
from gradstore.kernels.definitions import PROJECTED, Kernel
from gradstore.store.files.encoding import decode, encode
from gradstore.store.rows import Rows

# Columns of a piece: long enough for a matrix product, short enough that a block of rows stays in cache.
PIECE = 2048

Columns = Mapping[str, np.ndarray]
"""What `Rows.read` returns; where the features are given apart, all but these."""


@dataclass(frozen=True)
class FeatureMap:
    """A feature map on stored features [n, c, K]: all classes side by side, or a weighted sum over classes.

    Attributes:
        kernel: says which; decides whether a similarity is a cosine.
        c: class axis of the store.
        K: projected dimension.
        asked: class weights that a caller gave, for Φ = Σ_c w_c φ^c; None for the kernel's own Φ. Two classes weighted
            1 and -1 ask why the network says the one rather than the other; a single 1 asks about one logit.
        state: what the kernel fitted; None where it fits nothing, or has not yet.
    """

    kernel: Kernel
    c: int
    K: int
    asked: tuple[float, ...] | None = None
    state: Mapping[str, np.ndarray] | None = field(default=None, repr=False, compare=False)  # follows from the others

    @classmethod
    def of(cls, kernel: Kernel, train: Rows, memory: int, asked: tuple[float, ...] | None = None) -> FeatureMap:
        """The map of a kernel, fitted on the training rows where it is fitted; `memory` bytes are for that alone."""
        phi = cls(kernel, train.schema.c, train.schema.K, asked)
        return phi if kernel.fit is None else replace(phi, state=kernel.fit(train, phi, memory))

    # -- its shape -----------------------------------------------------------------------------------------------

    @property
    def sums(self) -> bool:
        """Whether classes are summed."""
        return self.kernel.sums_classes or self.asked is not None

    @property
    def as_stored(self) -> bool:
        """Whether Φ is the stored digits times a factor for each row and class."""
        return not self.sums and self.state is None

    @property
    def segments(self) -> int:
        """Stretches of K that make up Φ: one a class, or one in all where classes are summed."""
        return 1 if self.sums else self.c

    @cached_property
    def terms(self) -> tuple[int, ...]:
        """The classes that are added up, where they are."""
        return tuple(c for c in range(self.c) if self.asked is None or self.asked[c] != 0)

    @property
    def length(self) -> int:
        """D, the length of Φ."""
        return self.segments * self.K

    @cached_property
    def _cuts(self) -> int:
        return -(-self.K // PIECE)

    @property
    def pieces(self) -> int:
        """Pieces that make up Φ."""
        return self.segments * self._cuts

    @property
    def width(self) -> int:
        """Columns of the widest piece."""
        return -(-self.K // self._cuts)

    @property
    def making(self) -> int:
        """Bytes that a row takes while Φ is made of it, beside what any map takes: a fitted one is made whole."""
        return 0 if self.state is None else 4 * (self.c * self.K + 4 * self.length)

    def place(self, j: int) -> tuple[int, slice]:
        """The segment of piece j, and its columns there."""
        segment, start = j // self._cuts, j % self._cuts * self.width
        return segment, slice(start, min(start + self.width, self.K))

    def padded(self) -> tuple[Tensor, Tensor]:
        """Room for a vector cut into pieces, and its view by class.

        Returns:
            (float32 [pieces, width], [segments, K]); the view leaves out the padding of each class's last piece, which
            is zero.
        """
        room = torch.zeros(self.pieces, self.width)
        return room, room.view(self.segments, -1)[:, : self.K]

    # -- Φ -------------------------------------------------------------------------------------------------------

    def weights(self, columns: Columns) -> np.ndarray | None:
        """Class weights w of Φ = Σ_c w_c φ^c for some rows, float64 [n, c]; None where classes stand side by side."""
        if not self.sums:
            return None
        if self.asked is None and self.kernel.weights is not None:
            return self.kernel.weights(columns)
        return np.broadcast_to(np.ones(self.c) if self.asked is None else self.asked, (len(columns["norm"]), self.c))

    def rows(self, columns: Columns, where: object) -> tuple[Tensor, Tensor]:
        """Φ of some rows of a store.

        Args:
            columns: the rows, with their features.
            where: what errors call the store.

        Returns:
            (Φ float32 [n, D], its norms float64 [n]). The norms are 1 for a kernel that is not normalised. Holds Φ and,
            where classes are summed, the features beside it.

        Raises:
            NonFiniteError: a row's Φ is not finite, or zero under a cosine; names the row.
        """
        phi = self._rows(columns["features"], columns)
        return phi, self._divisors(phi, columns, where)

    def unit_rows(self, columns: Columns, where: object) -> Tensor:
        """The same divided by its norm where the kernel is a cosine, float32 [n, D]."""
        phi, norms = self.rows(columns, where)
        return phi.div_(norms[:, None].float()) if self.kernel.normalised else phi

    def stored(self, columns: Columns, where: object) -> tuple[Tensor, Tensor]:
        """The same as values and the factors that they lack.

        Returns:
            (values [n, segments, K], factors float64 [n, segments]): the stored digits themselves, not copied, and what
            one of them is worth; where Φ is not these, float32. Of an absent row zeros, which are worth NaN.

        Raises:
            NonFiniteError: as `rows`.
        """
        absent = columns.get("absent")
        if absent is not None and absent.any():
            return self._stored_between(columns, where, np.flatnonzero(absent == 0))
        if not self.as_stored:
            phi, norms = self.rows(columns, where)
            return phi.view(-1, self.segments, self.K), (1 / norms[:, None]).expand(-1, self.segments).contiguous()
        values = torch.from_numpy(columns["features"])
        return values, torch.from_numpy(columns["scale"]).double() / self._divisors(values, columns, where)[:, None]

    def _stored_between(self, columns: Columns, where: object, at: np.ndarray) -> tuple[Tensor, Tensor]:
        """What `stored` returns where only the rows at these places are there."""
        some, there = self.stored({name: column[at] for name, column in columns.items()}, where)
        values = torch.zeros(len(columns["row"]), *some.shape[1:], dtype=some.dtype)
        factors = torch.full((len(values), self.segments), torch.nan, dtype=torch.float64)
        values[at], factors[at] = some, there
        return values, factors

    def scaled(self, features: Tensor, columns: Columns, where: object) -> Scaled:
        """The same times 2^-e for each row, not divided by its norm.

        Args:
            features: as stored, [n, c, K], on any device.
            columns: the others of the same rows.
            where: what errors call the store.

        Returns:
            What pieces and rows of it are made from. Holds `making` bytes a row.

        Raises:
            NonFiniteError: a row's stored norm is not finite, or zero under a cosine.
        """
        scale, norm, weights = columns["scale"], columns["norm"], self.weights(columns)
        if self.state is not None:
            made = encode(self._rows(features.cpu().numpy(), columns).view(-1, self.segments, self.K), "float32")
            features = torch.from_numpy(made.features).to(features.device)
            scale, norm, weights = made.scale, made.norm, None
        # Of what Φ adds up: a class that is asked about may have gradients far smaller than another.
        terms = norm if weights is None else norm * np.abs(weights)
        peak = terms.max(axis=1) if terms.size else np.zeros(len(norm))
        peak = np.where(np.isnan(norm).any(axis=1), np.nan, peak)
        self.require_direction(peak, columns["row"], where)
        _, exponent = np.frexp(peak)
        unit = scale.astype(np.float64)
        factors = np.ldexp(unit if weights is None else unit * weights, -exponent[:, None]).astype(np.float32)
        total = None
        if weights is None:
            squares, total = np.ldexp(norm, -exponent[:, None]) ** 2, np.zeros(len(norm))
            for c in range(norm.shape[1]):  # in this order for every block, unlike a reduction
                total += squares[:, c]
        placed = torch.from_numpy(factors).contiguous().to(features.device)
        return Scaled(self, features, placed, exponent, None if total is None else np.sqrt(total))

    def unscaled(self, norms: np.ndarray, exponent: np.ndarray) -> np.ndarray:
        """float64 [n], what turns inner products of `scaled` rows into their part of a similarity."""
        return 1 / norms if self.kernel.normalised else np.ldexp(1.0, exponent)

    def require_direction(self, norms: np.ndarray, rows: np.ndarray, where: object) -> None:
        """Refuse rows whose norm is not finite, or zero under a cosine.

        Args:
            norms: float64 [n].
            rows: int64 [n], their indices.
            where: what errors call the store.

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

    def _rows(self, features: np.ndarray, columns: Columns) -> Tensor:
        weights = self.weights(columns)
        if weights is None:
            phi = decode(features, columns["scale"]).flatten(1)
        else:
            phi = decode(features, (columns["scale"] * weights).astype(np.float32)).sum(dim=1)
        if self.state is None:
            return phi
        assert self.kernel.apply is not None, "of a kernel that is fitted"
        return self.kernel.apply(phi, self.state)

    def _divisors(self, phi: Tensor, columns: Columns, where: object) -> Tensor:
        """What rows are divided by, float64 [n]."""
        if self.as_stored:
            norms = torch.linalg.vector_norm(torch.from_numpy(columns["norm"]), dim=1)
        else:
            norms = torch.linalg.vector_norm(phi, dim=1, dtype=torch.float64)
        self.require_direction(norms.numpy(), columns["row"], where)
        return norms if self.kernel.normalised else torch.ones_like(norms)


@dataclass(frozen=True)
class Scaled:
    """Φ · 2^-exponent of some rows, before classes are added up.

    Attributes:
        phi: the map.
        features: [n, s, K], of s classes; of a fitted map of its segments.
        factors: float32 [n, s]; features times these are the terms of Φ, divided by 2^exponent.
        exponent: int [n].
        known: float64 [n], ‖Φ‖ / 2^exponent where terms stand side by side; None where they are added up, since that
            takes the features.
    """

    phi: FeatureMap
    features: Tensor
    factors: Tensor
    exponent: np.ndarray
    known: np.ndarray | None

    def piece(self, j: int, out: Tensor, spare: Tensor) -> Tensor:
        """Piece j of all rows.

        Each entry is a chain of single float32 operations in a fixed order, so its bits do not depend on the block.

        Args:
            j: which piece.
            out: float32, at least n · width; overwritten.
            spare: the same, used where classes are added up.

        Returns:
            A view [n, columns of the piece] of `out`.
        """
        segment, span = self.phi.place(j)
        shape = (len(self.features), span.stop - span.start)
        size = shape[0] * shape[1]
        first, *others = self.phi.terms if self.known is None else (segment,)
        view = self._decode(first, span, out.flatten()[:size].view(shape))
        for c in others:
            view.add_(self._decode(c, span, spare.flatten()[:size].view(shape)))
        return view

    def row(self, i: int, out: Tensor) -> float:
        """Row i, equal to its pieces.

        Args:
            i: which row.
            out: float32 [segments, K]; overwritten.

        Returns:
            Its norm, whose bits depend on nothing but the row.
        """
        if self.known is not None:
            out.copy_(self.features[i]).mul_(self.factors[i, :, None])
            return float(self.known[i])
        self._add_up(i, out)
        return vector_norm(out)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """All rows: values [n, segments, K] and factors float32 [n, segments], whose products they are.

        Returns:
            Both; the values are the features themselves where they are floating-point and not added up.
        """
        if self.known is not None:
            return self.features.float() if self.features.dtype == torch.int8 else self.features, self.factors
        out = torch.empty(len(self.features), 1, self.phi.K)
        for i, row in enumerate(out):
            self._add_up(i, row)
        return out, torch.ones(len(out), 1)

    def norms(self, values: Tensor) -> np.ndarray:
        """float64 [n], ‖Φ‖ / 2^exponent, of the values that `vectors` gave; for bounds, which do not ask for bits."""
        if self.known is not None:
            return self.known
        return torch.linalg.vector_norm(values[:, 0], dim=1, dtype=torch.float64).numpy()

    def exact_norms(self, values: Tensor) -> np.ndarray:
        """The same as `row` gives them."""
        return np.array([vector_norm(value) for value in values]) if self.known is None else self.known

    def _decode(self, c: int, span: slice, out: Tensor) -> Tensor:
        return out.copy_(self.features[:, c, span]).mul_(self.factors[:, c, None])

    def _add_up(self, i: int, out: Tensor) -> None:
        first, *others = self.phi.terms
        total = self.features[i, first].to(torch.float32, copy=True).mul_(self.factors[i, first])
        for c in others:
            total.add_(self.features[i, c].to(torch.float32, copy=True).mul_(self.factors[i, c]))
        out[0] = total


def not_finite(row: int, where: object) -> NonFiniteError:
    """Features that hold NaN or infinity, in a row whose norm does not tell."""
    return NonFiniteError(
        f"the features of row {row} are not finite",
        where=where,
        expected="finite values",
        hint="Run `gradstore verify` on the store",
    )


def vector_norm(vector: Tensor) -> float:
    """‖·‖ in float64, summed pairwise, so that its bits depend on nothing but the vector."""
    values = vector.reshape(-1).double().numpy()
    return float(np.sqrt(np.add.reduce(values * values)))


def require_served(kernel: Kernel, store: Rows) -> None:
    """Refuse a kernel that the layout of some rows cannot serve.

    Args:
        kernel: on stored features.
        store: the rows.

    Raises:
        UsageError: per-class features are needed and there is only a sum over classes.
    """
    layout = str(store.identity["layout"])
    if store.schema.classes == 1 or _serves(layout, kernel):
        return
    needs, holds, expected, other = {
        "mixed": ("P Σ_c g^c", "projects every class by a P of its own", "per-class or sum", "another --layout"),
        "sketched": ("P Σ_c g^c", "holds random combinations of classes", "per-class or sum", "another --layout"),
        "sum": ("the features of each class", "holds only P Σ_c g^c", "per-class", "--layout per-class"),
    }[layout]
    served = next(name for name, other in PROJECTED.items() if _serves(layout, other))
    raise UsageError(
        f"{kernel.name} needs {needs}, and this store {holds}",
        where=store.where,
        expected=f"layout {expected}",
        got=f"layout {layout}",
        hint=f"Use --kernel {served}, or featurize with {other}",
    )


def _serves(layout: str, kernel: Kernel) -> bool:
    return {
        "mixed": not kernel.sums_classes,
        "sketched": not kernel.sums_classes,
        "sum": kernel.sums_classes and kernel.weights is None,
    }.get(layout, True)
