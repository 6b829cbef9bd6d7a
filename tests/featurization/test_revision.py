"""Rows of two revisions of the computation are not mixed unnoticed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import MismatchError
from gradstore.featurization import plan
from gradstore.jacobians.revision import REVISION
from gradstore.store.files.manifest import Shard

FEATURIZE = sys.modules[gs.featurize.__module__]


def project(rows: int) -> gs.Project:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 6, generator=generator)[:rows]
    return gs.Project(model=model, splits={"train": TensorDataset(x, torch.arange(rows) % 3)})


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_SHARD_FLOPS", {"cpu": 1})


def featurize(path: Path, rows: int, **options: bool) -> gs.FeatureStore:
    return gs.featurize(project(rows), split="train", out=path, proj_dim=64, **options)


@pytest.mark.usefixtures("small_shards")
def test_each_shard_says_which_revision_made_it(tmp_path: Path):
    store = featurize(tmp_path / "store", 32)
    assert [shard.computation for shard in store.manifest.shards] == [REVISION] * 2
    assert store.card()["computed by"] == f"revision {REVISION}"
    written = json.loads((tmp_path / "store" / "store.json").read_text())
    assert [shard["computation"] for shard in written["shards"]] == [REVISION] * 2


@pytest.mark.usefixtures("small_shards")
def test_a_store_of_another_revision_goes_on_only_where_that_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "store"
    monkeypatch.setattr(FEATURIZE, "REVISION", 1)
    featurize(path, 48)
    monkeypatch.setattr(FEATURIZE, "REVISION", 2)
    assert len(featurize(path, 48)) == 48  # nothing is missing
    with pytest.raises(MismatchError) as refused:
        featurize(path, 96)
    assert refused.value.line == (
        f"{path}: rows of this store were computed by another version of gradstore, so new ones would differ in their "
        "last bits (expected revision 2 of the computation, got revision 1 for rows 0 to 15 and those of 2 more "
        "shards). Choose another --out, or accept it with --allow-other-versions; `gradstore info` then says which "
        "rows are of which."
    )
    assert len(gs.open(path)) == 48
    store = featurize(path, 96, allow_other_versions=True)
    assert store.card()["computed by"] == "rows 0 to 47: revision 1; rows 48 to 95: revision 2"
    with pytest.raises(MismatchError, match="another version of gradstore"):
        gs.featurize(project(96), split="train", out=tmp_path / "larger", proj_dim=128, grow_from=path)


def test_an_entry_that_says_nothing_is_as_before():
    shard = Shard(0, 1, 1, {}, "", {})
    assert "computation" not in json.loads(shard.line)
    assert json.loads(replace(shard, computation=3).line)["computation"] == 3
