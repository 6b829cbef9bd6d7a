"""Jacobian blocks as they are held for a contraction: factors where there are any, and dense columns made from them.

A convolution is held by its input, not by the patches that it reads, which take a kernel's points times as much; dense
columns are made some input channels at a time, so that every patch is read once. Their order is not that of the
parameters, and the same on both sides of a product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from gradstore.jacobians import DenseBlock, EmbeddingBlock, JacobianBlock, LinearBlock
from gradstore.jacobians.blocks import Unread, join_blocks


@dataclass(frozen=True)
class Factors:
    """A `LinearBlock` without its activations: Σ_t deltas[c, t] ⊗ activations[t].

    Attributes:
        name: the parameter's name.
        unread: makes the activations [n, 1, T, i] from the layer's input.
        width: i.
        deltas: [n, c, T, o].
    """

    name: str
    unread: Unread
    width: int
    deltas: Tensor

    @property
    def size(self) -> int:
        """Columns."""
        return self.width * self.deltas.shape[3]

    def activations(self, channels: slice = slice(None)) -> Tensor:
        """Of some input channels, [n, T, i] float32 or wider."""
        made = self.unread.read(channels)[:, 0]
        return made.to(torch.promote_types(made.dtype, torch.float32))


Held = Factors | EmbeddingBlock | DenseBlock


def held(block: JacobianBlock) -> Held:
    """The block in a form that keeps nothing else alive."""
    if isinstance(block, LinearBlock):
        unread = block.unread
        if unread is None:
            activations = block.activations
            unread = Unread(activations, len(activations), 1, _some_channels)
        return Factors(block.name, unread, block.width, block.deltas)
    if isinstance(block, EmbeddingBlock):
        return block
    return DenseBlock(block.name, block.start, block.dense())


def _some_channels(activations: Tensor, n: int, channels: slice) -> Tensor:
    return activations[..., channels][:, None]


def joined_batches(batches: Sequence[list[Held]]) -> list[list[Held]]:
    """Consecutive batches as one, for larger operations; as they are where a layer's input cannot be joined.

    Nor are they where blocks share memory, as parts of one weight and layers with one input do: each would take a copy.

    Args:
        batches: their blocks, which are dropped one after another: what one block takes is held twice meanwhile.

    Returns:
        The batches, or one.
    """
    if len(batches) < 2 or not all(map(_joinable, zip(*batches, strict=True))) or any(map(_shares_memory, batches)):
        return list(batches)
    found: list[Held] = []
    for i in range(len(batches[0])):
        found.append(_joined([batch[i] for batch in batches]))
        for batch in batches:
            batch[i] = found[i]
    return [found]


def patch_bytes(blocks: Sequence[Held], columns: int) -> int:
    """Bytes of one example's activations that make so many columns of a class, of the hungriest weight; at least 1."""
    shapes = [block.deltas.shape for block in blocks if isinstance(block, Factors)]
    return max((4 * positions * -(-columns // outputs) for _, _, positions, outputs in shapes), default=1)


def _shares_memory(blocks: Sequence[Held]) -> bool:
    storages = [tensor.untyped_storage().data_ptr() for block in blocks for tensor in tensors_of(block)]
    return len(set(storages)) < len(storages)


def _joinable(same: Sequence[Held]) -> bool:
    factors = [block for block in same if isinstance(block, Factors)]
    return len(factors) in (0, len(same)) and all(block.unread.apart for block in factors)


def _joined(same: Sequence[Held]) -> Held:
    first = same[0]
    factors = [block for block in same if isinstance(block, Factors)]
    if not isinstance(first, Factors):
        return held(join_blocks([block for block in same if isinstance(block, JacobianBlock)]))
    # Positions stay adjacent in memory, as products want them.
    deltas = torch.cat([block.deltas.transpose(2, 3) for block in factors]).transpose(2, 3)
    return replace(first, unread=first.unread.joined([block.unread for block in factors[1:]]), deltas=deltas)


def joined_rows(blocks: Iterable[Held], room: int) -> list[Held]:
    """Neighbouring parts of one weight as one, so that its activations are multiplied once for all of its rows.

    Args:
        blocks: of one batch, in order.
        room: columns that the smallest slice of a joined weight may have; a wider weight stays cut.

    Returns:
        The blocks, in order.
    """
    found: list[Held] = []
    for _, same in groupby(blocks, key=_weight):
        parts = list(same)
        factors = [part for part in parts if isinstance(part, Factors)]
        rows = sum(part.deltas.shape[3] for part in factors)
        if len(factors) > 1 and rows * factors[0].unread.reach <= room:
            found.append(replace(factors[0], deltas=torch.cat([part.deltas for part in factors], dim=3)))
        else:
            found += parts
    return found


def _weight(block: Held) -> object:
    return block.name if isinstance(block, Factors) else id(block)


def tensors_of(block: Held) -> list[Tensor]:
    """What a held block keeps in memory."""
    if isinstance(block, Factors):
        return [block.unread.inputs, block.deltas]
    if isinstance(block, EmbeddingBlock):
        return [block.indices, block.deltas]
    return [block.dense()]


def bytes_each(block: Held) -> int:
    """Bytes that a held block keeps an example."""
    return sum(tensor.nbytes for tensor in tensors_of(block)) // rows_and_classes(block)[0]


def rows_and_classes(block: Held) -> tuple[int, int]:
    """(n, c)."""
    values = block.dense() if isinstance(block, DenseBlock) else block.deltas
    return values.shape[0], values.shape[1]


def count(blocks: Sequence[Held]) -> int:
    """Examples of consecutive batches."""
    return sum(rows_and_classes(block)[0] for block in blocks)


def column_slices(blocks: Sequence[Held], room: int) -> Iterator[slice]:
    """Parts of a block's columns, so that all examples' values in one number at most `room`, or the least there can be.

    The slices number input channels of a weight, rows of an embedding, and columns of anything else.

    Yields:
        One part after another.
    """
    block = blocks[0]
    each, units = _unit(block)
    step = max(1, room // (count(blocks) * rows_and_classes(block)[1] * each))
    for start in range(0, units, step):
        yield slice(start, min(start + step, units))


def unit_columns(block: Held) -> int:
    """Columns of the smallest slice."""
    return _unit(block)[0]


def device_of(block: Held) -> torch.device:
    """Where a held block is."""
    return tensors_of(block)[0].device


def _unit(block: Held) -> tuple[int, int]:
    """(columns of the smallest slice, number of such slices)."""
    if isinstance(block, Factors):
        each = block.unread.reach * block.deltas.shape[3]
        return each, block.size // each
    if isinstance(block, EmbeddingBlock):
        return block.deltas.shape[3], block.num_embeddings
    return 1, block.size


def dense_columns(blocks: Sequence[Held], part: slice) -> Tensor:
    """The columns of a slice for all examples, [n, c, w] float32."""
    n, c = count(blocks), rows_and_classes(blocks[0])[1]
    out = torch.empty(n, c, (part.stop - part.start) * unit_columns(blocks[0]), device=device_of(blocks[0]))
    at = 0
    for block in blocks:
        rows = rows_and_classes(block)[0]
        write_columns(block, part, out[at : at + rows])
        at += rows
    return out


def write_columns(block: Held, part: slice, out: Tensor) -> None:
    """The columns of a slice for one batch, into float32 `out` [n, c, w], adjacent within an example."""
    if isinstance(block, Factors):
        n, c, positions, outputs = block.deltas.shape
        activations = block.activations(part)
        deltas = block.deltas.to(activations.dtype).transpose(2, 3).reshape(n, c * outputs, positions)
        if activations.dtype == torch.float32:
            torch.bmm(deltas, activations, out=out.view(n, c * outputs, -1))
        else:
            out.copy_(torch.bmm(deltas, activations).view(out.shape))
    elif isinstance(block, EmbeddingBlock):
        out.copy_(block.values(part.start, part.stop))
    else:
        out.copy_(block.dense()[..., part])
