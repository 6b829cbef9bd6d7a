"""Folders that transformers saved, as projects: the same logits and gradients as its models called by hand."""

from __future__ import annotations

import json
import logging
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from huggingface_folders import LABELS, TEXTS, WORDS, tiny_bert, tiny_vit
from PIL import Image
from safetensors.torch import load_file, save_file

import gradstore as gs
from gradstore.errors import CorruptError, GradstoreError, ProjectError, UnsafeError
from gradstore.featurization.trial import checks
from gradstore.model.parameters import ALIGNMENT

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

PICTURES = [Image.effect_mandelbrot((9 + i, 12), (-2, -1.5, 1, 1.5), 9 + i).convert("RGB") for i in range(4)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("bert")
    return folder, tiny_bert(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("vit")
    return folder, tiny_vit(folder)


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def logits_of(project: gs.Project, split: str = "train") -> torch.Tensor:
    examples = project.prepare().examples(split)
    return project.logits(examples.read(range(len(examples)))[0])


def by_hand(model: Any, text: Any) -> dict[str, torch.Tensor]:
    """One text's tokens, found in the vocabulary by hand and not padded."""
    parts = [text] if isinstance(text, str) else list(text)
    words = [part.replace("faster", "fast ##er").split() for part in parts]
    tokens = [["[CLS]", *words[0], "[SEP]"], *([*more, "[SEP]"] for more in words[1:])]
    ids = [WORDS.index(token) for part in tokens for token in part]
    types = [i for i, part in enumerate(tokens) for _ in part]
    return {"input_ids": torch.tensor([ids]), "token_type_ids": torch.tensor([types])}


# -- texts ---------------------------------------------------------------------------------------------------------


def test_logits_of_texts_are_those_of_the_model_by_hand(bert: tuple[Path, Any]) -> None:
    folder, model = bert
    project = gs.huggingface(folder, {"train": (TEXTS, LABELS)})
    expected = torch.cat([model(**by_hand(model, text)).logits for text in TEXTS])
    assert expected.std(0).min() > 0.01  # the control: they differ by row
    torch.testing.assert_close(logits_of(project), expected.detach(), rtol=1e-5, atol=1e-5)
    inputs, labels = project.examples("train").read(range(6))
    assert labels.tolist() == LABELS
    assert project.examples("train").label_table is not None
    assert isinstance(inputs, dict)
    assert set(inputs) == {"input_ids", "token_type_ids", "attention_mask"}
    assert {tuple(x.shape) for x in inputs.values()} == {(6, 9)}
    assert (project.classes, project.notes) == (["kind 0", "kind 1", "kind 2"], ())


def test_features_are_projected_gradients_of_the_model_by_hand(bert: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = bert
    project = gs.huggingface(folder, {"train": (TEXTS, LABELS)})
    store = gs.featurize(project, split="train", out=tmp_path / "store", proj_dim=64, dtype="float32", workers=2)
    for row in (0, 1, 2):
        logits = model(**by_hand(model, TEXTS[row])).logits[0]
        for c in range(3):
            gradients = torch.autograd.grad(logits[c], list(model.parameters()), retain_graph=True, allow_unused=True)
            assert all(gradient is not None for gradient in gradients)
            padded = [torch.nn.functional.pad(g.flatten(), (0, -g.numel() % ALIGNMENT)) for g in gradients]
            whole = torch.cat(padded)[None]
            expected = gs.Projection(dim=64, seed=0).project(whole)[0]
            ours = torch.as_tensor(store.features[row, c])
            assert torch.linalg.vector_norm(ours - expected) < 1e-4 * torch.linalg.vector_norm(expected)
    assert [store.preview(row) for row in (0, 1, 2)] == ["the cat sat on the mat.", "a dog ran faster", "the cat a dog"]


PROJECT = """
import gradstore as gs

TEXTS = ["the cat sat on the mat .", "a dog ran faster", "the dog sat ."]

def project(longest: int = 0):
    splits = {"train": (TEXTS, [0, 1, 2]), "test": (TEXTS[:2], None)}
    return gs.huggingface("models/bert", splits, max_length=longest or None)
"""


def test_a_project_file_of_four_lines(tmp_path: Path) -> None:
    """From another working directory: the folder is looked for beside the project file."""
    (tmp_path / "user" / "models").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    tiny_bert(tmp_path / "user/models/bert")
    (tmp_path / "user/project.py").write_text(PROJECT)
    tried = run(tmp_path / "elsewhere", "check ../user/project.py --proj-dim 64 -o longest=6")
    assert tried.status == 0, tried.err
    assert "BertForSequenceClassification in eval mode" in tried.out
    assert "split 'train': 2 of 3 texts are longer than 6 tokens, and are cut" in tried.out
    assert "[n, 3]: kind 0, kind 1, kind 2" in tried.out
    for split in ("train", "test"):
        done = run(tmp_path / "elsewhere", f"featurize ../user/project.py --split {split} --out {split} --proj-dim 64")
        assert done.status == 0, done.err
        assert "Loading" not in done.err
    found = run(tmp_path / "elsewhere", "topk train test -k 1 --html near.html --json")
    assert [record["neighbours"][0]["row"] for record in json.loads(found.out)] == [0, 1]
    assert "the cat sat on the mat." in (tmp_path / "elsewhere/near.html").read_text()


def test_all_splits_have_one_length_so_that_a_text_is_the_same_row_in_each(bert: tuple[Path, Any]) -> None:
    project = gs.huggingface(bert[0], {"train": (TEXTS, None), "test": (TEXTS[4:5], None)})
    assert project.examples("test").read([0])[0]["input_ids"].shape == (1, 9)  # type: ignore[call-overload]
    longer = gs.huggingface(bert[0], {"train": (TEXTS, None)}, max_length=12)
    assert longer.examples("train").read([0])[0]["input_ids"].shape == (1, 12)  # type: ignore[call-overload]
    torch.testing.assert_close(logits_of(longer), logits_of(project), rtol=1e-5, atol=1e-5)


def test_what_a_model_cannot_take_is_cut_and_said(bert: tuple[Path, Any]) -> None:
    project = gs.huggingface(bert[0], {"train": (["a cat", "the " * 30], None), "test": (["a dog"], None)})
    assert project.examples("train").read([1])[0]["input_ids"].shape == (1, 16)  # type: ignore[call-overload]
    assert project.notes == ("split 'train': 1 of 2 texts are longer than 16 tokens, and are cut",)


# -- pictures ------------------------------------------------------------------------------------------------------


def test_logits_of_pictures_are_those_of_the_model_by_hand(vit: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = vit
    PICTURES[0].save(tmp_path / "0.png")
    given = [
        tmp_path / "0.png",
        str(tmp_path / "0.png"),
        *PICTURES[1:],
        np.asarray(PICTURES[1]),
        Image.new("L", (8, 8)),
    ]
    project = gs.huggingface(folder, {"train": (given, [i % 2 for i in range(len(given))])})
    seen = [PICTURES[0], PICTURES[0], *PICTURES[1:], PICTURES[1], Image.new("RGB", (8, 8))]
    pixels = np.stack([np.asarray(picture.resize((8, 8), Image.Resampling.BILINEAR)) for picture in seen])
    normal = (pixels / 255 - [0.5, 0.4, 0.3]) / [0.5, 0.25, 0.2]
    expected = model(pixel_values=torch.from_numpy(normal).permute(0, 3, 1, 2).float()).logits.detach()
    assert expected[2:].std(0).min() > 0.01
    torch.testing.assert_close(logits_of(project), expected, rtol=1e-4, atol=1e-4)
    store = gs.featurize(project, split="train", out=tmp_path / "store", proj_dim=32)
    assert np.abs(store.preview(2).astype(int) - pixels[2]).max() <= 1


# -- tensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["labels", "label", "beside"])
def test_tensors_are_taken_by_the_model_s_own_names(labels: str, bert: tuple[Path, Any]) -> None:
    folder, model = bert
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS[:2], padding=True, return_tensors="pt")
    given = (tokens, [1, 2]) if labels == "beside" else {**tokens, labels: torch.tensor([1, 2])}
    project = gs.huggingface(folder, {"train": given})
    inputs, found = project.examples("train").read([0, 1])
    assert isinstance(inputs, dict)
    assert set(inputs) == {"input_ids", "token_type_ids", "attention_mask"}
    assert found.tolist() == [1, 2]
    torch.testing.assert_close(logits_of(project), model(**tokens).logits.detach())
    assert project.show is not None
    assert project.show({name: x[1] for name, x in inputs.items()}) == "a dog ran faster"


def test_without_a_tokenizer_tensors_are_taken_and_texts_refused(tmp_path: Path) -> None:
    tiny_bert(tmp_path, tokenizer=False)
    project = gs.huggingface(tmp_path, {"train": {"input_ids": torch.ones(2, 5, dtype=torch.int64)}})
    assert project.show is None
    assert logits_of(project).shape == (2, 3)
    with pytest.raises(
        ProjectError, match=r"no tokenizer \(expected one of .*tokenizer.json|cannot read the tokenizer"
    ):
        gs.huggingface(tmp_path, {"train": (TEXTS, LABELS)})


def test_without_a_processor_pixels_are_taken(tmp_path: Path) -> None:
    model = tiny_vit(tmp_path, processor=False)
    pixels = torch.randn(2, 3, 8, 8)
    project = gs.huggingface(tmp_path, {"train": ({"pixel_values": pixels}, None)})
    torch.testing.assert_close(logits_of(project), model(pixel_values=pixels).logits.detach())
    with pytest.raises(ProjectError, match="transformers cannot read the image processor of this folder"):
        gs.huggingface(tmp_path, {"train": (PICTURES, None)})


def test_a_dataset_stays_as_it_is(bert: tuple[Path, Any]) -> None:
    data = [({"input_ids": torch.tensor([2, 6, 7, 3])}, 1)]
    assert gs.huggingface(bert[0], {"train": data}).splits["train"] is data


# -- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shards", "pickled", "half", "half by its configuration"])
def test_weights_as_they_are_kept(kind: str, tmp_path: Path) -> None:
    model = tiny_bert(tmp_path)
    if kind == "shards":
        (tmp_path / "model.safetensors").unlink()
        model.save_pretrained(tmp_path, max_shard_size="4KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    elif kind == "pickled":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    elif kind == "half":
        model = model.half()
        model.save_pretrained(tmp_path)
        model = model.float()
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float16", "torch_dtype": "float16"}))
    project = gs.huggingface(tmp_path, {"train": (TEXTS, LABELS)})
    ours = project.model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in project.model.parameters()} == {torch.float32}


def changed(folder: Path, **changes: torch.Tensor | None) -> None:
    """Tensors put into the saved weights, or taken out."""
    state: dict[str, Any] = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: x for name, x in state.items() if x is not None}, folder / "model.safetensors", {"format": "pt"})


def test_tensors_that_the_model_does_not_use_are_named(tmp_path: Path) -> None:
    tiny_bert(tmp_path)
    changed(tmp_path, **{f"cls.{i}": torch.ones(1) for i in range(5)})
    project = gs.huggingface(tmp_path, {"train": (TEXTS, LABELS)})
    said = "has 5 tensors that BertForSequenceClassification does not use: cls.0, cls.1, cls.2 and 2 more"
    assert project.notes == (f"weights: model.safetensors {said}",)
    assert next(checks(project, split="train", proj_dim=8)).detail.endswith(said)


def configured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda f: changed(f, **{"classifier.weight": None}),
            ProjectError,
            r"do not fit BertFor.* \(expected all \d+ tensors of .*, got 1 missing: classifier.weight\)\. Save the",
        ),
        (
            lambda f: changed(f, **{"classifier.bias": torch.ones(7)}),
            ProjectError,
            r"got 1 of another shape: classifier.bias\)",
        ),
        (
            lambda f: configured(f, architectures=["BertForMaskedLM"]),
            ProjectError,
            r"no classifier .*got BertForMasked",
        ),
        (lambda f: configured(f, architectures=None), ProjectError, r"this is no classifier .*got none"),
        (lambda f: configured(f, architectures=["AutoModelForSequenceClassification"]), ProjectError, "no classifier"),
        (
            lambda f: configured(f, architectures=["MyForSequenceClassification"], auto_map={"AutoModel": "my.My"}),
            UnsafeError,
            r"config.json: this model is code in its folder, which is never run",
        ),
        (lambda f: configured(f, quantization_config={"quant_method": "bitsandbytes"}), ProjectError, "quantised"),
        (lambda f: configured(f, model_type="none"), ProjectError, r"transformers cannot read the configuration"),
        (lambda f: configured(f, hidden_size="x"), ProjectError, r"transformers cannot read|the model cannot be built"),
        (
            lambda f: (f / "config.json").write_text("{"),
            ProjectError,
            r"no folder of a Hugging Face model .*got Expecting",
        ),
        (lambda f: (f / "config.json").unlink(), ProjectError, r"\(expected a folder with config.json, .*No such file"),
        (lambda f: (f / "model.safetensors").unlink(), ProjectError, r"does not exist \(expected a folder with one of"),
        (
            lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
            CorruptError,
            r"model.safetensors: this is a git-lfs pointer",
        ),
    ],
)
def test_a_folder_that_is_no_classifier_s(
    spoil: Callable[[Path], object], error: type[GradstoreError], message: str, tmp_path: Path
) -> None:
    tiny_bert(tmp_path)
    gs.huggingface(tmp_path, {"train": (TEXTS, LABELS)})  # the control
    spoil(tmp_path)
    with pytest.raises(error, match=message) as caught:
        gs.huggingface(tmp_path, {"train": (TEXTS, LABELS)})
    assert "\n" not in caught.value.line


def test_a_tokenizer_that_cannot_pad_is_named(tmp_path: Path) -> None:
    tiny_bert(tmp_path)
    config = {"tokenizer_class": "BertTokenizer", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ProjectError, match=r"the tokenizer has no padding token, .*\. Set tokenizer.pad_token"):
        gs.huggingface(tmp_path, {"train": (TEXTS, LABELS)})


def test_a_name_on_a_hub_is_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match=r"bert-base-uncased: this is no folder .*Nothing is downloaded"):
        gs.huggingface(tmp_path / "bert-base-uncased", {"train": (TEXTS, LABELS)})


def test_no_code_in_a_folder_is_run(tmp_path: Path) -> None:
    """Nor that of a kernel that its configuration names, for which transformers would go to a hub."""
    tiny_bert(tmp_path)
    (tmp_path / "my.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass My: pass\n")
    code = {"AutoConfig": "my.My", "AutoTokenizer": ["my.My", "my.My"], "AutoModelForSequenceClassification": "my.My"}
    configured(tmp_path, auto_map=code, attn_implementation="someone/kernel")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "auto_map": code}))
    assert logits_of(gs.huggingface(tmp_path, {"train": (TEXTS, LABELS)})).shape == (6, 3)
    assert not (tmp_path / "ran").exists()


# -- what a caller gets wrong, and what transformers would say -------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((TEXTS, [0, 1]), r"split 'train': the labels are not one .* \(expected 6 integers, .*, got int64 \[2\]\)"),
        ((TEXTS, ["a"] * 6), r"the labels are not one class index a row"),
        ((TEXTS, LABELS, LABELS), r"the split is no examples and labels \(expected .*, got list, list, list\)"),
        ((3, LABELS), r"the split is no examples and labels \(.*, got int, list\)"),
        (([3], [0]), r"gs.huggingface: this is no text \(expected a string, or a pair of them, got int\)"),
        (([("a", "b", "c")], [0]), r"this is no text \(.*, got str, str, str\)"),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(3)}, r"differ in their rows .*mask \[3\]\)"),
        ({"labels": [1]}, r"the tensors differ in their rows .*got no tensors\)"),
    ],
)
def test_splits_of_another_kind(given: Any, message: str, bert: tuple[Path, Any]) -> None:
    with pytest.raises(ProjectError, match=message):
        gs.huggingface(bert[0], {"train": given})


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record.getMessage())


@pytest.fixture
def heard() -> Iterator[Heard]:
    """What transformers logs, which is told to say everything."""
    told, heard = transformers.utils.logging, Heard()
    before = told.get_verbosity()
    told.enable_progress_bar()
    told.set_verbosity_info()
    logging.getLogger("transformers").addHandler(heard)
    yield heard
    logging.getLogger("transformers").removeHandler(heard)
    told.set_verbosity(before)


def test_nothing_is_printed_and_transformers_speaks_afterwards(
    heard: Heard, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_bert(tmp_path)
    changed(tmp_path, further=torch.ones(1))
    capfd.readouterr()
    heard.records.clear()
    gs.huggingface(tmp_path, {"train": (["the " * 40], None)})
    assert (capfd.readouterr(), heard.records) == (("", ""), [])
    transformers.BertForSequenceClassification.from_pretrained(tmp_path)  # the control
    assert any("further" in said for said in heard.records)
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_without_transformers_it_says_how_to_get_it(bert: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ProjectError, match=r'transformers is not installed\. pip install "gradstore\[huggingface\]"'):
        gs.huggingface(bert[0], {"train": (TEXTS, LABELS)})
