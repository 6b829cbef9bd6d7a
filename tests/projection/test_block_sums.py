"""Blocks that wait for each other: their sums, the bits of a row whatever its batch, and how much waits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradstore.jacobians import DenseBlock, EmbeddingBlock, JacobianBlock, LinearBlock
from gradstore.native import library
from gradstore.projection import Projection, block_sums, compiled_sparse
from gradstore.projection.block_sums import BlockSums, columns_that_wait
from gradstore.projection.compiled_sparse import OuterProducts, Values

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.skipif(not library.available(), reason=f"compiled code: {library.status().why}"),
]

CPU = torch.device("cpu")
N, C = 7, 3


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def layers(n: slice = slice(None)) -> list[JacobianBlock]:
    """A bias, a layer on one vector, one at many positions, an embedding, and values for more than a span."""
    return [
        DenseBlock("bias", 0, random(N, C, 10)[n]),
        LinearBlock("first", 128, random(N, 1, 40)[n], random(N, C, 1, 30)[n]),
        LinearBlock("conv", 1408, random(N, 50, 27)[n], random(N, C, 50, 8)[n]),
        EmbeddingBlock("words", 1664, torch.arange(N * 4).view(N, 4)[n] % 90, random(N, C, 4, 20)[n], 90),
        DenseBlock("wide", 4096, random(N, C, 70_000)[n]),
        DenseBlock("last", 77_000, random(N, C, 300)[n]),
    ]


def summed(blocks: list[JacobianBlock], places: list[list[slice]], n: int, K: int = 2048) -> Tensor:
    """Each block in the given parts of the batch."""
    out = torch.zeros(n, C, K)
    sums = BlockSums(Projection("sjlt", K, seed=4), out, 0)
    for block, parts in zip(blocks, places, strict=True):
        sums.expect(block.size)
        for part in parts:
            sums.add(part, cut(block, part))
    sums.finish()
    return out


def cut(block: JacobianBlock, n: slice) -> JacobianBlock:
    """The block of some examples."""
    if isinstance(block, EmbeddingBlock):
        return EmbeddingBlock(block.name, block.start, block.indices[n], block.deltas[n], block.num_embeddings)
    if isinstance(block, LinearBlock):
        return LinearBlock(block.name, block.start, block.activations[n], block.deltas[n])
    return DenseBlock(block.name, block.start, block.dense()[n])


def test_all_blocks_are_added_up() -> None:
    blocks, all_rows = layers(), slice(0, N)
    got = summed(blocks, [[all_rows]] * len(blocks), N)
    want = torch.zeros(N * C, 2048)
    for block in blocks:
        Projection("sjlt", 2048, seed=4, backend="reference").accumulate(want, block.dense().flatten(0, 1), block.start)
    assert (got.flatten(0, 1) - want).norm() / want.norm() < 5e-7


def test_the_bits_of_a_row_do_not_depend_on_how_its_batch_is_joined() -> None:
    blocks, whole, parts = layers(), [slice(0, N)], [slice(0, 2), slice(2, 5), slice(5, N)]
    together = summed(blocks, [whole] * len(blocks), N)
    for cuts in ([parts] * len(blocks), [whole, parts, [slice(0, 3), slice(3, N)], whole, parts, whole]):
        assert torch.equal(summed(blocks, cuts, N), together)
    alone = layers(slice(4, 5))
    assert torch.equal(summed(alone, [[slice(0, 1)]] * len(alone), 1), together[4:5])


def test_several_segments_have_the_same_bits_at_every_level() -> None:
    entries, found = Projection("sjlt", 3072, seed=1)._entries, []
    for level in library.levels():
        found.append(torch.zeros(N * C, 3072))
        some = [Values(5, random(N * C, 900)), OuterProducts(2000, random(N, 2, 40), random(N, C, 2, 30))]
        some.append(Values(2**33, random(N * C, 65_000)))
        compiled_sparse.accumulate(entries, found[-1], some, 0, classes=C, level=level)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_no_more_waits_than_a_span(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    accumulate = compiled_sparse.accumulate

    def watch(entries: object, out: Tensor, blocks: list[Values], *more: int, **named: int) -> None:
        taken.append(sum(block.values.shape[1] for block in blocks))
        accumulate(entries, out, blocks, *more, **named)

    monkeypatch.setattr(block_sums.compiled_sparse, "accumulate", watch)
    sizes = [10, 40_000, 25_000, 1_000, 70_000, 5, 65_000]
    blocks: list[JacobianBlock] = [DenseBlock(str(i), 128 * 1000 * i, random(N, C, p)) for i, p in enumerate(sizes)]
    summed(blocks, [[slice(0, N)]] * len(blocks), N)
    assert taken == [65_010, 1_000, 70_000, 65_005]


def test_only_blocks_for_a_compiled_sparse_product_wait() -> None:
    assert columns_that_wait(Projection("sjlt"), CPU) == 1 << 16
    assert columns_that_wait(Projection("sjlt", backend="reference"), CPU) == 0
    assert columns_that_wait(Projection(), CPU) == 0
