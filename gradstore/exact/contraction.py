"""Inner products of per-example Jacobians, one block of parameters at a time, in whichever exact form is cheaper.

The Jacobian of a weight is a sum over positions of outer products, J_i = Σ_t δ_it ⊗ a_it, so (Engel et al., ICLR 2024,
App. D; Novak et al. 2022, "Fast finite width neural tangent kernel")

    ⟨J_i, J_j⟩ = Σ_t Σ_s ⟨δ_it, δ_js⟩ ⟨a_it, a_js⟩            about T² (o + i) operations a pair: "factored"
               = a product of the dense rows                   about o · i operations a pair: "dense"

With one position (a linear layer on one vector) the first form is the cheaper by far; a convolution with many positions
and few channels takes the second. An embedding is a weight whose ⟨a_it, a_js⟩ is 1 where both tokens are the same row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradstore.jacobians import DenseBlock, EmbeddingBlock, JacobianBlock, LinearBlock

# An elementwise pass over products costs about as much as this many multiply-adds of a matrix product.
_PASS = 30


def contract(a: Sequence[JacobianBlock], b: Sequence[JacobianBlock], out: Tensor, *, pairs: bool, scratch: int) -> None:
    """Add the inner products over one block of parameters.

    Products are float32, their sums over blocks float64.

    Args:
        a: the block for consecutive groups of examples, n in all; c rows an example.
        b: the same for m others.
        out: float64 [n, m], to which Σ_c ⟨g_i^c, g_j^c⟩ is added; or, where `pairs`, [n c, m c] for ⟨g_i^c, g_j^d⟩.
        pairs: one value for each pair of classes.
        scratch: bytes that intermediate values may take, roughly.
    """
    if _factored_is_cheaper(a, b, pairs):
        _contract_factors(a, b, out, pairs, scratch)
    else:
        _contract_dense(a, b, out, pairs, scratch)


def held(block: JacobianBlock) -> JacobianBlock:
    """The block in a form that keeps nothing else alive: its factors, or its values."""
    return (
        block
        if isinstance(block, (LinearBlock, EmbeddingBlock))
        else DenseBlock(block.name, block.start, block.dense())
    )


def tensors_of(block: JacobianBlock) -> list[Tensor]:
    """What a held block keeps in memory."""
    if isinstance(block, LinearBlock):
        return [block.activations, block.deltas]
    if isinstance(block, EmbeddingBlock):
        return [block.indices, block.deltas]
    return [block.dense()]


def _shape(block: JacobianBlock) -> tuple[int, int]:
    """(n, c)."""
    values = block.deltas if isinstance(block, (LinearBlock, EmbeddingBlock)) else block.dense()
    return values.shape[0], values.shape[1]


def _factored_is_cheaper(a: Sequence[JacobianBlock], b: Sequence[JacobianBlock], pairs: bool) -> bool:
    left, right = a[0], b[0]
    if not isinstance(left, (LinearBlock, EmbeddingBlock)) or not isinstance(right, (LinearBlock, EmbeddingBlock)):
        return False
    c, o = left.deltas.shape[1], left.deltas.shape[3]
    i = left.activations.shape[2] if isinstance(left, LinearBlock) else 1
    values = c * c if pairs else 1
    rows = c * c if pairs else c
    positions = left.deltas.shape[2] * right.deltas.shape[2]
    n, m = (sum(_shape(block)[0] for block in side) for side in (a, b))
    forming = c * left.size * (left.deltas.shape[2] if isinstance(left, LinearBlock) else 1) * (1 / n + 1 / m)
    elementwise = _PASS * values if positions > 1 else values
    return positions * (rows * o + i + elementwise) < rows * left.size + forming


def _contract_dense(
    a: Sequence[JacobianBlock], b: Sequence[JacobianBlock], out: Tensor, pairs: bool, scratch: int
) -> None:
    c = _shape(a[0])[1]
    for low, high in _slices(b, scratch // (8 * c)):
        right = _rows(b, low, high, pairs)
        at = 0
        for part in _parts(a, scratch // (8 * c * (high - low))):
            left = _rows(part, low, high, pairs)
            out[at : at + len(left)] += left @ right.T
            at += len(left)


def _slices(blocks: Sequence[JacobianBlock], room: int) -> Iterator[tuple[int, int]]:
    """Columns to take at a time, whole rows of a weight, so that all examples' values number at most `room`."""
    block, n = blocks[0], sum(_shape(block)[0] for block in blocks)
    width = 1
    if isinstance(block, LinearBlock):
        width = block.activations.shape[2]
    elif isinstance(block, EmbeddingBlock):
        width = block.deltas.shape[3]
    step = max(1, room // (n * width)) * width
    for low in range(0, block.size, step):
        yield low, min(low + step, block.size)


def _parts(blocks: Sequence[JacobianBlock], rows: int) -> Iterator[list[JacobianBlock]]:
    """Consecutive blocks with at most `rows` examples together, at least one block at a time."""
    part: list[JacobianBlock] = []
    for block in blocks:
        if part and sum(_shape(other)[0] for other in [*part, block]) > rows:
            yield part
            part = []
        part.append(block)
    yield part


def _rows(blocks: Sequence[JacobianBlock], low: int, high: int, pairs: bool) -> Tensor:
    """Dense columns of all examples: [n c, w] for pairs of classes, or [n, c w], whose product sums over classes."""
    values = torch.cat([_columns(block, low, high) for block in blocks])
    return values.flatten(0, 1) if pairs else values.flatten(1)


def _columns(block: JacobianBlock, low: int, high: int) -> Tensor:
    """Columns of a block, [n, c, high - low] float32; a weight's are made from its factors and not kept."""
    if isinstance(block, LinearBlock):
        width = block.activations.shape[2]
        return LinearBlock(block.name, 0, block.activations, block.deltas[..., low // width : high // width]).dense()
    if isinstance(block, EmbeddingBlock):
        width = block.deltas.shape[3]
        return block.rows(low // width, high // width).dense()
    return block.dense()[..., low:high]


def _contract_factors(
    a: Sequence[JacobianBlock], b: Sequence[JacobianBlock], out: Tensor, pairs: bool, scratch: int
) -> None:
    """Products of deltas times products of activations, summed over both positions."""
    n, m = (sum(_shape(block)[0] for block in side) for side in (a, b))
    each = out.shape[0] // n  # rows an example
    room = scratch // (8 * each**2 * _positions(a[0]) * _positions(b[0]))
    at = 0
    for left in _parts(a, room // m):
        rows = sum(_shape(block)[0] for block in left)
        start = 0
        for right in _parts(b, room // rows):
            part = _factored(left, right, pairs)
            out[at : at + part.shape[0], start : start + part.shape[1]] += part
            start += part.shape[1]
        at += rows * each


def _positions(block: JacobianBlock) -> int:
    return block.deltas.shape[2]  # type: ignore[attr-defined]


def _factored(left: Sequence[JacobianBlock], right: Sequence[JacobianBlock], pairs: bool) -> Tensor:
    a, b = _deltas(left, pairs), _deltas(right, pairs)
    products = (a.flatten(0, 2) @ b.flatten(0, 2).T).view(*a.shape[:3], *b.shape[:3])
    products *= _matches(left, right)[:, None, :, :, None, :]
    return products.sum((2, 5)).flatten(2).flatten(0, 1)


def _deltas(blocks: Sequence[JacobianBlock], pairs: bool) -> Tensor:
    """[n, c, T, o] for pairs of classes; else [n, 1, T, c·o], whose product sums over classes."""
    deltas = torch.cat([block.deltas for block in blocks]).float()  # type: ignore[attr-defined]
    return deltas if pairs else deltas.transpose(1, 2).flatten(2)[:, None]


def _matches(a: Sequence[JacobianBlock], b: Sequence[JacobianBlock]) -> Tensor:
    """⟨a_it, a_js⟩, [n, T, m, S]."""
    if isinstance(a[0], EmbeddingBlock):
        left, right = (torch.cat([block.indices for block in side]) for side in (a, b))  # type: ignore[attr-defined]
        return (left[:, :, None, None] == right[None, None]).float()
    left, right = (torch.cat([block.activations for block in side]).float() for side in (a, b))  # type: ignore[attr-defined]
    return (left.flatten(0, 1) @ right.flatten(0, 1).T).view(*left.shape[:2], *right.shape[:2])
