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

from gradstore.arithmetic import matrix_unit
from gradstore.jacobians import DenseBlock, EmbeddingBlock
from gradstore.kernels.exact.dense_rows import Sums, formed, slices, workers_for
from gradstore.kernels.exact.factors import Factors, Held, column_slices, count, dense_columns, rows_and_classes
from gradstore.machine.threads import Workers

# Bytes for dense rows beyond which nothing is gained.
_MOST_SCRATCH = 1 << 27
# An elementwise pass over products costs about as much as this many multiply-adds of a matrix product.
_PASS = 30

Pair = tuple[Sequence[Held], Sequence[Held]]
"""A block of parameters for consecutive batches of the rows' examples, and for those of the columns'."""


def contract(blocks: Sequence[Pair], out: Tensor, *, pairs: bool, scratch: int) -> list[Tensor]:
    """Add the inner products over some blocks of parameters.

    Products are float32, and so are their sums over some ten thousand columns; those are added up in float64.

    Args:
        blocks: n examples in all on the left and m on the right, c rows each; the same object on both sides computes
            values on and above the diagonal, and some below it.
        out: float64 [n, m], to which Σ_c ⟨g_i^c, g_j^c⟩ is added; or, where `pairs`, [n c, m c] for ⟨g_i^c, g_j^d⟩.
        pairs: one value for each pair of classes.
        scratch: bytes that intermediate values may take, roughly, beside 4 for each value of `out`.

    Returns:
        For each block the squared norms of the right side's rows, float64 [m, c].
    """
    if not blocks:
        return []
    # Made before the rest: results that stay would otherwise lie scattered in what was freed around them.
    squares = torch.empty(len(blocks), *_examples_and_classes(blocks[0][1]), dtype=torch.float64, device=out.device)
    dense = [i for i, pair in enumerate(blocks) if not factored_is_cheaper(*pair, pairs)]
    for i in sorted(set(range(len(blocks))) - set(dense)):
        _contract_factors(*blocks[i], out, pairs, scratch)
        squares[i] = squared_norms(blocks[i][1], scratch)
    if dense:
        with workers_for(out.device) as workers:
            found = _contract_dense([blocks[i] for i in dense], out, pairs, scratch, workers)
        for i, square in zip(dense, found, strict=True):
            squares[i] = square
    return list(squares)


def _examples_and_classes(batches: Sequence[Held]) -> tuple[int, int]:
    return count(batches), rows_and_classes(batches[0])[1]


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


def _contract_dense(
    blocks: Sequence[Pair], out: Tensor, pairs: bool, scratch: int, workers: Workers | None
) -> list[Tensor]:
    left, right = ([pair[side] for pair in blocks] for side in (0, 1))
    own = all(a is b for a, b in blocks)
    m = count(right[0])
    squares = [torch.zeros(m, rows_and_classes(b[0])[1], dtype=torch.float64, device=out.device) for b in right]
    sums = Sums(out, own, workers)
    taken = workers.count * matrix_unit.WORKSPACE_BYTES if workers else 0
    room = min(max(scratch - taken, scratch // 2), _MOST_SCRATCH) // (
        6 if own else 12
    )  # float32 values, and a third for making them
    least = 0 if own else max(rows_and_classes(batch)[0] for batch in left[0])  # rows that are made at a time
    for pieces in slices(right, room // max(m, least), joined=not pairs):
        c = rows_and_classes(right[pieces[0].block][0])[1] if pairs else 1
        columns = formed(right, pieces, range(len(right[0])), workers, squares)
        whole = columns.view(m * c, -1)
        if own:
            sums.add(whole, whole)
        at = 0
        for batches in _runs(left[0], room // columns.shape[1]) if not own else ():
            rows = formed(left, pieces, batches, workers).view(-1, whole.shape[1])
            sums.add(rows, whole, at)
            at += len(rows)
            del rows  # its memory is used again
        del columns, whole
    sums.settle()
    return squares


def _runs(batches: Sequence[Held], rows: int) -> Iterator[range]:
    """Consecutive batches with at most `rows` examples together, at least one batch at a time."""
    start, held = 0, 0
    for i, batch in enumerate(batches):
        n = rows_and_classes(batch)[0]
        if i > start and held + n > rows:
            yield range(start, i)
            start, held = i, 0
        held += n
    yield range(start, len(batches))


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
    # Products of deltas and of activations, their sum, and the same in float64.
    room = scratch // (each**2 * (16 * _positions(a[0]) * _positions(b[0]) + 12))
    most = scratch // 5 // max(_activation_bytes(a[0]), _activation_bytes(b[0]), 1)  # on either side
    at = 0
    for left in _parts(a, min(room // m, most)):
        rows, start = count(left), 0
        for right in _parts(b, min(room // rows, most)):
            part = _factored(left, right, pairs, scratch // 4)
            out[at : at + part.shape[0], start : start + part.shape[1]] += part
            start += part.shape[1]
        at += rows * each


def _positions(block: Held) -> int:
    return block.deltas.shape[2]  # type: ignore[union-attr]


def _factored(left: Sequence[Held], right: Sequence[Held], pairs: bool, room: int) -> Tensor:
    """Values of some examples; copies of deltas take `room` bytes, or those of one output where they are more."""
    outputs = left[0].deltas.shape[3]  # type: ignore[union-attr]
    step = max(1, room * outputs // sum(_delta_bytes(block) for block in (*left, *right)))
    a, b = (_deltas(side, pairs, slice(0, step)) for side in (left, right))
    shape = (*a.shape[:3], *b.shape[:3])
    products = a.flatten(0, 2) @ b.flatten(0, 2).T
    for start in range(step, outputs, step):
        del a, b  # before the next are made
        a, b = (_deltas(side, pairs, slice(start, start + step)) for side in (left, right))
        products.addmm_(a.flatten(0, 2), b.flatten(0, 2).T)
    del a, b
    products = products.view(shape)
    products *= _matches(left, right)[:, None, :, :, None, :]
    return products.sum((2, 5)).flatten(2).flatten(0, 1)


def _activation_bytes(block: Held) -> int:
    """Bytes of one example's activations."""
    return 4 * block.deltas.shape[2] * block.width if isinstance(block, Factors) else 0


def _delta_bytes(block: Held) -> int:
    """Bytes of its deltas, joined to those of others and put in the order of a product."""
    assert not isinstance(block, DenseBlock)
    return 2 * 4 * block.deltas.numel()


def _deltas(blocks: Sequence[Held], pairs: bool, outputs: slice) -> Tensor:
    """Of some outputs: [n, c, T, o] for pairs of classes; else [n, 1, T, c·o], whose product sums over classes."""
    deltas = torch.cat([block.deltas[..., outputs] for block in blocks]).float()  # type: ignore[union-attr]
    return deltas if pairs else deltas.transpose(1, 2).flatten(2)[:, None]


def _matches(a: Sequence[Held], b: Sequence[Held]) -> Tensor:
    """⟨a_it, a_js⟩, [n, T, m, S]."""
    if isinstance(a[0], EmbeddingBlock):
        left, right = (torch.cat([block.indices for block in side]) for side in (a, b))  # type: ignore[union-attr]
        return (left[:, :, None, None] == right[None, None]).float()
    left, right = (torch.cat([block.activations().float() for block in side]) for side in (a, b))  # type: ignore[union-attr]
    return (left.flatten(0, 1) @ right.flatten(0, 1).T).view(*left.shape[:2], *right.shape[:2])
