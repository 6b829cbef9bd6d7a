"""Squared norms of blocks, by values and by what is cheaper, and the structure that blocks carry."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, HARD_CASES, Case
from test_jacobian_routes import engine_for
from torch import nn

from gradstore.jacobians import EmbeddingBlock, JacobianEngine, LinearBlock, terms
from gradstore.model.parameters import parameter_blocks

pytestmark = [pytest.mark.numerical, pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")]


@pytest.mark.parametrize("case", CASES + HARD_CASES, ids=lambda case: case.name)
def test_squared_norms_and_structure_of_blocks(case: Case):
    kinds = set()
    for block in engine_for(case, case.model(), case.batch())(case.batch()):
        dense = block.dense().double()
        torch.testing.assert_close(block.sq_norm(), dense.square().sum(-1), rtol=1e-6, atol=1e-12)
        assert block.sq_norm().dtype == torch.float64
        if isinstance(block, LinearBlock):
            value = torch.einsum("ncto,nti->ncoi", block.deltas.double(), block.activations.double())
            torch.testing.assert_close(value.flatten(2), dense, rtol=1e-5, atol=1e-6)
        if isinstance(block, EmbeddingBlock):
            n, c, tokens, width = block.deltas.shape
            value = torch.zeros(n, c, block.num_embeddings, width, dtype=torch.float64)
            for i, s in torch.cartesian_prod(torch.arange(n), torch.arange(tokens)).tolist():
                value[i, :, block.indices[i, s]] += block.deltas[i, :, s]
            torch.testing.assert_close(value.flatten(2), dense, rtol=1e-5, atol=1e-6)
        kinds.add(type(block))
    assert LinearBlock in kinds


@pytest.mark.parametrize("gain", [0, 10**9], ids=["by values", "by inner products"])
@pytest.mark.parametrize("positions", [1, 4])
def test_squared_norms_by_inner_products_form_no_values(gain: int, positions: int, monkeypatch: pytest.MonkeyPatch):
    """Where they are worth it, as on a GPU with matrix units for float64; never on a CPU."""
    generator = torch.Generator().manual_seed(positions)
    x, layer = torch.randn(5, positions, 30, generator=generator), nn.Linear(30, 20, bias=False)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(20 * positions, 3))
    assert terms._products_for_a_value(torch.device("cpu")) == 0
    monkeypatch.setattr(terms, "_products_for_a_value", lambda device: gain)
    blocks = list(JacobianEngine(model, parameter_blocks(model, "0[.]weight"), example=x)(x))
    want = torch.stack([block.sq_norm() for block in blocks]).sum(0)
    assert all((block._dense is None) == (positions == 1 or gain > 0) for block in blocks)
    dense = torch.cat([block.dense() for block in blocks], dim=-1).double()
    torch.testing.assert_close(want, dense.square().sum(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", CASES + HARD_CASES, ids=lambda case: case.name)
def test_squared_norms_are_the_same_where_inner_products_are_worth_it(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(terms, "_products_for_a_value", lambda device: 10**9)
    for block in engine_for(case, case.model(), case.batch())(case.batch()):
        dense = block.dense().double()
        torch.testing.assert_close(block.sq_norm(), dense.square().sum(-1), rtol=1e-5, atol=1e-10)


def test_squared_norms_of_positions_that_cancel_are_not_negative():
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(200, 1, 64, generator=generator).expand(-1, 3, -1)
    deltas = torch.randn(200, 4, 2, 48, generator=generator)
    cancelling = torch.cat([deltas, -deltas.sum(2, keepdim=True)], 2)
    block = LinearBlock("w", 0, activations, cancelling, gram=lambda: terms.gram_of(activations))
    assert float(block.sq_norm().min()) >= 0
    assert float(block.sq_norm().max()) < 1e-9


@pytest.mark.parametrize("case", CASES + HARD_CASES, ids=lambda case: case.name)
def test_values_are_formed_in_the_memory_that_is_given_with_the_same_bits(case: Case):
    engine = engine_for(case, case.model(), case.batch())
    for block, again in zip(engine(case.batch()), engine(case.batch()), strict=True):
        room = torch.full((*block.sq_norm().shape, block.size), float("nan"))
        dense = again.dense().clone()
        block.forget()
        block.form(room)
        assert torch.equal(room, dense)
        assert block.dense().data_ptr() == room.data_ptr()
