"""Blocks of a batch, one after another, added to features: a sparse P takes several together, others each as it comes.

A sparse P has so little to do with a small block that reading and writing all features for it would take longer. Its
blocks wait until they have `SPAN` columns together. Where that is depends on the sizes of the blocks alone, so the bits
of a row do not depend on its batch: where groups of rows differ in their structure, all are cut as the finest needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gradstore.jacobians import JacobianBlock, LinearBlock
from gradstore.projection import compiled_sparse
from gradstore.projection.block_routes import accumulate_block, route
from gradstore.projection.compiled_sparse import SPAN, OuterProducts, Values
from gradstore.projection.kinds import kind_of
from gradstore.projection.projection import Projection


def columns_that_wait(projection: Projection, device: torch.device) -> int:
    """How many columns of blocks are held at most until they are added."""
    waits = kind_of(projection.kind).sparse is not None and projection.path(device) == "native"
    return SPAN if waits else 0


@dataclass(frozen=True)
class _Waiting:
    """Blocks of the same columns for some rows of a batch; `first` and `last` count examples."""

    first: int
    last: int
    block: Values | OuterProducts

    def part(self, first: int, last: int, classes: int) -> Values | OuterProducts:
        """Those of fewer examples."""
        rows = slice(first - self.first, last - self.first)
        if isinstance(self.block, OuterProducts):
            return OuterProducts(self.block.start, self.block.activations[rows], self.block.deltas[rows])
        return Values(self.block.start, self.block.values[rows.start * classes : rows.stop * classes])


class BlockSums:
    """P g of a batch, in the making.

    Args:
        projection: the matrix P.
        out: float32 [n, c, K'], contiguous, on the blocks' device; what is added to in place.
        first_k: the row of P that out[..., 0] belongs to.
    """

    def __init__(self, projection: Projection, out: Tensor, first_k: int) -> None:
        self._projection, self._out, self._first_k = projection, out, first_k
        self._most = columns_that_wait(projection, out.device)
        self._columns = 0
        self._waiting: list[_Waiting] = []

    def expect(self, size: int) -> None:
        """Make room for blocks of so many columns, the same ones of all examples, which are added next."""
        if self._columns and self._columns + size > self._most:
            self.finish()
        self._columns += size

    def add(self, places: slice, block: JacobianBlock) -> None:
        """Add the product with a block [n', c, size] of some examples, now or at the next `finish`."""
        how = route(self._projection, block, self._projection.dim) if self._most else ""
        if how == "shared":
            assert isinstance(block, LinearBlock)
            outer = OuterProducts(block.start, block.activations, block.deltas)
            self._waiting.append(_Waiting(places.start, places.stop, outer))
        elif how == "dense":
            values = Values(block.start, block.dense().flatten(0, 1))
            self._waiting.append(_Waiting(places.start, places.stop, values))
        else:
            accumulate_block(self._projection, self._out[places], block, first_k=self._first_k)

    def finish(self) -> None:
        """Add what waits."""
        classes, entries = self._out.shape[1], self._projection._entries
        edges = sorted({edge for some in self._waiting for edge in (some.first, some.last)})
        for first, last in pairwise(edges):
            blocks = [some.part(first, last, classes) for some in self._waiting if some.first <= first < some.last]
            out = self._out[first:last].flatten(0, 1)
            compiled_sparse.accumulate(entries, out, blocks, self._first_k, classes=classes)
        self._waiting, self._columns = [], 0
