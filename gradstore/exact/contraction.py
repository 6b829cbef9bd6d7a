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

from gradstore.exact.factors import Factors, Held, column_slices, count, dense_columns, rows_and_classes
from gradstore.jacobians import DenseBlock, EmbeddingBlock

# An elementwise pass over products costs about as much as this many multiply-adds of a matrix product.
_PASS = 30
# Rows of a symmetric product that are computed together; of their square both halves are.
_SQUARE = 128


def contract(a: Sequence[Held], b: Sequence[Held], out: Tensor, *, pairs: bool, scratch: int) -> Tensor:
    """Add the inner products over one block of parameters.

    Products are float32, their sums over blocks float64.

    Args:
        a: the block for consecutive batches of examples, n in all; c rows an example.
        b: the same for m others; `a` itself computes values on and above the diagonal, and some below it.
        out: float64 [n, m], to which Σ_c ⟨g_i^c, g_j^c⟩ is added; or, where `pairs`, [n c, m c] for ⟨g_i^c, g_j^d⟩.
        pairs: one value for each pair of classes.
        scratch: bytes that intermediate values may take, roughly.

    Returns:
        The squared norms of b's rows over this block, float64 [m, c].
    """
    if factored_is_cheaper(a, b, pairs):
        _contract_factors(a, b, out, pairs, scratch)
        return squared_norms(b, scratch)
    return _contract_dense(a, b, out, pairs, scratch)


def squared_norms(blocks: Sequence[Held], scratch: int) -> Tensor:
    """Σ of the squared values of each row over one block of parameters, float64 [n, c]."""
    first = blocks[0]
    if isinstance(first, EmbeddingBlock):
        return torch.cat([block.sq_norm() for block in blocks])  # type: ignore[union-attr]
    if isinstance(first, Factors) and first.deltas.shape[2] == 1:
        return torch.cat([_rank_one_norms(block) for block in blocks])  # type: ignore[arg-type]
    total = torch.zeros(())
    for part in column_slices(blocks, scratch // 8):
        total = total + _squares(dense_columns(blocks, part))
    return total


def factored_is_cheaper(a: Sequence[Held], b: Sequence[Held], pairs: bool) -> bool:
    """Whether the factored form takes fewer operations than the dense one."""
    return operations(a, b, pairs, factored=True) < operations(a, b, pairs, factored=False)


def operations(a: Sequence[Held], b: Sequence[Held], pairs: bool, *, factored: bool) -> float:
    """Multiply-adds a pair of examples, what forming dense rows takes included; infinite where there are no factors."""
    left, right = a[0], b[0]
    c = rows_and_classes(left)[1]
    rows = c * c if pairs else c
    if isinstance(left, DenseBlock) or isinstance(right, DenseBlock):
        return float("inf") if factored else float(rows * left.size)
    o = left.deltas.shape[3]
    positions = left.deltas.shape[2] * right.deltas.shape[2]
    if factored:
        values = c * c if pairs else 1
        return positions * (rows * o + _inputs(left) + (_PASS * values if positions > 1 else values))
    forming = c * left.size * (left.deltas.shape[2] if isinstance(left, Factors) else 1)
    return rows * left.size + forming * (1 / count(a) + 1 / count(b))


def _inputs(block: Held) -> int:
    return block.width if isinstance(block, Factors) else 1


def _rank_one_norms(block: Factors) -> Tensor:
    return block.deltas.double().square().sum((2, 3)) * block.activations().double().square().sum((1, 2))[:, None]


def _squares(columns: Tensor) -> Tensor:
    return torch.linalg.vector_norm(columns, dim=2).double().square()


def _contract_dense(a: Sequence[Held], b: Sequence[Held], out: Tensor, pairs: bool, scratch: int) -> Tensor:
    squares = torch.zeros(())
    rows = max(_SQUARE, scratch // (8 * out.shape[1]))  # of a product
    for part in column_slices(b, scratch // (8 if a is b else 16)):
        columns = dense_columns(b, part)
        squares = squares + _squares(columns)
        right = columns.flatten(0, 1) if pairs else columns.flatten(1)
        if a is b:
            for low in range(0, len(right), _SQUARE):
                out[low : low + _SQUARE, low:] += right[low : low + _SQUARE] @ right[low:].T
            continue
        at = 0
        for some in _parts(a, max(1, scratch // (16 * columns[0].numel()))):
            left = dense_columns(some, part)
            left = left.flatten(0, 1) if pairs else left.flatten(1)
            for low in range(0, len(left), rows):
                piece = left[low : low + rows] @ right.T
                out[at + low : at + low + len(piece)] += piece
            at += len(left)
    return squares


def _parts(blocks: Sequence[Held], rows: int) -> Iterator[list[Held]]:
    """Consecutive blocks with at most `rows` examples together, at least one block at a time."""
    part: list[Held] = []
    for block in blocks:
        if part and count([*part, block]) > rows:
            yield part
            part = []
        part.append(block)
    yield part


def _contract_factors(a: Sequence[Held], b: Sequence[Held], out: Tensor, pairs: bool, scratch: int) -> None:
    """Products of deltas times products of activations, summed over both positions."""
    n, m = count(a), count(b)
    each = out.shape[0] // n  # rows an example
    room = scratch // (8 * each**2 * _positions(a[0]) * _positions(b[0]))
    at = 0
    for left in _parts(a, room // m):
        rows, start = count(left), 0
        for right in _parts(b, room // rows):
            part = _factored(left, right, pairs)
            out[at : at + part.shape[0], start : start + part.shape[1]] += part
            start += part.shape[1]
        at += rows * each


def _positions(block: Held) -> int:
    return block.deltas.shape[2]  # type: ignore[union-attr]


def _factored(left: Sequence[Held], right: Sequence[Held], pairs: bool) -> Tensor:
    a, b = _deltas(left, pairs), _deltas(right, pairs)
    products = (a.flatten(0, 2) @ b.flatten(0, 2).T).view(*a.shape[:3], *b.shape[:3])
    products *= _matches(left, right)[:, None, :, :, None, :]
    return products.sum((2, 5)).flatten(2).flatten(0, 1)


def _deltas(blocks: Sequence[Held], pairs: bool) -> Tensor:
    """[n, c, T, o] for pairs of classes; else [n, 1, T, c·o], whose product sums over classes."""
    deltas = torch.cat([block.deltas for block in blocks]).float()  # type: ignore[union-attr]
    return deltas if pairs else deltas.transpose(1, 2).flatten(2)[:, None]


def _matches(a: Sequence[Held], b: Sequence[Held]) -> Tensor:
    """⟨a_it, a_js⟩, [n, T, m, S]."""
    if isinstance(a[0], EmbeddingBlock):
        left, right = (torch.cat([block.indices for block in side]) for side in (a, b))  # type: ignore[union-attr]
        return (left[:, :, None, None] == right[None, None]).float()
    left, right = (torch.cat([block.activations().float() for block in side]) for side in (a, b))  # type: ignore[union-attr]
    return (left.flatten(0, 1) @ right.flatten(0, 1).T).view(*left.shape[:2], *right.shape[:2])
