"""Layout "mixed": Σ_c P_c g^c, one row an example, from which trNTK⁰ is estimated without bias."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import SmallCNN
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import UsageError
from gradstore.jacobians import JacobianEngine
from gradstore.model.parameters import parameter_blocks

pytestmark = pytest.mark.numerical

K = 300


@pytest.fixture(scope="module")
def project() -> gs.Project:
    torch.manual_seed(0)
    x = torch.randn(20, 1, 8, 8)
    return gs.Project(model=SmallCNN(), splits={"train": TensorDataset(x, torch.arange(20) % 4)})


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_a_row_is_the_sum_of_classes_each_under_its_own_projection(
    project: gs.Project, kind: str, tmp_path: Path
) -> None:
    store = gs.featurize(
        project, split="train", out=tmp_path / "s", proj_dim=K, projection=kind, layout="mixed", dtype="float32", seed=3
    )
    blocks = parameter_blocks(project.model)
    inputs = project.splits["train"].tensors[0]
    expected = torch.zeros(20, K, dtype=torch.float64)
    square = torch.zeros(20, dtype=torch.float64)
    for block in JacobianEngine(project.model, blocks, example=inputs)(inputs):
        dense = block.dense().double()
        columns = torch.arange(block.start, block.start + block.size)
        for c in range(4):
            P = replace(gs.Projection(kind, K, 3), stream=c).entries(torch.arange(K)[:, None], columns).double()
            expected += dense[:, c] @ P.T / np.sqrt(K)
        square += dense.square().sum((1, 2))
    assert store.shape == (20, 1, K)
    np.testing.assert_allclose(store.features[:][:, 0], expected, atol=1e-5 * expected.abs().max())
    np.testing.assert_allclose(store.sq_norms[:, 0], square, rtol=1e-5)


def test_it_serves_trace_kernels_and_nothing_else(project: gs.Project, tmp_path: Path) -> None:
    store = gs.featurize(project, split="train", out=tmp_path / "s", proj_dim=K, layout="mixed")
    assert gs.topk(store, store, 1).indices[:, 0].tolist() == list(range(20))
    projected = gs.gram(store, kernel="proj-trntk0", out=tmp_path / "gram.h5")[:]
    exact = gs.exact_gram(project, kernel="trntk0")
    norms = np.sqrt(np.diag(exact))
    standard = np.sqrt((np.outer(norms, norms) ** 2 + exact**2) / K)
    assert np.abs((projected - exact) / standard).max() < 5
    with pytest.raises(UsageError, match=r"proj-pntk needs P Σ_c g\^c, .*got layout mixed\)\. Use --kernel proj-trntk"):
        gs.gram(store, kernel="proj-pntk")
    with pytest.raises(UsageError, match=r"a combination of classes needs the features of each.*got layout mixed"):
        gs.topk(store, store, 1, classes="1")
