"""Stores that grow: by rows (append) and by columns (K); the result is the store made at once, byte for byte."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_store import files
from torch import nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import MismatchError, UsageError
from gradstore.featurization import plan as planning
from gradstore.store.feature_store import FeatureStore

pytestmark = pytest.mark.numerical

X = torch.randn(70, 6, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 6, 70)[:, None]
Y = torch.arange(70) % 3


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.Plan, "_shard_rows", lambda self, schema, group: 32)


def project(n: int = 70, x: torch.Tensor = X, y: torch.Tensor = Y) -> gs.Project:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3))
    return gs.Project(
        model=model, splits={"train": TensorDataset(x[:n], y[:n])}, poisoned={"train": np.arange(n) % 5 == 0}
    )


def featurize(out: Path, n: int = 70, **settings: object) -> dict[str, bytes]:
    gs.featurize(project(n), split="train", out=out, **{"proj_dim": 64, **settings})  # type: ignore[arg-type]
    return files(out)


@pytest.mark.parametrize("lengths", [(1, 70), (32, 64, 70), (31, 33, 65, 70), (40, 41)])
def test_appending_gives_the_store_made_at_once(lengths: tuple[int, ...], tmp_path: Path) -> None:
    for n in lengths:
        appended = featurize(tmp_path / "appended", n)
    assert appended == featurize(tmp_path / "whole", lengths[-1])


def test_appending_keeps_the_full_shards_as_they_are(tmp_path: Path) -> None:
    featurize(tmp_path / "store", 40)
    before = (tmp_path / "store/shard-00000.h5").stat()
    featurize(tmp_path / "store")
    after = (tmp_path / "store/shard-00000.h5").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("change", ["input", "shorter"])
def test_a_split_that_changed_is_not_appended(change: str, tmp_path: Path) -> None:
    before = featurize(tmp_path / "store", 40)
    x, y = X.clone(), Y.clone()
    x[0] += change == "input"
    n = 39 if change == "shorter" else 70
    field = {"input": r"row 0 of split 'train' has other inputs", "shorter": r"data\.length"}[change]
    with pytest.raises(MismatchError, match=field):
        gs.featurize(project(n, x, y % 3), split="train", out=tmp_path / "store", proj_dim=64)
    assert files(tmp_path / "store") == before


@pytest.mark.parametrize("layout", ["per-class", "sum", "mixed"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("dims", [(64, 200), (100, 101), (512, 2048)])
def test_growing_k_gives_the_store_made_at_once(dims: tuple[int, int], dtype: str, layout: str, tmp_path: Path) -> None:
    settings = {"dtype": dtype, "layout": layout}
    featurize(tmp_path / "small", proj_dim=dims[0], **settings)
    grown = featurize(tmp_path / "grown", proj_dim=dims[1], grow_from=tmp_path / "small", **settings)
    assert grown == featurize(tmp_path / "whole", proj_dim=dims[1], **settings)


def test_growing_k_multiplies_only_new_rows_of_p(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["gradstore.projection.block_sums"]
    featurize(tmp_path / "small")
    columns: set[tuple[int, int]] = set()
    accumulate = module.accumulate_block

    def watch(projection: object, out: torch.Tensor, block: object, *, first_k: int = 0) -> str:
        columns.add((first_k, out.shape[-1]))
        return accumulate(projection, out, block, first_k=first_k)

    monkeypatch.setattr(module, "accumulate_block", watch)
    featurize(tmp_path / "grown", proj_dim=96, grow_from=tmp_path / "small")
    assert columns == {(64, 32)}


def test_growing_k_goes_on_in_the_groups_of_the_smaller_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever groups this memory, or this card, would have had by itself."""
    with monkeypatch.context() as other:
        other.setattr(planning, "LARGE_GROUP", 16)
        featurize(tmp_path / "small", proj_dim=32)
        whole = featurize(tmp_path / "whole", proj_dim=100)
    assert featurize(tmp_path / "grown", proj_dim=100, grow_from=tmp_path / "small") == whole
    assert featurize(tmp_path / "other", proj_dim=100) != whole
    with pytest.raises(UsageError, match=r"^--memory: the groups of rows that this store goes on with do not fit"):
        featurize(tmp_path / "no", proj_dim=100, grow_from=tmp_path / "small", memory="20kB")


def test_what_cannot_be_grown_is_refused(tmp_path: Path) -> None:
    featurize(tmp_path / "small")
    featurize(tmp_path / "int8", dtype="int8")
    with pytest.raises(UsageError, match="K does not grow"):
        featurize(tmp_path / "out", proj_dim=64, grow_from=tmp_path / "small")
    with pytest.raises(UsageError, match="int8 features cannot be grown"):
        featurize(tmp_path / "out", proj_dim=96, dtype="int8", grow_from=tmp_path / "int8")
    with pytest.raises(MismatchError, match=r"projection\.seed"):
        featurize(tmp_path / "out", proj_dim=96, seed=1, grow_from=tmp_path / "small")
    with pytest.raises(MismatchError, match=r"data\.length"):
        featurize(tmp_path / "out", n=40, proj_dim=96, grow_from=tmp_path / "small")
    assert not (tmp_path / "out").exists()


def test_stored_features_are_those_of_the_definition(tmp_path: Path) -> None:
    featurize(tmp_path / "store", proj_dim=200)
    store, p = FeatureStore(tmp_path / "store"), project()
    model = p.model.double()
    entries = gs.Projection(dim=200)
    for row in (0, 40, 69):
        expected = torch.zeros(3, 200, dtype=torch.float64)
        start = 0
        logits = model(X[row : row + 1].double())[0]
        for parameter in model.parameters():
            grads = [torch.autograd.grad(logits[c], parameter, retain_graph=True)[0].flatten() for c in range(3)]
            index = torch.arange(parameter.numel()) + start
            expected += torch.stack(grads) @ entries.entries(torch.arange(200)[:, None], index[None]).double().T
            start = -(-(start + parameter.numel()) // 128) * 128
        got = torch.from_numpy(store.features[row]).double()
        scale = expected.abs().amax()
        assert ((got - expected / 200**0.5).abs().amax() / scale * 200**0.5) < 1e-3
