"""A class without a gradient where others have one, as in nets that end in ReLU, is an honest zero everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import NonFiniteError

N = 60
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3), nn.ReLU())


def dense(model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Jacobians float64 [n, c, p] by autograd in float64, and logits."""
    model = model.double()
    logits = model(X.double())
    rows = [[torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in row] for row in logits]
    return np.array([[np.concatenate([g.flatten() for g in c]) for c in r] for r in rows]), logits.detach().numpy()


ALIVE = torch.from_numpy((dense(network())[1] > 0).any(1))


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_rows_with_silent_classes_are_stored_and_compared(dtype: str, tmp_path: Path) -> None:
    rows = torch.arange(N)[ALIVE]
    data = TensorDataset(X[rows], rows % 3)
    project = gs.Project(model=network(), splits={"train": data})
    store = gs.featurize(project, split="train", out=tmp_path / "s", proj_dim=4096, dtype=dtype)
    jacobians, logits = (values[rows] for values in dense(network()))
    silent = logits <= 0
    assert silent.any(1).sum() > 10
    assert not store.features[:][silent].any()
    assert (store.sq_norms == 0).tolist() == silent.tolist()
    assert np.isfinite(store.features[:]).all()
    flat = jacobians.reshape(len(rows), -1)
    exact = flat @ flat.T / np.outer(*[np.linalg.norm(flat, axis=1)] * 2)
    found = gs.topk(store, store, k=5)
    for row in range(len(rows)):
        np.testing.assert_allclose(found.similarity[row], exact[row, found.indices[row]], atol=0.08)
    np.testing.assert_allclose(gs.gram(store, out=tmp_path / "gram.h5")[:], exact, atol=0.08)
    assert gs.Session(store).topk(store, k=5, mode="certified").indices.tolist() == found.indices.tolist()
    model = gs.KernelGLM(alpha=1e-3).fit(store)
    assert np.isfinite(gs.attribute(model, store, row=1).values).all()


def test_a_row_without_any_gradient_stops_the_run(tmp_path: Path) -> None:
    assert not ALIVE.all()
    project = gs.Project(model=network(), splits={"train": TensorDataset(X, torch.zeros(N).long())})
    row = int((~ALIVE).nonzero()[0])
    with pytest.raises(NonFiniteError, match=f"the gradient of row {row} is zero for every class"):
        gs.featurize(project, split="train", out=tmp_path / "s", proj_dim=64)
