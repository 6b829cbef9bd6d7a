"""How a block of Jacobians meets P: the dense product, or a cheaper way to the same sums that its structure allows.

- A `LinearBlock` used at T positions can share the projected activations among its c classes (see
  `compiled_product.accumulate_shared`); a cost model compares that with forming and projecting its dense values.
- An `EmbeddingBlock` is projected at the rows that occur only, each at its own place in P; all other columns are zero.
  The fused kernels take it densely, in parts: a launch for every row that occurs would cost more than the zeros.
- An `OwnRowBlock` is projected at each class's own row of the parameter, all other columns being zero.
- Everything else, and every layer where it is cheaper, goes the dense way.

All routes apply the same entries of P and differ in float32 rounding only. The route depends on shapes within one
example, never on how many examples there are, so that the bits of a row do not depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gradstore.jacobians import EmbeddingBlock, JacobianBlock, LinearBlock, OwnRowBlock
from gradstore.jacobians.footprint import max_columns
from gradstore.projection import compiled_product, compiled_sparse
from gradstore.projection.kinds import kind_of
from gradstore.projection.projection import Projection

_PASS = 64  # parameters that the compiled product looks up for one k and 16 rows, in _LOOK_UP cycles
_LOOK_UP = 15.0
_TABLES = 1.0  # cycles a pass, k and 16 rows for making tables and gathering gradients, at a tile of about 1000 k
_MULTIPLY_ADD = 3.0  # cycles for 16 rows, one k and one output
_FEW_POSITIONS = 4  # of a layer whose outer products are formed without a matrix product
_CACHED_INPUTS = 1 << 14  # activations of an example, of which 16 are side by side: 1 MB
_FORM = 0.6  # cycles to form one dense value, write it and read it again


def accumulate_block(projection: Projection, out: Tensor, block: JacobianBlock, *, first_k: int = 0) -> str:
    """Add the unscaled projection of a block to ``out`` in place, by the cheapest exact route.

    Args:
        projection: the matrix P.
        out: float32 [n, c, K'], contiguous, on the block's device.
        block: Jacobians [n, c, size] of the parameters from ``block.start`` on.
        first_k: the row of P that out[..., 0] belongs to.

    Returns:
        The route: "dense", "shared", "sparse" or "own rows".
    """
    # By all of K, so that columns computed by themselves take the route that they would take together.
    chosen = route(projection, block, projection.dim)
    if chosen == "shared":
        assert isinstance(block, LinearBlock)
        compiled_product.accumulate_shared(
            projection._entries, out, block.activations, block.deltas, block.start, first_k
        )
    elif chosen == "sparse":
        assert isinstance(block, EmbeddingBlock)
        _accumulate_rows(projection, out, block, first_k)
    elif chosen == "own rows":
        assert isinstance(block, OwnRowBlock)
        for c in range(block.first, block.last):
            projection.accumulate(out[:, c], block.inputs, block.own_start(c), first_k=first_k)
    else:
        for part in _parts(block):
            projection.accumulate(out.flatten(0, 1), part.dense().flatten(0, 1), part.start, first_k=first_k)
    return chosen


def route(projection: Projection, block: JacobianBlock, k: int) -> str:
    """The route that `accumulate_block` takes for ``k`` columns: "dense", "shared", "sparse" or "own rows"."""
    if isinstance(block, OwnRowBlock):
        return "own rows"
    if isinstance(block, EmbeddingBlock):
        few = block.indices.shape[1] < block.num_embeddings
        return "sparse" if few and not _fused(projection, block) else "dense"
    if isinstance(block, LinearBlock) and _can_share(projection, block):
        _, c, positions, outputs = block.deltas.shape
        shape = (c, positions, outputs, block.activations.shape[-1])
        if kind_of(projection.kind).sparse is not None:
            return "shared" if _fits_cache(*shape) else "dense"
        return "shared" if shared_cost(*shape) < dense_cost(*shape, k) else "dense"
    return "dense"


def dense_cost(c: int, positions: int, outputs: int, inputs: int, k: int) -> float:
    """Cycles for one example and one k: c rows of gradients, formed once for all k, looked up in passes of 64."""
    values = c * outputs * inputs
    form = values * (_FORM + positions / 16)
    return values / 16 / _PASS * (_LOOK_UP + _TABLES) + form / k


def shared_cost(c: int, positions: int, outputs: int, inputs: int) -> float:
    """Cycles for one example and one k: T rows of activations at each output, then c multiply-adds."""
    passes = (
        1 + (inputs - 1) / _PASS
    )  # the mean number of words that `inputs` consecutive bits touch, wherever they begin
    return positions * outputs / 16 * (passes * (_LOOK_UP + _TABLES) + c * _MULTIPLY_ADD)


def _fits_cache(c: int, positions: int, outputs: int, inputs: int) -> bool:
    """Whether a sparse P meets values that are formed as they are added, and not those of a product in memory."""
    return positions <= _FEW_POSITIONS and positions * inputs <= _CACHED_INPUTS


def _can_share(projection: Projection, block: LinearBlock) -> bool:
    on_cpu = block.deltas.device.type == "cpu"
    return kind_of(projection.kind).shares_layers and projection.backend == "native" and on_cpu


def _fused(projection: Projection, block: EmbeddingBlock) -> bool:
    return projection.fused(block.deltas.device)


def _parts(block: JacobianBlock) -> Iterator[JacobianBlock]:
    """A large embedding matrix by some whole rows at a time; any other block as it is."""
    if isinstance(block, EmbeddingBlock):
        columns = max_columns(block.deltas.device, block.deltas.shape[1])
        if block.size > columns:
            return block.parts(columns)
    return iter([block])


def _accumulate_rows(projection: Projection, out: Tensor, block: EmbeddingBlock, first_k: int) -> None:
    """Project each row of the embedding matrix that occurs, for the examples in which it does."""
    merged, first = _merge_repeats(block.indices, block.deltas)
    if kind_of(projection.kind).sparse is not None and projection.path(out.device) == "native":
        starts = torch.where(first, block.start + block.indices * block.deltas.shape[-1], -1)
        compiled_sparse.accumulate_rows(projection._entries, out, merged.float(), starts, first_k)
        return
    examples, tokens = torch.nonzero(first, as_tuple=True)
    rows, order = torch.sort(block.indices[examples, tokens], stable=True)
    examples, tokens = examples[order], tokens[order]
    unique, counts = torch.unique_consecutive(rows, return_counts=True)
    width = block.deltas.shape[-1]
    for row, which, token in zip(
        unique.tolist(), examples.split(counts.tolist()), tokens.split(counts.tolist()), strict=True
    ):
        gradients = merged[which, :, token]
        part = out.new_zeros(math.prod(gradients.shape[:2]), out.shape[-1])
        projection.accumulate(part, gradients.flatten(0, 1), block.start + row * width, first_k=first_k)
        out[which] += part.view(len(which), *out.shape[1:])


def _merge_repeats(indices: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the tokens of an example that take the same row, at the first of them and in their order.

    Args:
        indices: [n, S] int64.
        deltas: [n, c, S, d].

    Returns:
        The sums, [n, c, S, d], and which tokens are the first of their row, bool [n, S].
    """
    n, tokens = indices.shape
    place = (indices[:, :, None] == indices[:, None, :]).to(torch.uint8).argmax(dim=2)  # of the first equal index
    merged = torch.zeros_like(deltas, dtype=torch.promote_types(deltas.dtype, torch.float32))
    example = torch.arange(n, device=indices.device)
    for token in range(tokens):
        merged[example, :, place[:, token]] += deltas[:, :, token]
    return merged, place == torch.arange(tokens, device=indices.device)
