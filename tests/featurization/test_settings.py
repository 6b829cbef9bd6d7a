"""One list of settings: whatever was made with one of them is recognised everywhere, and told from any other."""

from __future__ import annotations

import inspect
import json
import os
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import click
import gradstore_cli
import numpy as np
import pytest
from gradstore_cli.commands import gradstore

import gradstore as gs
from gradstore.errors import MismatchError, UsageError
from gradstore.featurization.fingerprint import fingerprint
from gradstore.featurization.settings import Given, Settings
from gradstore.featurization.trial import checks
from gradstore.store.import_features import Provenance, import_features

SMALL = {"proj_dim": 64}
# A value of every setting that is not its default, and a kernel that features made with it serve.
OTHERS: list[tuple[str, Any, str]] = [
    ("proj_dim", 48, "proj-trntk"),
    ("projection", "gaussian", "proj-trntk"),
    ("seed", 2**63 + 7, "proj-trntk"),
    ("layout", "sum", "proj-pntk"),
    ("layout", "mixed", "proj-trntk"),
    ("layout", "sketched", "proj-trntk"),
    ("class_draws", 8, "proj-trntk"),
    ("dtype", "float32", "proj-trntk"),
    ("dtype", "int8", "proj-trntk"),
    ("precision", "exact", "proj-trntk"),
]
# What goes with a setting that other settings have no use for.
BESIDE: dict[str, dict[str, Any]] = {"class_draws": {"layout": "sketched"}}
PROJECT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import gradstore as gs

def project():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, labels = torch.randn(60, 6), torch.arange(60) % 3
    splits = {"train": TensorDataset(x[:40], labels[:40]), "test": TensorDataset(x[40:], labels[40:])}
    return gs.Project(model=model, splits=splits, parameters="0.*|2.weight")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    (folder / "project.py").write_text(PROJECT)
    return folder


def field_of(name: str) -> str:
    """Where an identity, and so a table of differences, names a setting."""
    return ".".join(next(s.metadata["at"] for s in fields(Settings) if s.name == name))


def status(*words: str) -> int:
    """Exit status of a command, run in this process."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            gradstore_cli.main(list(words))
    finally:
        signal.signal(signal.SIGTERM, handler)
    return int(stop.value.code or 0)


def test_every_setting_is_tried_below() -> None:
    assert {name for name, _, _ in OTHERS} == {setting.name for setting in fields(Settings)}
    assert all(value != getattr(Settings(), name) for name, value, _ in OTHERS)


@pytest.mark.parametrize(("name", "value", "kernel"), OTHERS)
def test_a_store_made_with_another_setting_is_recognised(
    name: str, value: Any, kernel: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SMALL, **BESIDE.get(name, {}), name: value}
    project = gs.load_project(folder / "project.py")
    train, stored = (gs.featurize(project, split=s, out=tmp_path / s, **settings) for s in ("train", "test"))
    assert Settings.of(train.identity) == Settings(**settings)
    assert train.fingerprint == fingerprint(project, **settings)
    assert all(check.error is None for check in checks(project, **settings))

    assert len(gs.residual(project, train, stored, kernel, pairs=16).exact) == 16
    fresh = gs.featurize_queries(project, train, split="test")
    ours, theirs = gs.topk(train, fresh, 3, kernel), gs.topk(train, stored, 3, kernel)
    np.testing.assert_array_equal(ours.similarity, theirs.similarity)
    monkeypatch.chdir(tmp_path)
    words = ["residual", str(folder / "project.py"), "train", "test", "--kernel", kernel, "--pairs", "16"]
    assert status(*words) == 0

    (shard,) = (tmp_path / "train").glob("shard-*.h5")
    before = shard.read_bytes()
    os.unlink(shard)
    gs.featurize(project, split="train", out=tmp_path / "train", **settings)
    assert shard.read_bytes() == before


@pytest.mark.parametrize(("name", "value", "kernel"), OTHERS)
def test_another_setting_is_refused_by_name(name: str, value: Any, kernel: str, folder: Path, tmp_path: Path) -> None:
    project, usual = gs.load_project(folder / "project.py"), {**SMALL, **BESIDE.get(name, {})}
    default = gs.featurize(project, split="train", out=tmp_path / "default", **usual)
    named = rf"differ in 1 field\(s\)(.|\n)*\n  {field_of(name)} "
    other = gs.featurize(project, split="test", out=tmp_path / "other", **{**usual, name: value})
    with pytest.raises(MismatchError, match=named):
        gs.featurize(project, split="train", out=default.path, **{**usual, name: value})
    with pytest.raises(MismatchError, match=named):
        gs.residual(project, default, other)
    with pytest.raises(MismatchError, match=named):
        gs.topk(default, gs.featurize_queries(project, other, split="test", rows=[3]))
    words = ["residual", str(folder / "project.py"), str(default.path), str(tmp_path / "other")]
    assert status(*words) == MismatchError.exit_code


@pytest.mark.parametrize("command", ["featurize", "check"])
def test_the_command_line_has_an_option_for_every_setting(command: str) -> None:
    options = {p.name: p for p in gradstore.commands[command].params}
    for setting in fields(Settings):
        option = options[setting.name]
        assert option.opts == ["--" + setting.name.replace("_", "-")]
        assert option.default == setting.default
        choices = setting.metadata.get("choices")
        assert choices is None or (isinstance(option.type, click.Choice) and tuple(option.type.choices) == choices)


def test_signatures_spell_the_settings_out() -> None:
    assert get_type_hints(Given) == get_type_hints(Settings)
    for function in (gs.featurize, fingerprint, checks):
        shown = inspect.signature(function).parameters
        assert {s.name: s.default for s in fields(Settings)}.items() <= {
            p.name: p.default for p in shown.values()
        }.items()
        assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in shown.values())
        hints = get_type_hints(function)
        assert {name: hints[name] for name in get_type_hints(Settings)} == get_type_hints(Settings)
        with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got an unexpected keyword argument 'batchsize'"):
            function(**{name: None for name, p in shown.items() if p.default is p.empty}, batchsize=3)


def test_settings_are_plain_values_and_the_unusual_are_refused(folder: Path) -> None:
    assert json.dumps(Settings(proj_dim=np.int64(64)).identity()) == json.dumps(Settings(proj_dim=64).identity())
    assert json.dumps(Settings(dtype=np.dtype("int8")).identity()) == json.dumps(Settings(dtype="int8").identity())
    with pytest.raises(
        UsageError, match=r"--layout: unknown layout \(expected one of per-class, sum, mixed, sketched, got 'x'\)"
    ):
        Settings(layout="x")
    with pytest.raises(TypeError, match="proj_dimension"):
        fingerprint(gs.load_project(folder / "project.py"), proj_dimension=64)


def test_nothing_is_featurized_like_an_imported_store(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "grads.npy", np.ones((40, 64), np.float32))
    imported = import_features(tmp_path / "grads.npy", tmp_path / "imported", Provenance("trak", "mine"))
    project = gs.load_project(folder / "project.py")
    with pytest.raises(MismatchError, match=r"imported: imported features cannot .*got features of trak"):
        gs.featurize_queries(project, imported, split="test")
    with pytest.raises(MismatchError, match="imported features cannot be computed again"):
        gs.residual(project, imported, kernel="proj-pntk")
