"""Settings that are not typed: those of another store (`--like`), and a kind of projection that is chosen (`auto`)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import MismatchError, UsageError
from gradstore.featurization.settings import Settings
from gradstore.featurization.trial import checks
from gradstore.projection import Projection
from gradstore.projection.kind_choice import chosen_kind

CPU = torch.device("cpu")


@pytest.fixture
def project() -> gs.Project:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 5), torch.arange(12) % 3)
    return gs.Project(model=nn.Linear(5, 3), splits={"train": data, "test": data})


def featurize(project: gs.Project, out: Path, **settings: object) -> gs.FeatureStore:
    return gs.featurize(project, split=str(settings.pop("split", "train")), out=out, **settings)  # type: ignore[arg-type]


SETTINGS = [
    {"proj_dim": 4096, "projection": "sjlt", "seed": 7},
    {"proj_dim": 96, "projection": "gaussian", "dtype": "int8", "layout": "sum"},
    {"proj_dim": 64, "layout": "sketched", "class_draws": 4, "dtype": "float32", "precision": "exact"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_store_like_another_meets_it(project: gs.Project, settings: dict, tmp_path: Path) -> None:
    train = featurize(project, tmp_path / "train", **settings)
    query = featurize(project, tmp_path / "test", split="test", like=tmp_path / "train")
    assert query.fingerprint == featurize(project, tmp_path / "same", split="test", **settings).fingerprint
    assert Settings.of(query.identity) == Settings(**settings)
    kernel = "proj-pntk" if settings.get("layout") == "sum" else "proj-trntk"
    assert gs.topk(train, query, k=1, kernel=kernel).indices.shape == (12, 1)


def test_what_is_asked_for_besides_must_be_the_same(project: gs.Project, tmp_path: Path) -> None:
    train = featurize(project, tmp_path / "train", proj_dim=96)
    assert featurize(project, tmp_path / "a", split="test", like=train, proj_dim=96, projection="auto").shape[2] == 96
    text = re.escape(
        f"--proj-dim: another setting than that of the store to be like (expected 96, as {train.path} has, "
    )
    with pytest.raises(UsageError, match=text + "got 128"):
        featurize(project, tmp_path / "b", split="test", like=train, proj_dim=128)
    assert not (tmp_path / "b").exists()
    with pytest.raises(UsageError, match="this is not a gradstore store"):
        featurize(project, tmp_path / "b", split="test", like=tmp_path / "nowhere")


def test_check_takes_the_settings_of_a_store_too(project: gs.Project, tmp_path: Path) -> None:
    train = featurize(project, tmp_path / "train", proj_dim=96, layout="sum")
    found = {check.name: check.detail for check in checks(project, split="test", like=train)}
    assert found["store"].startswith("[12, 1, 96] float16")


def test_stores_that_differ_say_how_to_make_them_alike(project: gs.Project, tmp_path: Path) -> None:
    train = featurize(project, tmp_path / "train", proj_dim=96)
    query = featurize(project, tmp_path / "test", split="test", proj_dim=64)
    with pytest.raises(MismatchError, match="gradstore featurize --like"):
        gs.topk(train, query, k=1)


@pytest.mark.parametrize(
    ("dim", "kind", "why"),
    [
        (10240, "sjlt", "on this CPU its product takes a small part of the time, at equal error"),
        (4096, "sjlt", "at equal error"),
        (3072, "rademacher", "3072 columns are too few for sjlt"),
        (10000, "rademacher", "10000 columns are no multiple of 1024, as sjlt needs"),
    ],
)
def test_auto_takes_the_sparse_projection_on_a_cpu_where_k_allows_it(dim: int, kind: str, why: str) -> None:
    found, said = chosen_kind(dim, CPU)
    assert found == kind
    assert said.endswith(why)


def test_auto_takes_signs_where_a_gpu_multiplies_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Projection, "fused", lambda self, device: True)
    assert chosen_kind(10240, CPU) == ("rademacher", "its product is as fast as any on this GPU")


def test_a_store_records_what_auto_took_and_goes_on_with_it(
    project: gs.Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    store = featurize(project, tmp_path / "s", proj_dim=4096, projection="auto", on_note=notes.append)
    assert store.card()["projection"].startswith("sjlt, K = 4096")
    assert [note for note in notes if note.startswith("projection sjlt: ")]
    monkeypatch.setattr(Projection, "fused", lambda self, device: True)  # as on another machine
    again = featurize(project, tmp_path / "s", proj_dim=4096, projection="auto")
    assert again.fingerprint == store.fingerprint


def test_parts_of_a_sketched_row_are_chosen_for_by_their_own_size() -> None:
    settings = Settings(proj_dim=10240, layout="sketched", class_draws=4, projection="auto")
    assert settings.chosen(CPU)[0].projection == "rademacher"
    with pytest.raises(UsageError, match=r"--class-draws: bad class draws \(expected a divisor of K / 1024 = 10"):
        Settings(proj_dim=10240, layout="sketched", class_draws=4, projection="sjlt").make_projection()


def test_few_blocks_are_warned_of(project: gs.Project, tmp_path: Path) -> None:
    notes: list[str] = []
    featurize(project, tmp_path / "few", proj_dim=2048, projection="sjlt", on_note=notes.append)
    assert any("with K = 2048 the sparse projection has 2 non-zeros a column" in note for note in notes)
    notes.clear()
    featurize(project, tmp_path / "enough", proj_dim=4096, projection="sjlt", on_note=notes.append)
    assert notes == []


def test_a_k_that_does_not_fit_is_refused_with_the_nearest(project: gs.Project, tmp_path: Path) -> None:
    text = "(expected a multiple of 1024 for sjlt, got 3000). The nearest are 2048 and 3072"
    with pytest.raises(UsageError, match=re.escape(text)):
        featurize(project, tmp_path / "s", proj_dim=3000, projection="sjlt")
