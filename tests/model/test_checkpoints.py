"""Checkpoints as people have them: wrapped, within a training run's file, in shards, half downloaded."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from conftest import Record
from mutations import mutated
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gradstore as gs
from gradstore.errors import CorruptError, GradstoreError, ProjectError, UnsafeError
from gradstore.featurization.trial import checks
from gradstore.model.weights import load_weights, weights_digest


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))


DEPRECATED = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # by torch itself
GIVEN = network(1)
STATE = dict(GIVEN.state_dict())


def prefixed(prefix: str, state: Mapping[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(content: Any, folder: Path, name: str = "net.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def loaded(path: Path) -> tuple[str, ...]:
    """Load into a network of other weights, which must then be those that were given; returns what is said."""
    model = network()
    assert weights_digest(model) != weights_digest(GIVEN)
    notes = load_weights(model, path)
    assert weights_digest(model) == weights_digest(GIVEN)
    return notes


# -- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "removed"),
    [
        ("module.", "'module.'"),
        ("_orig_mod.", "'_orig_mod.'"),
        ("model.", "'model.'"),
        ("net.", "'net.'"),
        ("module._orig_mod.", "'_orig_mod.' and 'module.'"),
        ("_orig_mod.module.", "'_orig_mod.' and 'module.'"),
        ("model._orig_mod.", "'_orig_mod.' and 'model.'"),
        ("module.model.", "'module.' and 'model.'"),
    ],
)
def test_what_wrappers_put_before_names_is_removed_and_said(prefix: str, removed: str, tmp_path: Path) -> None:
    path = saved(prefixed(prefix), tmp_path)
    with pytest.raises(RuntimeError, match="Missing key"):  # the control
        network().load_state_dict(torch.load(path))
    assert loaded(path) == (f"weights: those of net.pt, without {removed} in their names",)


@DEPRECATED
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))])
def test_the_wrappers_themselves(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    assert len(loaded(saved(wrap(network(1)).state_dict(), tmp_path))) == 1


def test_layers_that_were_compiled_one_by_one(tmp_path: Path) -> None:
    state = {name.replace("0.", "0._orig_mod.", 1): tensor for name, tensor in STATE.items()}
    assert loaded(saved(state, tmp_path)) == ("weights: those of net.pt, without '_orig_mod.' in their names",)


def test_names_that_fit_are_left_alone(tmp_path: Path) -> None:
    """Also those that begin as a wrapper's do, of a model that is called so."""
    assert loaded(saved(STATE, tmp_path)) == ()
    model = nn.ModuleDict({"module": network()})
    assert load_weights(model, saved(prefixed("module."), tmp_path)) == ()
    assert load_weights(model, saved(prefixed("module.module."), tmp_path)) == (
        "weights: those of net.pt, without 'module.' in their names",
    )


def test_what_does_not_fit_is_listed_by_the_names_that_come_nearest(tmp_path: Path) -> None:
    state = prefixed("module.")
    del state["module.2.weight"]
    with pytest.raises(ProjectError) as caught:
        load_weights(network(), saved({**state, "module.head.bias": torch.ones(2)}, tmp_path))
    assert caught.value.line == (
        f"{tmp_path}/net.pt: the weights do not fit the model, without 'module.' in their names (expected 8 tensors of "
        "the model's names and shapes, got missing 2.weight; unknown head.bias). Check that `model=` is built with the "
        "same options as when it was trained."
    )


def test_a_part_that_not_all_names_have_stays(tmp_path: Path) -> None:
    with pytest.raises(
        ProjectError, match=r"got 8 missing, 9 unknown: missing 0.weight; .*unknown module.0.weight; and"
    ):
        load_weights(network(), saved({**prefixed("module."), "criterion.weight": torch.ones(2)}, tmp_path))


def test_two_names_never_become_one(tmp_path: Path) -> None:
    state = {**STATE, "0._orig_mod.weight": torch.zeros(3, 4)}
    with pytest.raises(ProjectError, match=r"unknown 0._orig_mod.weight"):
        load_weights(network(), saved(state, tmp_path))


def test_many_names_are_counted_and_a_few_of_each_kind_listed(tmp_path: Path) -> None:
    path = saved({f"a.{i}": torch.ones(1) for i in range(40)} | {"b.0": torch.ones(1)}, tmp_path)
    with pytest.raises(ProjectError) as caught:
        load_weights(network(), path)
    assert "got 8 missing, 41 unknown: missing 0.weight; " in caught.value.line
    assert "; unknown a.0; and 44 more)" in caught.value.line


# -- files of training runs ----------------------------------------------------------------------------------------


def lightning(**more: Any) -> dict[str, Any]:
    """What a Lightning trainer saves, by its own names."""
    best = {"monitor": "loss", "best_model_score": torch.tensor(0.5), "best_model_path": "a.ckpt", "kth_value": None}
    return {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": prefixed("model."),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": best},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "layers": [3, 2]},
        **more,
    }


@pytest.mark.parametrize("entry", ["state_dict", "model", "model_state_dict", "net"])
def test_weights_that_are_an_entry_are_taken_and_it_is_said(entry: str, tmp_path: Path) -> None:
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1}]}
    path = saved({"epoch": 1, "scaler": {}, entry: STATE, "optimizer": optimizer, "best": torch.ones(1)}, tmp_path)
    assert loaded(path) == (f"weights: the entry '{entry}' of net.pt",)


def test_of_several_entries_the_usual_name_is_taken(tmp_path: Path) -> None:
    others = dict(network(2).state_dict())
    assert loaded(saved({"state_dict_ema": others, "state_dict": STATE}, tmp_path)) == (
        "weights: the entry 'state_dict' of net.pt",
    )
    with pytest.raises(ProjectError, match=r"holds several state_dicts \(expected one, .*, got student, teacher\)"):
        load_weights(network(), saved({"student": others, "teacher": STATE}, tmp_path))
    with pytest.raises(ProjectError, match=r"holds several state_dicts .*, got state_dict, model\)"):
        load_weights(network(), saved({"state_dict": others, "model": STATE}, tmp_path))


def test_a_file_without_weights_lists_its_entries(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match=r"holds no state_dict .*, got entries epoch, optimizer\)"):
        load_weights(network(), saved({"epoch": 1, "optimizer": {"state": {}}}, tmp_path))


def test_a_lightning_file(tmp_path: Path) -> None:
    said = "weights: the entry 'state_dict' of last.ckpt, without 'model.' in their names"
    assert loaded(saved(lightning(), tmp_path, "last.ckpt")) == (said,)


def test_values_of_a_command_line_are_read(tmp_path: Path) -> None:
    path = saved(lightning(hyper_parameters={"out": tmp_path, "args": argparse.Namespace(lr=0.1)}), tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):  # the control
        torch.load(path, weights_only=True)
    assert loaded(path)
    with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):  # nothing stays allowed
        torch.load(path, weights_only=True)


class Traces:
    """An object whose loading makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("archive", [True, False])
def test_what_needs_code_is_refused_and_named(archive: bool, tmp_path: Path) -> None:
    content = lightning(hyper_parameters={"backbone": network(), "trace": Traces(tmp_path / "ran")})
    torch.save(content, tmp_path / "last.ckpt", _use_new_zipfile_serialization=archive)
    with pytest.raises(UnsafeError) as caught:
        load_weights(network(), tmp_path / "last.ckpt")
    layers = "torch.nn.modules.batchnorm.BatchNorm1d, torch.nn.modules.container.Sequential"
    held = f"posix.mkdir, {layers} and 1 more" if archive else "torch.nn.modules.container.Sequential"
    assert f"(expected a state_dict, or safetensors, got {held})." in caught.value.line
    assert "save the `state_dict()` with safetensors.torch.save_file and name that file." in caught.value.line
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "last.ckpt", weights_only=False)  # the control
    assert (tmp_path / "ran").exists()


@DEPRECATED
def test_a_torchscript_program_is_named(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(network().eval(), torch.ones(1, 4)), file)
    (tmp_path / "net.pt").write_bytes(file.getvalue())
    with pytest.raises(UnsafeError, match=r"could run code \(expected .*, got a TorchScript program\)"):
        load_weights(network(), tmp_path / "net.pt")


# -- shards and folders --------------------------------------------------------------------------------------------


def sharded(folder: Path, stem: str = "model", ending: str = "safetensors", **places: str) -> Path:
    """Two shards and their index; `places` changes where the index has a tensor, None for nowhere."""
    folder.mkdir(exist_ok=True)
    names, write = sorted(STATE), save_file if ending == "safetensors" else torch.save
    parts = {f"{stem}-0000{i + 1}-of-00002.{ending}": names[i::2] for i in range(2)}
    for shard, part in parts.items():
        write({name: STATE[name] for name in part}, folder / shard)
    where = {name: shard for shard, part in parts.items() for name in part}
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where | places}))
    return index


@pytest.mark.parametrize(("stem", "ending"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_shards_are_read_by_their_index_or_folder(stem: str, ending: str, tmp_path: Path) -> None:
    index = sharded(tmp_path / "hf", stem, ending)
    assert loaded(index) == loaded(tmp_path / "hf") == ()
    first = min(index.parent.glob("*-00001-*"))
    content = load_file(first) if ending == "safetensors" else torch.load(first)
    with pytest.raises(RuntimeError, match="Missing key"):  # the control
        network().load_state_dict(content)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_one_file(name: str, tmp_path: Path) -> None:
    write = save_file if name.endswith("safetensors") else torch.save
    write(STATE, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert loaded(tmp_path) == ()


def test_of_several_files_in_a_folder_safetensors_come_first(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save(network(2).state_dict(), tmp_path / "pytorch_model.bin")
    assert loaded(tmp_path) == ()


def test_only_shards_that_the_index_names_are_read(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    save_file({"further": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    assert loaded(index) == ()


def test_shards_may_be_links(tmp_path: Path) -> None:
    """As in a cache of weights, whose files lie elsewhere."""
    index = sharded(tmp_path / "hf")
    (tmp_path / "blobs").mkdir()
    for shard in index.parent.glob("*.safetensors"):
        shard.rename(tmp_path / "blobs" / shard.name)
        shard.symlink_to(f"../blobs/{shard.name}")
    assert loaded(index) == ()


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / FIRST).unlink(), ProjectError, rf"index.json: a shard .* does not exist \(got '{FIRST}'\)"),
        (
            lambda f: sharded(f, **{"2.weight": FIRST}),
            ProjectError,
            rf"{FIRST}: a shard lacks tensors that the index has there \(expected those of model.*, got 2.weight\)",
        ),
        (
            lambda f: sharded(f, extra=SECOND),
            ProjectError,
            r"a shard lacks tensors that the index has there \(.*extra\)",
        ),
        (
            lambda f: save_file({**load_file(f / FIRST), "2.weight": torch.ones(3)}, f / FIRST),
            ProjectError,
            rf"{FIRST}: a shard holds tensors that the index has not there \(.*got 2.weight\)",
        ),
        (
            lambda f: sharded(f, extra="../x.safetensors"),
            UnsafeError,
            r"names what is no file beside it .*'\.\./x\.safe",
        ),
        (lambda f: sharded(f, extra="/etc/passwd"), UnsafeError, r"names what is no file beside it"),
        (lambda f: sharded(f, extra=""), UnsafeError, r"names what is no file beside it"),
        (lambda f: sharded(f, extra=".."), UnsafeError, r"names what is no file beside it"),
        (lambda f: sharded(f, extra="x" * 300), UnsafeError, r"names what is no file beside it"),
        (lambda f: sharded(f, extra=3), CorruptError, r"no index of shards \(expected a weight_map of names to files"),
        (lambda f: in_index(f, '{"weight_map": []}'), CorruptError, r"no index of shards .*got list\)"),
        (lambda f: in_index(f, '{"metadata": {}}'), CorruptError, r"no index of shards, or a damaged one .*weight_map"),
        (lambda f: in_index(f, "[" * 100_000), CorruptError, r"no index of shards, or a damaged one"),
        (lambda f: in_index(f, f'{{"weight_map": {{"a": "{FIRST}", "a": "b"}}}}'), CorruptError, "a is there twice"),
        (lambda f: (f / SECOND).write_bytes(b""), CorruptError, rf"{SECOND}: the weights file is empty"),
        (lambda f: cut(f / SECOND), CorruptError, rf"{SECOND}: this file is cut short"),
    ],
)
def test_shards_that_do_not_belong_together(
    spoil: Callable[[Path], object], error: type[GradstoreError], message: str, tmp_path: Path
) -> None:
    index = sharded(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=message) as caught:
        load_weights(network(), index)
    assert "\n" not in caught.value.line


def in_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)


def cut(path: Path, share: float = 0.7) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_a_folder_without_weights_says_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match=r"does not exist \(expected a folder with one of model.safetensors, model"):
        load_weights(network(), tmp_path)


@pytest.mark.soak
def test_mutated_indexes(fast: Path, amount: Callable[[int, int], int], record: Record) -> None:
    index = sharded(fast)
    whole, rng, count = index.read_bytes(), np.random.default_rng(0), amount(300, 10_000)
    refused: list[GradstoreError] = []
    for _ in range(count):
        index.write_bytes(mutated(rng, whole))
        model = network()
        try:
            load_weights(model, index)
        except GradstoreError as error:
            refused.append(error)
            continue
        assert weights_digest(model) == weights_digest(GIVEN)
    assert {error.exit_code for error in refused} <= {3, 5, 9}
    assert all("\n" not in error.line and len(error.line) < 1000 for error in refused)
    record(
        "S13",
        "hostile checkpoints",
        injected=count,
        recovered=count - len(refused),
        refused=len(refused),
        silent=0,
        control="torch.load and load_state_dict alone: complex weights lose their imaginary part, sparse ones end in a "
        "RuntimeError",
    )


# -- what is no checkpoint -----------------------------------------------------------------------------------------

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 132\n"
)


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "net.ckpt"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"the weights file is empty\. Copy it again"),
        (POINTER, r"this is a git-lfs pointer, .*\(expected weights, got 1\d\d bytes\)\. Run `git lfs pull`"),
        (
            b"<!DOCTYPE html>\n<html><body>Sign in</body></html>",
            r"this is a web page, saved .*\. Download the file itself",
        ),
        (b"\xef\xbb\xbf \n<HTML lang='en'>", r"this is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', r"this is a web page"),
    ],
)
def test_what_was_saved_by_mistake_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptError, match=message):
        load_weights(network(), tmp_path / name)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("name", ["net.pt", "old.pt", "net.safetensors"])
def test_a_file_that_is_cut_short_is_named_so(name: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "net.safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=name == "net.pt")
    assert loaded(path) == ()
    whole = path.stat().st_size
    cut(path, share)
    with pytest.raises(CorruptError, match=rf"this file is cut short \(expected .*, got {int(whole * share)} bytes\)"):
        load_weights(network(), path)


def test_a_longer_file_is_not_called_cut_short(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "net.safetensors")
    with (tmp_path / "net.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CorruptError, match="this is no safetensors file, or a damaged one"):
        load_weights(network(), tmp_path / "net.safetensors")


# -- tensors -------------------------------------------------------------------------------------------------------


def test_tensors_of_a_gpu_load_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    path = saved(STATE, tmp_path)
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):  # the control
            torch.load(path, weights_only=True)
    assert loaded(path) == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_without_loss(dtype: torch.dtype, tmp_path: Path) -> None:
    half = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in STATE.items()}
    model, expected = network(), network(2)
    load_weights(model, saved(half, tmp_path))
    with torch.no_grad():
        for name, tensor in expected.state_dict().items():
            tensor.copy_(torch.from_numpy(half[name].float().numpy()))
    assert model[0].weight.dtype == torch.float32
    assert weights_digest(model) == weights_digest(expected)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)
        self.outer.weight = self.inner.weight


def test_tied_weights_are_stored_once_or_twice_and_never_differ(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = Tied()
    state = dict(source.state_dict())
    once = {name: tensor for name, tensor in state.items() if name != "outer.weight"}
    for content in (once, state, prefixed("module.", once)):
        model = Tied()
        load_weights(model, saved(content, tmp_path))
        assert weights_digest(model) == weights_digest(source)
    other = {**state, "outer.weight": state["outer.weight"] + 1}
    Tied().load_state_dict(other)  # the control: the last one wins
    with pytest.raises(
        ProjectError, match=r"tied in the model, other values in the file inner.weight and outer.weight"
    ):
        load_weights(Tied(), saved(other, tmp_path))


# -- what is said --------------------------------------------------------------------------------------------------


def test_check_and_featurize_say_it(tmp_path: Path) -> None:
    data = [(torch.randn(4), i % 2) for i in range(6)]
    said = "weights: the entry 'state_dict' of last.ckpt, without 'model.' in their names"

    def project() -> gs.Project:
        return gs.Project(network(), {"train": data}, saved(lightning(), tmp_path, "last.ckpt"))

    first = next(checks(project(), split="train", proj_dim=8))
    assert first.detail == f"Sequential in eval mode on cpu; {said}"
    notes: list[str] = []
    gs.featurize(project(), split="train", out=tmp_path / "store", proj_dim=8, on_note=notes.append)
    assert notes == [said]


def test_an_exact_gram_matrix_says_it(tmp_path: Path) -> None:
    saved(prefixed("module."), tmp_path)
    (tmp_path / "project.py").write_text(
        "import torch, gradstore as gs\nfrom test_checkpoints import network\n"
        "def project():\n"
        "    return gs.Project(network(), {'train': [(torch.randn(4), 0)] * 2}, 'net.pt')\n"
    )
    done = run(tmp_path, "gram project.py train --out k.h5 --kernel trntk")
    assert done.status == 0, done.err
    assert "weights: those of net.pt, without 'module.' in their names\n" in done.err
