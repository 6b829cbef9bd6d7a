"""Embedding matrices before the fused kernels: densely, in parts, whatever the device of the test."""

from __future__ import annotations

import pytest
import torch

from gradstore.jacobians import EmbeddingBlock
from gradstore.jacobians.footprint import MAX_COLUMNS
from gradstore.projection import Projection, block_routes


@pytest.mark.parametrize("columns", [1, 40, 10**6])
def test_parts_of_an_embedding_add_up_to_the_sparse_route(monkeypatch, columns):
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 23, (3, 7), generator=generator)
    block = EmbeddingBlock("words", 256, indices, torch.randn(3, 2, 7, 10, generator=generator), 23)
    projection = Projection(dim=33)
    sparse, parts = torch.zeros(2, 3, 2, 33)
    assert block_routes.accumulate_block(projection, sparse, block) == "sparse"
    monkeypatch.setattr(block_routes, "_fused", lambda *_: True)
    monkeypatch.setitem(MAX_COLUMNS, "cpu", columns)
    assert block_routes.accumulate_block(projection, parts, block) == "dense"
    want = block.dense().double() @ projection.entries(torch.arange(33)[:, None], 256 + torch.arange(230)).T
    assert torch.allclose(sparse.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.allclose(parts.double(), want, rtol=1e-5, atol=1e-5)
