"""Queries featurized on the spot answer like a stored query set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import MismatchError, UsageError
from gradstore.fresh import featurize_queries

pytestmark = pytest.mark.numerical


def make_project(seed: int = 0) -> gs.Project:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs = torch.randn(90, 6, generator=generator)
    labels = torch.arange(90) % 3
    splits = {"train": TensorDataset(inputs[:40], labels[:40]), "test": TensorDataset(inputs[40:], labels[40:])}
    return gs.Project(model=model, splits=splits, classes=["a", "b", "c"], poisoned={"test": [3, 20]})


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("layout", ["per-class", "sum"])
def test_results_are_those_of_a_stored_query_set(dtype: str, layout: str, tmp_path: Path) -> None:
    settings = {"proj_dim": 200, "seed": 5, "dtype": dtype, "layout": layout, "precision": "exact"}
    kernel = "proj-pntk" if layout == "sum" else "proj-trntk"
    project = make_project()
    train = gs.featurize(project, split="train", out=tmp_path / "train", **settings)
    stored = gs.featurize(project, split="test", out=tmp_path / "test", **settings)
    rows = [33, 2, 3, 49, 17, 2]
    fresh = featurize_queries(project, train, split="test", rows=rows)
    ours, theirs = gs.topk(train, fresh, 4, kernel), gs.topk(train, stored, 4, kernel, rows=rows)
    np.testing.assert_array_equal(ours.indices, theirs.indices)
    np.testing.assert_array_equal(ours.similarity, theirs.similarity)
    assert ours.records() == theirs.records()
    np.testing.assert_array_equal(fresh.poisoned, stored.poisoned[rows])
    ours.save_csv(tmp_path / "ours.csv")
    theirs.save_csv(tmp_path / "theirs.csv")
    assert (tmp_path / "ours.csv").read_text() == (tmp_path / "theirs.csv").read_text()
    certified = gs.topk(train, fresh, 4, kernel, mode="certified")
    np.testing.assert_array_equal(certified.similarity, ours.similarity)


def test_all_rows_by_default_and_pages(tmp_path: Path) -> None:
    project = make_project()
    train = gs.featurize(project, split="train", out=tmp_path / "train", proj_dim=64)
    fresh = featurize_queries(project, train, split="test")
    assert fresh.shape == (50, 3, 64)
    page = gs.topk(train, fresh, 2).save_html(tmp_path / "page.html").read_text()
    assert "test of the project" in page


def test_another_model_is_refused(tmp_path: Path) -> None:
    train = gs.featurize(make_project(), split="train", out=tmp_path / "train", proj_dim=64)
    with pytest.raises(MismatchError, match="weights"):
        gs.topk(train, featurize_queries(make_project(1), train, split="test", rows=[0]))


def test_rows_that_do_not_exist(tmp_path: Path) -> None:
    train = gs.featurize(make_project(), split="train", out=tmp_path / "train", proj_dim=64)
    with pytest.raises(UsageError, match=r"--rows: no such query row \(expected 0 to 49, got 50\)"):
        featurize_queries(make_project(), train, split="test", rows=[1, 50])
