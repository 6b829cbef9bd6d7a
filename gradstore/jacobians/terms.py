"""Terms of a parameter's Jacobian: one per use of the parameter in a forward pass, filled class by class.

A term takes the gradient of each class's logits with respect to the output of the layer ("delta"). It keeps either
that, with the layer's input, or at once the gradient, where this is the smaller of the two.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from gradstore.jacobians.blocks import EmbeddingBlock, JacobianBlock, LazyBlock, LinearBlock, Unread, gram_of, outer_sum
from gradstore.jacobians.reused_memory import reused

# A gradient this many times smaller than its delta is formed per class and the delta dropped.
SHRINKS = 4
# Time to square a float32 value in float64 and add it up, over that of a multiply-add in float64 by matrix units: 8 ps
# over 0.1 ps on an H100, halved. With more positions their inner products would take much memory.
_VALUES_OVER_PRODUCTS = 40
_MOST_POSITIONS = 256


class Term:
    """One use of a parameter.

    Attributes:
        rows: length of the parameter's first axis, along which blocks are cut.
        width: columns per row.
        read: bytes of what was made of the layer's input, beside which deltas come.
    """

    rows: int
    width: int
    read: int = 0

    _kept: Tensor | None = None
    _allocating = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes kept for all examples and classes so far."""
        return 0 if self._kept is None else self._kept.nbytes

    def absorb(self, first: int, deltas: Tensor) -> None:
        """Take the deltas of f classes from `first` on, as the term's rule views them; threads may bring several."""
        raise NotImplementedError

    def _room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Where all classes are kept, allocated by whoever comes first."""
        with self._allocating:
            if self._kept is None:
                self._kept = reused(shape, like)
            return self._kept

    def _keep(self, classes: int, first: int, deltas: Tensor) -> None:
        """Keep the deltas of some classes beside those of all others."""
        room = self._room((len(deltas), classes, *deltas.shape[2:]), deltas)
        room[:, first : first + deltas.shape[1]] = deltas

    def values(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of the parameter, [n, c, (last − first) · width] in float32 or wider."""
        raise NotImplementedError

    def block(self, name: str, start: int, first: int, last: int) -> JacobianBlock:
        """The same as a block, whose first column is `start`."""
        return LazyBlock(name, start, (last - first) * self.width, lambda: self.values(first, last))


class ReducedTerm(Term):
    """A gradient that is small beside its delta: kept for every class, [n, c, size].

    Args:
        n: examples.
        c: number of classes.
        shape: of the parameter.
        reduce: makes gradients [n, f, …] of deltas [n, f, …].
        read: what that reads beside the delta, made for it.
    """

    def __init__(
        self,
        n: int,
        c: int,
        shape: tuple[int, ...],
        reduce: Callable[[Tensor], Tensor],
        read: Tensor | None = None,
    ) -> None:
        size = torch.Size(shape).numel()
        self.read = 0 if read is None else read.nbytes
        self.rows = shape[0] if shape else 1
        self.width = size // self.rows
        self._shape, self._reduce = (n, c, size), reduce

    def absorb(self, first: int, deltas: Tensor) -> None:
        """Reduce the deltas over positions to the parameter's gradient."""
        found = self._reduce(deltas).flatten(2)
        self._room(self._shape, found)[:, first : first + found.shape[1]] = found

    def values(self, first: int, last: int) -> Tensor:
        """The kept gradient of these rows."""
        assert self._kept is not None
        return self._kept[..., first * self.width : last * self.width]


class OuterTerm(Term):
    """A weight `[o, i]` of a linear layer or convolution: Σ over positions of delta ⊗ activation.

    Args:
        c: number of classes.
        outputs: o.
        width: i.
        unread: makes the activations, [n, g, T, i]; called when the first block is asked for.
        by_position: the layer's output has all channels of a position together, and so are the deltas kept: transposing
            them takes longer than differentiating the layer.
    """

    def __init__(self, c: int, outputs: int, width: int, unread: Unread, *, by_position: bool) -> None:
        self.rows, self.width, self._classes, self._by_position = outputs, width, c, by_position
        self._unread = unread
        self._made: Tensor | None = None
        self._gram: Tensor | None = None

    def absorb(self, first: int, deltas: Tensor) -> None:
        """Keep the deltas, [n, f, o, T]."""
        if not self._by_position:
            self._keep(self._classes, first, deltas)
            return
        n, f, o, positions = deltas.shape
        room = self._room((n, positions, self._classes, o), deltas)
        room[:, :, first : first + f] = deltas.permute(0, 3, 1, 2)

    @property
    def grouped(self) -> bool:
        """Whether its blocks have no structure."""
        return self._unread.groups > 1

    @property
    def activations(self) -> Tensor:
        """[n, g, T, i], made once."""
        if self._made is None:
            self._made = self._unread.read()
        return self._made

    @property
    def deltas(self) -> Tensor:
        """[n, c, o, T]."""
        assert self._kept is not None
        return self._kept.permute(0, 2, 3, 1) if self._by_position else self._kept

    @property
    def few_positions(self) -> bool:
        """Whether norms take less work by inner products of positions than by the values of all classes.

        Only on a GPU: on a CPU the bits of a long product depend on the number of threads.
        """
        positions, values = self.deltas.shape[-1], self._classes * self.rows * self.width
        gain = _products_for_a_value(self.deltas.device)
        return positions <= _MOST_POSITIONS and positions**2 * (self.width + self._classes * self.rows) <= gain * values

    def gram(self) -> Tensor:
        """⟨a_t, a_t'⟩ of the activations of a layer that has one group, float64 [n, T, T], made once."""
        if self._gram is None:
            self._gram = gram_of(self.activations[:, 0])
        return self._gram

    def values(self, first: int, last: int) -> Tensor:
        """Gradient of these rows; a convolution's groups are computed whole and cut."""
        groups = self.activations.shape[1]
        if groups == 1:
            return outer_sum(self.deltas[:, :, first:last], self.activations)
        each = self.rows // groups
        low, high = first // each, -(-last // each)
        found = outer_sum(self.deltas[:, :, low * each : high * each], self.activations[:, low:high])
        skipped = first - low * each
        return found[..., skipped * self.width : (skipped + last - first) * self.width]

    def block(self, name: str, start: int, first: int, last: int) -> JacobianBlock:
        """A LinearBlock, or without structure for a grouped convolution."""
        if self.grouped:
            return super().block(name, start, first, last)
        deltas = self.deltas[:, :, first:last].transpose(2, 3)
        gram = self.gram if self.few_positions else None
        return LinearBlock(name, start, lambda: self.activations[:, 0], deltas, self._unread, self.width, gram)


class IndexTerm(Term):
    """An embedding matrix: each token's delta belongs to the row that the token takes."""

    def __init__(self, c: int, indices: Tensor, rows: int, width: int, padding: int | None) -> None:
        self.rows, self.width, self._classes = rows, width, c
        self._indices, self._padding = indices, padding

    def absorb(self, first: int, deltas: Tensor) -> None:
        """Keep the deltas, [n, f, d, S]; the padding row has no gradient by definition."""
        deltas = deltas.transpose(2, 3)
        if self._padding is not None:
            deltas = deltas.masked_fill((self._indices == self._padding)[:, None, :, None], 0)
        self._keep(self._classes, first, deltas)

    def embedding_block(self, name: str, start: int) -> EmbeddingBlock:
        """The whole matrix; `start` is its first column."""
        assert self._kept is not None
        return EmbeddingBlock(name, start, self._indices, self._kept, self.rows)

    def values(self, first: int, last: int) -> Tensor:
        """Gradient of these rows."""
        return self.embedding_block("", 0).values(first, last)


class KeptTerm(Term):
    """Any other large parameter: deltas are kept, and some rows of the gradient made of them when they are asked for.

    Args:
        c: number of classes.
        rows: length of the parameter's first axis.
        width: columns per row.
        make: (deltas [n, c, …], first, last) to rows [first, last) of the gradient, [n, c, (last − first) · width].
    """

    def __init__(self, c: int, rows: int, width: int, make: Callable[[Tensor, int, int], Tensor]) -> None:
        self.rows, self.width, self._classes, self._make = rows, width, c, make

    def absorb(self, first: int, deltas: Tensor) -> None:
        """Keep the deltas, [n, f, …]."""
        self._keep(self._classes, first, deltas)

    def values(self, first: int, last: int) -> Tensor:
        """Gradient of these rows."""
        assert self._kept is not None
        return self._make(self._kept, first, last)


class ViewedTerm(Term):
    """A parameter that was used in another shape with its elements in the same order.

    Args:
        term: of the shape that was used.
        rows: length of the parameter's own first axis.
    """

    def __init__(self, term: Term, rows: int) -> None:
        self._term, self.read = term, term.read
        self.rows, self.width = rows, term.rows * term.width // rows

    @property
    def held(self) -> int:
        """See `Term.held`."""
        return self._term.held

    def absorb(self, first: int, deltas: Tensor) -> None:
        """Hand the deltas on."""
        self._term.absorb(first, deltas)

    def values(self, first: int, last: int) -> Tensor:
        """Gradient of these rows, cut from those of the shape that was used."""
        begin, end, width = first * self.width, last * self.width, self._term.width
        low, high = begin // width, -(-end // width)
        return self._term.values(low, high)[..., begin - low * width : end - low * width]


def joined(terms: list[Term], name: str, start: int, first: int, last: int) -> JacobianBlock:
    """A block of a parameter with several uses: the uses add up."""
    if len(terms) == 1:
        return terms[0].block(name, start, first, last)
    size = (last - first) * terms[0].width
    return LazyBlock(name, start, size, lambda: sum_of([term.values(first, last) for term in terms]))


def _products_for_a_value(device: torch.device) -> int:
    """How many multiply-adds in float64 are worth a value's square: many where matrix units make them."""
    if device.type != "cuda":
        return 0
    return _VALUES_OVER_PRODUCTS if torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0)) else 1


def sum_of(parts: list[Tensor]) -> Tensor:
    """Elementwise sum in the given order; one part alone is returned itself."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
