from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import gradstore as gs
from gradstore.errors import GradstoreError, ProjectError, UnsafeError, UsageError
from gradstore.featurization.fingerprint import fingerprint, sampled_identity
from gradstore.indices import row_mask
from gradstore.store.identity import differences, require_same

DATA = TensorDataset(torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]))


def make(model: nn.Module | None = None, **changes: Any) -> gs.Project:
    return gs.Project(**{"model": model or nn.Linear(3, 3), "splits": {"train": DATA}, **changes})


# -- the object --------------------------------------------------------------------------------------------------


def test_prepare_switches_to_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    assert not make(model).prepare().model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "resnet"}, r"Project\(model=…\): model is not a torch module \(expected nn.Module, got str\)"),
        ({"splits": {}}, r"there are no splits"),
        ({"poisoned": {"tset": []}}, r"poisoned names unknown splits \(expected \['train'\], got \['tset'\]\)"),
    ],
)
def test_a_project_says_what_is_wrong_with_it(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProjectError, match=message):
        gs.Project(**{"model": nn.Linear(3, 3), "splits": {"train": DATA}, **change})


def test_unknown_split_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"--split: unknown split \(expected one of train, got 'test'\)"):
        make().examples("test")


@pytest.mark.parametrize("value", [[1, 3], np.array([1, 3]), np.array([0, 1, 0, 1, 0, 0], bool), torch.tensor([1, 3])])
def test_poisoned_rows_may_be_a_mask_or_indices(value: Any) -> None:
    mask = make(poisoned={"train": value}).poisoned_mask("train")
    assert mask is not None
    assert np.flatnonzero(mask).tolist() == [1, 3]


@pytest.mark.parametrize("value", [[6], [-1], np.ones(5, bool), np.ones(6), [[1]]])
def test_what_is_no_mask_is_refused(value: Any) -> None:
    with pytest.raises(ProjectError, match="expected 6 booleans, or row indices below 6"):
        row_mask(value, 6, where="here", error=ProjectError)


class Returns(nn.Module):
    def __init__(self, call: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.call = call

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self, x * self.weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, x: x.sum(1),
            r"the logits have the wrong shape \(expected \[2, c\] floating point, got \[2\] float32\)",
        ),
        (lambda m, x: x.round().long(), r"got \[2, 3\] int64"),
        (lambda m, x: (x, x), r"the model returns no tensor \(expected logits \[n, c\], got tuple\)"),
        (lambda m, x: x @ x, r"the forward pass fails \(got RuntimeError: mat1 and mat2"),
        (lambda m, x: m.train() and x, r"model: a module is in train mode although eval\(\) was called"),
    ],
)
def test_bad_models_are_named(call: Any, message: str) -> None:
    with pytest.raises(ProjectError, match=message):
        make(Returns(call)).prepare().logits(torch.ones(2, 3))


def test_forward_picks_the_logits() -> None:
    project = make(Returns(lambda m, x: {"logits": x}), forward=lambda m, x: m(x)["logits"])
    assert project.prepare().logits(torch.ones(2, 3)).shape == (2, 3)


def test_class_names_must_match_the_logits() -> None:
    assert make().class_names(3) == ("0", "1", "2")
    with pytest.raises(ProjectError, match="expected 10 names, got 2"):
        make(classes=["a", "b"]).class_names(10)


# -- weights -----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)
        self.outer.weight = self.inner.weight


@pytest.mark.parametrize("build", [lambda: nn.Linear(3, 3), lambda: nn.BatchNorm1d(3), Tied])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_weights_load_from_safetensors_and_state_dicts(build: Any, name: str, tmp_path: Path) -> None:
    source, target = build(), build()
    if name.endswith("pt"):
        torch.save(source.state_dict(), tmp_path / name)
    else:
        save_model(source, str(tmp_path / name))
    project = make(target, weights=name)
    project.root = tmp_path
    project.prepare()
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(4, 3), "extra": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ProjectError, match=r"missing bias; unknown extra; shape weight \(4, 3\) for \(3, 3\)"):
        make(weights=tmp_path / "w.safetensors").prepare()


def test_missing_weights_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match=r"gone.pt: the weights file does not exist"):
        make(weights=tmp_path / "gone.pt").prepare()


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.target),))

    def __init__(self, target: Path) -> None:
        self.target = str(target)


@pytest.mark.parametrize("force", [False, True])
def test_a_pickled_checkpoint_is_refused_and_not_run(
    tmp_path: Path, force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    ran = tmp_path / "ran"
    with (tmp_path / "w.pt").open("wb") as file:
        pickle.dump({"weight": Payload(ran)}, file)
    torch.save({"weight": Payload(ran)}, tmp_path / "zip.pt")
    for name in ("w.pt", "zip.pt"):
        with pytest.raises(UnsafeError, match="more than tensors") as caught:
            make(weights=tmp_path / name).prepare()
        assert caught.value.exit_code == 9
    assert not ran.exists()


# -- examples ----------------------------------------------------------------------------------------------------


class Bad:
    """A dataset of six rows that misbehaves in one way."""

    def __init__(self, item: Any) -> None:
        self.item, self.reads = item, 0

    def __len__(self) -> int:
        return 6

    def __getitem__(self, row: int) -> Any:
        self.reads += 1
        return self.item(self, row)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from DATA


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), r"cannot be read by row \(expected a map-style dataset with len\(ds\) and ds\[i\], got Stream\)"),
        ([], "the split is empty"),
        (Bad(lambda d, i: (torch.randn(3), 0)), "row 0 read twice differs"),
        (Bad(lambda d, i: (torch.ones(3), d.reads)), "row 0 read twice differs"),
        (Bad(lambda d, i: (torch.ones(3 + i), 0)), None),
        (
            Bad(lambda d, i: ("text", 0)),
            r"row 0 is not a tensor \(expected x as a tensor, or a dict of tensors, got str\)",
        ),
        (Bad(lambda d, i: (torch.ones(3), 1.0)), r"the label of row 0 is not a class index \(expected an integer"),
        (Bad(lambda d, i: DATA[i + 3]), r"row 3 cannot be read \(got IndexError"),
    ],
)
def test_datasets_that_cannot_be_trusted_are_refused(dataset: Any, message: str | None) -> None:
    project = make(splits={"train": dataset})
    if message is None:
        with pytest.raises(ProjectError, match=r"rows 0 to 5 do not fit together \(expected the same shape"):
            project.examples("train").read(range(6))
        return
    with pytest.raises(ProjectError, match=message):
        sampled_identity(project.examples("train"))


@pytest.mark.parametrize(
    "dataset",
    [
        DATA,
        [(x, int(y)) for x, y in DATA],
        [(x.numpy(), y) for x, y in DATA],
        [(x, np.int64(y)) for x, y in DATA],
        [({"x": x}, y) for x, y in DATA],
    ],
)
def test_examples_are_stacked_with_integer_labels(dataset: Any) -> None:
    inputs, labels = make(splits={"train": dataset}).examples("train").read([4, 1])
    x = inputs["x"] if isinstance(inputs, dict) else inputs
    assert torch.equal(x, DATA.tensors[0][[4, 1]])
    assert labels.tolist() == [1, 1]


def test_examples_without_labels_have_label_minus_one() -> None:
    assert make(splits={"train": [x for x, _ in DATA]}).examples("train").labels.tolist() == [-1] * 6


def test_a_label_table_that_lies_is_not_believed() -> None:
    dataset = Bad(lambda d, i: DATA[i])
    dataset.targets = [2] * 6  # type: ignore[attr-defined]
    assert make(splits={"train": dataset}).examples("train").labels.tolist() == [0, 1, 2, 0, 1, 2]


# -- the file ----------------------------------------------------------------------------------------------------

GOOD = """
import torch, gradstore as gs
def project(seed: int = 0, wide: bool = False, name: str = "x"):
    data = torch.utils.data.TensorDataset(torch.ones(2, 3), torch.zeros(2).long())
    return gs.Project(model=torch.nn.Linear(3, 5 if wide else 2), splits={name: data, str(seed): data})
"""


@pytest.mark.parametrize(
    ("options", "splits"),
    [
        ({}, {"x", "0"}),
        ({"seed": "3"}, {"x", "3"}),
        ({"seed": 4, "name": "y"}, {"y", "4"}),
        ({"wide": "yes"}, {"x", "0"}),
    ],
)
def test_options_are_converted_to_the_type_of_the_default(
    options: dict[str, Any], splits: set[str], tmp_path: Path
) -> None:
    (tmp_path / "p.py").write_text(GOOD)
    project = gs.load_project(tmp_path / "p.py", options)
    assert set(project.splits) == splits
    assert project.model.out_features == (5 if "wide" in options else 2)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (None, {}, r"p.py: the project file does not exist. `gradstore init` writes one"),
        ("x = (", {}, r"p.py:1: the project file is not valid Python"),
        ("import torch\n\nimport nothing_like_this", {}, r"p.py:3: the project file fails with ModuleNotFoundError"),
        ("x = 1", {}, r"the project file has no function project\(\)"),
        ("def project():\n    return 1 / 0", {}, r"p.py:2: .* fails with ZeroDivisionError.*got `return 1 / 0`"),
        ("def project():\n    return 1", {}, r"project\(\) returns no Project \(expected gs.Project\(...\), got int\)"),
        (GOOD, {"sede": "1"}, r"-o sede: unknown project option \(expected seed, wide, name, got sede\)"),
        (GOOD, {"seed": "one"}, r"-o seed: the project option has another type \(expected int, got 'one'\)"),
        (GOOD, {"wide": "maybe"}, r"-o wide: .*expected bool"),
    ],
)
def test_a_broken_project_file_is_one_line(
    source: str | None, options: dict[str, str], message: str, tmp_path: Path
) -> None:
    if source is not None:
        (tmp_path / "p.py").write_text(source)
    with pytest.raises(GradstoreError, match=message) as caught:
        gs.load_project(tmp_path / "p.py", options)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


# -- identity ----------------------------------------------------------------------------------------------------


def test_fingerprint_follows_what_decides_the_features() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    base = fingerprint(make(model), proj_dim=64)
    assert base == fingerprint(make(model), proj_dim=64)
    others = [
        fingerprint(make(model), proj_dim=65),
        fingerprint(make(model), proj_dim=64, seed=1),
        fingerprint(make(model), proj_dim=64, projection="gaussian"),
        fingerprint(make(model), proj_dim=64, layout="sum"),
        fingerprint(make(model), proj_dim=64, dtype="float32"),
        fingerprint(make(model, parameters="weight"), proj_dim=64),
    ]
    with torch.no_grad():
        model.bias[0] = torch.nextafter(model.bias[0], torch.tensor(9.0))
    others.append(fingerprint(make(model), proj_dim=64))
    assert len({base, *others}) == 8


def test_fingerprints_are_what_they_always_were() -> None:
    """Literals that the first stores have."""
    model = nn.Linear(3, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
    assert fingerprint(make(model)) == "d6c9cc36f4ec07f3e496b584397e4727"
    others: Any = {"projection": "gaussian", "precision": "exact", "layout": "mixed", "dtype": "int8"}
    assert fingerprint(make(model), proj_dim=64, seed=5, **others) == "f609e98d600be53436583517956587c4"


def test_differences_are_a_table_of_two_columns() -> None:
    a = {"projection": {"K": 1, "seed": 0}, "weights": "x", "data": {"length": 3}}
    b = {"projection": {"K": 1, "seed": 1}, "weights": "y", "data": {"length": 4}}
    assert differences(a, b) == [("projection.seed", "0", "1"), ("weights", "x", "y"), ("data.length", "3", "4")]
    with pytest.raises(gs.GradstoreError) as caught:
        require_same(a, b, where="here", theirs="left", ours="right", data=False)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("here: what left holds and what right asks for differ in 2 field(s).")
    assert lines[1].split() == ["left", "right"]
    assert lines[2].split() == ["projection.seed", "0", "1"]
    assert caught.value.exit_code == 4
