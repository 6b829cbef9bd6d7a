"""Residuals of projected kernels on a real network, and their page."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import SmallCNN
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import MismatchError, UsageError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    torch.manual_seed(0)
    x = torch.randn(60, 1, 8, 8)
    labels = torch.arange(60) % 4
    splits = {"train": TensorDataset(x[:40], labels[:40]), "test": TensorDataset(x[40:], labels[40:])}
    project = gs.Project(model=SmallCNN(), splits=splits)
    path = tmp_path_factory.mktemp("stores")
    # Gaussian: for a network this small, Rademacher errors are several times smaller than the bound.
    return project, *(
        gs.featurize(project, split=split, out=path / split, proj_dim=512, projection="gaussian") for split in splits
    )


@pytest.mark.parametrize("kernel", ["proj-trntk", "proj-trntk0", "proj-pntk"])
def test_residuals_are_as_large_as_predicted(made: tuple, kernel: str) -> None:
    project, train, test = made
    found = gs.residual(project, train, test, kernel, pairs=400)
    values = found.as_dict()
    assert values["pairs"] == 400
    name = {"proj-trntk": "trntk", "proj-trntk0": "trntk0", "proj-pntk": "pntk-cosine"}[kernel]
    whole = gs.exact_gram(project, "train", "test", name)
    np.testing.assert_allclose(found.exact, whole[found.rows_a, found.rows_b], rtol=1e-5)
    estimate = gs.gram(train, test, kernel)
    (tile,) = estimate
    np.testing.assert_allclose(found.projected, tile.values[found.rows_a, found.rows_b], rtol=1e-4, atol=1e-5)
    assert values["p50"] <= values["p99"] <= values["max"]
    assert 0.4 < values["score_rms"] < 2, "in units of the predicted standard error; all pairs share one P"


def test_within_one_store_no_row_meets_itself(made: tuple) -> None:
    project, train, _ = made
    found = gs.residual(project, train, pairs=10_000)
    assert len(found.exact) == 20 * 20
    assert not set(found.rows_a) & set(found.rows_b)
    assert 512 <= found.effective_dimension <= 4.5 * 512


def test_the_page_and_the_table(made: tuple, tmp_path: Path) -> None:
    project, train, test = made
    found = gs.residual(project, train, test, pairs=100)
    text = found.save_html(tmp_path / "r.html").read_text()
    assert text.count("<polyline") == 3
    assert f"{found.as_dict()['p99']:.2g}" in text
    observed, exponential, predicted = found.cdf(np.linspace(0, np.abs(found.residual).max(), 50))
    assert observed[-1] == 1
    for curve in (observed, exponential, predicted):
        assert (np.diff(curve) >= 0).all()
    with (found.save_csv(tmp_path / "r.csv")).open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 100
    assert float(lines[7]["projected"]) - float(lines[7]["exact"]) == found.residual[7]


def test_a_store_of_another_model_is_refused(made: tuple) -> None:
    project, train, _ = made
    torch.manual_seed(1)
    with pytest.raises(MismatchError, match=r"what the store holds and what the project asks for(.|\n)*\n  weights "):
        gs.residual(gs.Project(model=SmallCNN(), splits=project.splits), train)
    with pytest.raises(MismatchError, match=r"\n  parameters\.count "):
        gs.residual(gs.Project(model=project.model, splits=project.splits, parameters=".*weight"), train)
    x, labels = project.splits["train"].tensors
    with pytest.raises(MismatchError, match=r"\n  inputs "):
        gs.residual(gs.Project(model=project.model, splits={"train": TensorDataset(x + 1, labels)}), train)
    with pytest.raises(UsageError, match="unknown kernel"):
        gs.residual(project, train, kernel="cosine")
