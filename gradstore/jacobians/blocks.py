"""Blocks of the per-example Jacobian: some consecutive columns for all examples and classes of a batch.

A block may carry structure that a projection can use without forming its values: `LinearBlock` is a sum of outer
products over positions, `EmbeddingBlock` has nonzero values only in the rows that occur. Shapes: n examples, c classes
(1 in layout "sum"), T positions at which a weight is used, i inputs and o outputs of a layer, S tokens, d the width of
an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradstore.arithmetic.squares import squared_norms
from gradstore.jacobians.reused_memory import reused
from gradstore.jacobians.side_by_side import side_by_side, uncut_if_small

# Values that are held in float64 at once; a GPU is asked for few large pieces, not many small.
_WIDENED = {"cpu": 1 << 19, "cuda": 1 << 24}


class JacobianBlock:
    """Columns `[start, start + size)` of the per-example Jacobian of one parameter.

    Attributes:
        name: the parameter's name.
        start: flat index of the first column; a parameter's first block starts at a multiple of 128.
        size: number of columns.
    """

    def __init__(self, name: str, start: int, size: int) -> None:
        self.name, self.start, self.size = name, start, size
        self._dense: Tensor | None = None

    @property
    def structure(self) -> tuple[object, ...]:
        """What blocks of the same columns have in common that `join_blocks` joins as they are."""
        return ("values",)

    def dense(self) -> Tensor:
        """The values, [n, c, size] float32 contiguous. The block keeps them, so asking twice costs once."""
        if self._dense is None:
            self._dense = self._values().float().contiguous()
        return self._dense

    def form(self, room: Tensor) -> None:
        """Form the values in memory that is given, [n, c, size] float32 contiguous; `dense` gives that from then on."""
        self._dense = room.copy_(self.dense())

    def forget(self) -> None:
        """Keep the values no longer."""
        self._dense = None

    def picked(self, i: int, c: int, *, formed: bool) -> JacobianBlock:
        """Take example i and class c alone.

        Args:
            i: example of this batch.
            c: class.
            formed: take the values of a block with structure where it keeps them, not the structure.

        Returns:
            Their block [1, 1, size]; of blocks that have structure, no other values are formed for it.
        """
        return DenseBlock(self.name, self.start, self.dense()[i : i + 1, c : c + 1])

    def combined(self, i: int, factors: Tensor, *, formed: bool) -> JacobianBlock:
        """Add up the classes c of example i with factors [c]; `picked` for one class.

        Returns:
            A block [1, 1, size].
        """
        values = self.dense()[i]
        return DenseBlock(self.name, self.start, (factors.to(values) @ values)[None, None])

    def sq_norm(self) -> Tensor:
        """Σ of the squared values of each row over these columns, [n, c] float64, summed in float64."""
        values = self.dense()
        return squared_norms(values.flatten(0, 1)).view(values.shape[:2])

    def inner_products(self) -> Tensor:
        """Inner products of the rows of each example over these columns, [n, c, c] float64, summed in float64."""
        return _each_alone(self.dense(), _gram_in_pieces)

    def sq_terms(self, i: int, factors: Tensor) -> Tensor:
        """Σ_c u_c² of the squares of what class c of example i is the sum of, by factors u [c]; float64 []."""
        values = self.dense()[i].double().square().sum(1)
        return factors.double().square() @ values

    def joined(self, others: Sequence[JacobianBlock]) -> JacobianBlock:
        """Join it with the same columns of other batches, all of its class and structure; see `join_blocks`."""
        return _joined_values([self, *others])

    def _values(self) -> Tensor:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, start={self.start}, size={self.size})"


class DenseBlock(JacobianBlock):
    """A block of known values, [n, c, size]."""

    def __init__(self, name: str, start: int, values: Tensor) -> None:
        super().__init__(name, start, values.shape[-1])
        self._given = values

    def _values(self) -> Tensor:
        return self._given


class LazyBlock(JacobianBlock):
    """A block without structure, made when first asked for, so that only the block in use is held.

    Args:
        make: gives [n, c, size].
    """

    def __init__(self, name: str, start: int, size: int, make: Callable[[], Tensor]) -> None:
        super().__init__(name, start, size)
        self._values = make  # type: ignore[method-assign]


ALL = slice(None)


@dataclass(frozen=True)
class Unread:
    """A layer's input, and how it is read as activations; patches of a convolution take many times its memory.

    Attributes:
        inputs: as the layer took them; the channels are their last axis (linear) or their second (convolution).
        n: examples.
        reach: activations that one input channel makes at one position: 1, or the points of a kernel.
        make: (inputs, n, channels) -> activations of some input channels, [n, g, T, i].
        groups: g, into which a convolution's channels are divided.
        apart: whether the first axis of the inputs goes through the examples one after another.
    """

    inputs: Tensor
    n: int
    reach: int
    make: Callable[[Tensor, int, slice], Tensor]
    groups: int = 1
    apart: bool = True

    def read(self, channels: slice = ALL) -> Tensor:
        """Activations of some input channels, [n, g, T, i]."""
        return self.make(self.inputs, self.n, channels)

    def joined(self, others: Sequence[Unread]) -> Unread:
        """The inputs of this batch and of others that are `apart` too, of the same call of the same layer."""
        parts = [self, *others]
        return replace(self, inputs=torch.cat([part.inputs for part in parts]), n=sum(part.n for part in parts))


class LinearBlock(JacobianBlock):
    """Whole rows of a weight `[o, i]`: the Jacobian of example i and class c is `Σ_t deltas[c, t] ⊗ activations[t]`.

    A convolution's weight is one too, with its patches as activations: `i` is then channels × kernel positions.

    Attributes:
        width: i.
        activations: [n, T, i], shared by all classes and all blocks of the weight, and made when first asked for; the
            model's dtype.
        deltas: [n, c, T, o], gradients of the logits with respect to the layer's output; the model's dtype.
        unread: the layer's input, from which the activations can be made again; None where that is not known.

    Args:
        gram: gives ⟨a_t, a_t'⟩ of the activations, float64 [n, T, T], where norms are cheaper by it than by values.
    """

    def __init__(
        self,
        name: str,
        start: int,
        activations: Tensor | Callable[[], Tensor],
        deltas: Tensor,
        unread: Unread | None = None,
        width: int | None = None,
        gram: Callable[[], Tensor] | None = None,
    ) -> None:
        self._activations, self._gram = activations, gram
        self.width = self.activations.shape[-1] if width is None else width
        super().__init__(name, start, deltas.shape[-1] * self.width)
        self.deltas, self.unread = deltas, unread

    @property
    def structure(self) -> tuple[object, ...]:
        """See `JacobianBlock.structure`."""
        return ("outer products", *self.deltas.shape[1:])

    @property
    def activations(self) -> Tensor:
        """See the class."""
        if not isinstance(self._activations, Tensor):
            self._activations = self._activations()
        return self._activations

    def picked(self, i: int, c: int, *, formed: bool) -> JacobianBlock:
        """See `JacobianBlock.picked`."""
        if formed and self._dense is not None:
            return super().picked(i, c, formed=formed)
        deltas = self.deltas[i : i + 1, c : c + 1]
        return LinearBlock(self.name, self.start, self.activations[i : i + 1], deltas, width=self.width)

    def combined(self, i: int, factors: Tensor, *, formed: bool) -> JacobianBlock:
        """See `JacobianBlock.combined`."""
        if formed and self._dense is not None:
            return super().combined(i, factors, formed=formed)
        deltas = _combined(self.deltas[i], factors)
        return LinearBlock(self.name, self.start, self.activations[i : i + 1], deltas, width=self.width)

    def sq_norm(self) -> Tensor:
        """Σ of the squared values, [n, c] float64: ‖δ‖² ‖a‖² at one position, Σ_tt' ⟨δ_t, δ_t'⟩ ⟨a_t, a_t'⟩ at few."""
        deltas = self.deltas
        if deltas.shape[2] == 1:
            return deltas.double().square().sum((2, 3)) * self.activations.double().square().sum((1, 2))[:, None]
        if self._gram is None:
            return super().sq_norm()
        terms = gram_of(deltas.flatten(0, 1)).view(*deltas.shape[:3], -1) * self._gram()[:, None]
        return terms.sum((2, 3)).clamp_(min=0.0)  # positions that cancel leave rounding errors of either sign

    def inner_products(self) -> Tensor:
        """See `JacobianBlock.inner_products`: Σ_tt' ⟨δ_t^c, δ_t'^d⟩ ⟨a_t, a_t'⟩ where there are few positions."""
        _, c, positions, _ = self.deltas.shape
        if positions * (positions + c) > c * self.width:
            return super().inner_products()
        rows = zip(self.deltas, self.activations, strict=True)
        return _each_alone(list(rows), _gram_of_outer_sums)

    def sq_terms(self, i: int, factors: Tensor) -> Tensor:
        """See `JacobianBlock.sq_terms`: Σ_c u_c² ‖δ^c‖² ‖a‖²."""
        deltas = factors.double().square() @ self.deltas[i].double().square().sum((1, 2))
        return deltas * self.activations[i].double().square().sum()

    def joined(self, others: Sequence[JacobianBlock]) -> JacobianBlock:
        """See `JacobianBlock.joined`."""
        activations, deltas = _columns([self, *others], "activations", "deltas")
        return LinearBlock(self.name, self.start, activations, deltas)

    def form(self, room: Tensor) -> None:
        """See `JacobianBlock.form`; nothing is copied."""
        if self._dense is not None or _at_least_float32(self.deltas) != torch.float32:
            super().form(room)
            return
        self._dense = outer_sum(self.deltas.transpose(2, 3), self.activations[:, None], room)

    def _values(self) -> Tensor:
        return outer_sum(self.deltas.transpose(2, 3), self.activations[:, None])


class EmbeddingBlock(JacobianBlock):
    """A whole embedding matrix `[num_embeddings, d]`, whose Jacobian is zero except in the rows that occur.

    `dense()` of a large vocabulary is large ([n, c, num_embeddings · d]); `parts()` gives it some rows at a time.

    Attributes:
        indices: [n, S] int64, the row that each token takes; the same row may occur more than once.
        deltas: [n, c, S, d], gradients of the logits with respect to each token's embedding; the model's dtype.
        num_embeddings: number of rows.
    """

    def __init__(self, name: str, start: int, indices: Tensor, deltas: Tensor, num_embeddings: int) -> None:
        super().__init__(name, start, num_embeddings * deltas.shape[-1])
        self.indices, self.deltas, self.num_embeddings = indices, deltas, num_embeddings

    @property
    def structure(self) -> tuple[object, ...]:
        """See `JacobianBlock.structure`."""
        return ("embedding", *self.deltas.shape[1:])

    def parts(self, columns: int) -> Iterator[LazyBlock]:
        """Cut the matrix into blocks of whole rows, of about so many columns; the sums over tokens are taken once."""
        merged, width = self._merged(), self.deltas.shape[-1]
        step = max(1, columns // width)
        for first in range(0, self.num_embeddings, step):
            last = min(first + step, self.num_embeddings)
            make = partial(self._scattered, merged, first, last)
            yield LazyBlock(self.name, self.start + first * width, (last - first) * width, make)

    def values(self, first: int, last: int) -> Tensor:
        """The values of rows [first, last) of the matrix, [n, c, (last - first) * d] in float32 or wider."""
        return self._scattered(self._merged(), first, last)

    def picked(self, i: int, c: int, *, formed: bool) -> JacobianBlock:
        """See `JacobianBlock.picked`."""
        if formed and self._dense is not None:
            return super().picked(i, c, formed=formed)
        deltas = self.deltas[i : i + 1, c : c + 1]
        return EmbeddingBlock(self.name, self.start, self.indices[i : i + 1], deltas, self.num_embeddings)

    def combined(self, i: int, factors: Tensor, *, formed: bool) -> JacobianBlock:
        """See `JacobianBlock.combined`."""
        if formed and self._dense is not None:
            return super().combined(i, factors, formed=formed)
        deltas = _combined(self.deltas[i], factors)
        return EmbeddingBlock(self.name, self.start, self.indices[i : i + 1], deltas, self.num_embeddings)

    def sq_norm(self) -> Tensor:
        """Σ of the squared values of each row, [n, c] float64; the dense values are not formed."""
        return (self._merged().double() * self.deltas.double()).sum((2, 3))

    def inner_products(self) -> Tensor:
        """See `JacobianBlock.inner_products`; the dense values are not formed."""
        rows = zip(self._merged().flatten(2), self.deltas.flatten(2), strict=True)
        return _each_alone(list(rows), lambda pair: pair[0].double() @ pair[1].double().T)

    def sq_terms(self, i: int, factors: Tensor) -> Tensor:
        """See `JacobianBlock.sq_terms`: a linear layer's of one-hot activations, whose squared norm is the tokens'."""
        deltas = factors.double().square() @ self.deltas[i].double().square().sum((1, 2))
        return deltas * self.indices.shape[1]

    def joined(self, others: Sequence[JacobianBlock]) -> JacobianBlock:
        """See `JacobianBlock.joined`."""
        indices, deltas = _columns([self, *others], "indices", "deltas")
        return EmbeddingBlock(self.name, self.start, indices, deltas, self.num_embeddings)

    def shares(self) -> Tensor:
        """Divide the sum over all tokens that take the same row equally among these tokens.

        Returns:
            Each token's share, [n, c, S, d] in float32 or wider.
        """
        tokens = (self.indices[:, :, None] == self.indices[:, None, :]).sum(2)
        return self._merged() / tokens[:, None, :, None]

    def _values(self) -> Tensor:
        return self.values(0, self.num_embeddings)

    def _merged(self) -> Tensor:
        """[n, c, S, d]: at each token, the sum over all tokens that take the same row."""
        n, c, tokens, width = self.deltas.shape
        same = (self.indices[:, :, None] == self.indices[:, None, :]).to(_at_least_float32(self.deltas))
        flat = self.deltas.transpose(1, 2).reshape(n, tokens, c * width).to(same.dtype)
        return torch.bmm(same, flat).view(n, tokens, c, width).transpose(1, 2)

    def _scattered(self, merged: Tensor, first: int, last: int) -> Tensor:
        # Tokens of one row carry equal sums, so plain assignment is enough and no atomic addition makes bits vary.
        n, c, _, width = self.deltas.shape
        if last - first == self.num_embeddings:
            whole = reused((n, c, last, width), merged).zero_()
            return whole.scatter_(2, self.indices[:, None, :, None].expand_as(merged), merged).flatten(2)
        out = merged.new_zeros(n, c, last - first + 1, width)
        inside = (self.indices >= first) & (self.indices < last)
        target = torch.where(inside, self.indices - first, last - first)  # the extra row collects all others
        out.scatter_(2, target[:, None, :, None].expand_as(merged), merged)
        return out[:, :, :-1].flatten(2)


def join_blocks(blocks: Sequence[JacobianBlock]) -> JacobianBlock:
    """Join the same columns of several batches of examples, one batch after another.

    Returns:
        One block, with the structure that all share; of values where they share none.

    Raises:
        ValueError: the blocks are not of the same columns.
    """
    first = blocks[0]
    if len(blocks) == 1:
        return first
    if any((b.name, b.start, b.size) != (first.name, first.start, first.size) for b in blocks):
        raise ValueError(f"the blocks of {first.name} are cut differently in different batches")
    if all(type(block) is type(first) and block.structure == first.structure for block in blocks):
        return first.joined(blocks[1:])
    return _joined_values(blocks)


def _joined_values(blocks: Sequence[JacobianBlock]) -> DenseBlock:
    return DenseBlock(blocks[0].name, blocks[0].start, torch.cat([block.dense() for block in blocks]))


def _columns(blocks: Sequence[JacobianBlock], *names: str) -> list[Tensor]:
    """These attributes of several blocks, one batch after another."""
    return [torch.cat([getattr(block, name) for block in blocks]) for name in names]


def outer_sum(deltas: Tensor, activations: Tensor, room: Tensor | None = None) -> Tensor:
    """Sum over positions of outer products, for all examples, classes and groups.

    Args:
        deltas: [n, c, o, T].
        activations: [n, g, T, i]; output channels are split evenly over the g groups.
        room: memory for the sums of one group, contiguous [n, c, o · i] of their dtype; None takes some.

    Returns:
        [n, c, o · i], in float32 or, if the inputs are, in float64.
    """
    n, c, o, positions = deltas.shape
    groups, i = activations.shape[1], activations.shape[3]
    dtype = _at_least_float32(deltas)
    deltas, activations = deltas.to(dtype), activations.to(dtype)
    room = reused((n, c, o * i), deltas) if room is None else room
    if positions == 1 and groups == 1:
        return torch.mul(deltas, activations, out=room.view(n, c, o, i)).flatten(2)
    split = deltas.reshape(n, c, groups, o // groups, positions).transpose(1, 2)
    product = room.view(n * groups, c * o // groups, i)
    torch.bmm(split.reshape(n * groups, -1, positions), activations.flatten(0, 1), out=product)
    return product.view(n, groups, c, o // groups, i).transpose(1, 2).reshape(n, c, o * i)


def gram_of(rows: Tensor) -> Tensor:
    """Inner products of the rows of each matrix [b, T, i], float64 [b, T, T]."""
    wide = rows.double()
    return torch.bmm(wide, wide.transpose(1, 2))


def _each_alone(rows: Sequence[Any] | Tensor, work: Callable[[Any], Tensor]) -> Tensor:
    """`work` for each example, stacked; an example a thread, so that no bit depends on how a product is cut."""

    def some(numbers: range) -> list[Tensor]:
        with uncut_if_small(0):
            return [work(rows[i]) for i in numbers]

    device = rows.device if isinstance(rows, Tensor) else rows[0][0].device
    shares = side_by_side(some, len(rows), device)
    return torch.stack([shares[i % len(shares)][i // len(shares)] for i in range(len(rows))])


def _gram_in_pieces(values: Tensor) -> Tensor:
    """[c, size] to float64 [c, c], some columns at a time."""
    step = max(1, _WIDENED.get(values.device.type, 1 << 19) // len(values))
    total = torch.zeros(len(values), len(values), dtype=torch.float64, device=values.device)
    for part in values.split(step, dim=1):
        wide = part.double()
        total.addmm_(wide, wide.T)
    return total


def _gram_of_outer_sums(pair: tuple[Tensor, Tensor]) -> Tensor:
    """Of Σ_t δ_t ⊗ a_t for deltas [c, T, o] and activations [T, i], float64 [c, c]; the sums are not formed."""
    deltas, activations = pair[0].double(), pair[1].double()
    weighted = torch.matmul(activations @ activations.T, deltas)
    return weighted.flatten(1) @ deltas.flatten(1).T


def _combined(deltas: Tensor, factors: Tensor) -> Tensor:
    """Σ_c u_c of deltas [c, T, o], as [1, 1, T, o] in float32 or wider."""
    wide = deltas.to(_at_least_float32(deltas))
    return torch.tensordot(factors.to(wide), wide, dims=1)[None, None]


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
