"""Every route of a block through P equals the dense one, and the choice of a route is the cheaper one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradstore.jacobians import DenseBlock, EmbeddingBlock, JacobianBlock, LinearBlock
from gradstore.native import library
from gradstore.projection import Projection, compiled_product
from gradstore.projection.block_routes import accumulate_block, route
from gradstore.projection.kinds import kind_of

pytestmark = pytest.mark.numerical

needs_library = pytest.mark.skipif(not library.available(), reason=f"compiled code: {library.status().why}")
# examples, classes, positions, outputs, inputs, start
LINEAR = [
    (3, 10, 1, 20, 37, 0),
    (17, 10, 1, 7, 64, 128),
    (5, 3, 7, 8, 200, 2**32 - 1024),
    (40, 1, 3, 5, 300, 13 * 128),
    (2, 130, 1, 3, 5000, 256),
    (33, 4, 2, 70, 1, 128),
    (2, 6, 1, 2, 9000, 0),
]


KINDS = ("rademacher", "gaussian", "sjlt")
SHARED = ("rademacher", "sjlt")


def linear(n: int, c: int, positions: int, outputs: int, inputs: int, start: int) -> LinearBlock:
    generator = torch.Generator().manual_seed(n + c + inputs)
    activations = torch.randn(n, positions, inputs, generator=generator)
    return LinearBlock("weight", start, activations, torch.randn(n, c, positions, outputs, generator=generator))


def embedding(vocabulary: int = 50, n: int = 6, tokens: int = 9, start: int = 384) -> EmbeddingBlock:
    generator = torch.Generator().manual_seed(vocabulary)
    indices = torch.randint(0, min(vocabulary, 12), (n, tokens), generator=generator)
    return EmbeddingBlock("embedding", start, indices, torch.randn(n, 3, tokens, 20, generator=generator), vocabulary)


def dense(projection: Projection, block: JacobianBlock, k: int, first_k: int) -> Tensor:
    """The product in float64 with the entries of P as they are defined."""
    values = block.dense().double()
    n, c, size = values.shape
    out = torch.zeros(n, c, k, dtype=torch.float64)
    for begin in range(0, size, 4096):
        p = block.start + torch.arange(begin, min(begin + 4096, size))
        out += values[..., begin : begin + 4096] @ projection.entries(first_k + torch.arange(k)[:, None], p).T
    return out


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@needs_library
@pytest.mark.parametrize("shape", LINEAR)
@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("kind", SHARED)
def test_sharing_across_classes_equals_the_dense_product(kind, shape, level):
    block, projection = linear(*shape), Projection(kind, dim=kind_of(kind).fitting(70)[1], seed=3, stream=1)
    got = torch.zeros(shape[0], shape[1], 61)
    compiled_product.accumulate_shared(
        projection._entries, got, block.activations, block.deltas, block.start, 5, level=level
    )  # fmt: skip
    assert relative_error(got, dense(projection, block, 61, 5)) < 5e-7


@needs_library
def test_outer_products_meet_a_sparse_matrix_with_the_same_bits_at_every_level():
    block, found = linear(9, 5, 3, 40, 90, 2**16 - 1000), []
    for level in library.levels():
        found.append(torch.zeros(9, 5, 1024))
        entries = Projection("sjlt", 1024)._entries
        compiled_product.accumulate_shared(
            entries, found[-1], block.activations, block.deltas, block.start, 0, level=level
        )
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_library
@pytest.mark.parametrize("kind", SHARED)
def test_sharing_gives_the_same_bits_whatever_the_batch_the_threads_and_the_tiles(kind):
    projection = Projection(kind, dim=kind_of(kind).fitting(300)[1], seed=3)
    block = linear(37, 5, 3, 40, 90, 0)

    def shared(rows: slice, k: int, stop: int) -> Tensor:
        out = torch.zeros(len(range(37)[rows]), 5, stop - k)
        compiled_product.accumulate_shared(projection._entries, out, block.activations[rows], block.deltas[rows], 0, k)
        return out

    whole, threads = shared(slice(None), 0, 300), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(shared(slice(None), 0, 300), whole)
        torch.set_num_threads(1)
        assert torch.equal(shared(slice(4, 5), 0, 300), whole[4:5])
        assert torch.equal(shared(slice(9, 33), 17, 201), whole[9:33, :, 17:201])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "block",
    [embedding(), embedding(5), embedding(900, start=2**32), linear(3, 8, 1, 9, 150, 128), linear(3, 2, 30, 9, 40, 0)],
    ids=repr,
)
def test_the_chosen_route_equals_the_dense_product(block, kind, backend):
    projection = Projection(kind, dim=kind_of(kind).fitting(40)[1], seed=8, backend=backend)
    n, c = block.deltas.shape[:2]
    got = torch.ones(n, c, 33)
    accumulate_block(projection, got, block, first_k=4)
    assert relative_error(got - 1, dense(projection, block, 33, 4)) < 1e-6


def test_a_block_without_structure_goes_the_dense_way():
    values = torch.randn(4, 3, 700, generator=torch.Generator().manual_seed(0))
    block, projection = DenseBlock("bias", 128, values), Projection(dim=50)
    got = torch.zeros(4, 3, 50)
    assert accumulate_block(projection, got, block) == "dense"
    assert torch.equal(got.flatten(0, 1) * projection.scale, projection.project(values.flatten(0, 1), 128))


def test_sparse_rows_have_the_same_bits_whatever_the_batch():
    block, projection = embedding(), Projection(dim=64)
    whole, alone = torch.zeros(6, 3, 64), torch.zeros(2, 3, 64)
    accumulate_block(projection, whole, block)
    part = EmbeddingBlock("embedding", block.start, block.indices[2:4], block.deltas[2:4], block.num_embeddings)
    assert accumulate_block(projection, alone, part) == "sparse"
    assert torch.equal(alone, whole[2:4])


@needs_library
@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ((64, 10, 1, 128, 1024, 0), "shared"),
        ((64, 100, 1, 100, 512, 0), "shared"),
        ((64, 1, 1, 128, 1024, 0), "dense"),
        ((64, 10, 64, 64, 576, 0), "dense"),
    ],
)
def test_the_cost_model_picks_the_route(shape, want):
    block = linear(2, *shape[1:])
    assert route(Projection(), block, 10240) == want
    assert route(Projection(backend="reference"), block, 10240) == "dense"
    assert route(Projection("gaussian"), block, 10240) == "dense"
