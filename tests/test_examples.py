"""The examples of the docstrings and of README run, beside the small stores that README's own project file makes."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import re
import runpy
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_folders import tiny_bert
from safetensors.torch import save_file

import gradstore as gs
from gradstore.featurization.settings import Settings

README = (Path(__file__).parent.parent / "README.md").read_text()
PROJECT_FILE, FOLDER_FILE, IN_PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
MODEL = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


def SmallCNN(classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, classes))


def digits(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 1, 4, 4, generator=generator), torch.arange(n) % 10)


train_set, test_set, mask = digits(24, 1), digits(8, 2), torch.arange(24) < 3
"""
"""What README's project file leaves to its reader."""
DATA = """
texts, labels, test_texts, test_labels = ["the cat sat", "a dog ran ."], [0, 1], ["the cat"], [0]
"""
"""What its project file of a folder does."""
MODULES = [
    ".".join(("gradstore", *path.relative_to(Path(gs.__file__).parent).with_suffix("").parts))
    for path in sorted(Path(gs.__file__).parent.rglob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What examples may name: README's names after its Python ran, in a folder that is the working directory."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("examples"))
    try:
        Path("project.py").write_text(MODEL + PROJECT_FILE)
        tiny_bert(Path("bert-cola"), classes=2)
        save_file(runpy.run_path("project.py")["SmallCNN"](10).state_dict(), "cnn.safetensors")
        gs.featurize(gs.load_project("project.py"), split="test", out="stores/extra")
        shutil.copytree("stores/extra", "stores/old")
        found = {"np": np, "torch": torch, "gradients": torch.ones(2, 110)}
        exec(IN_PYTHON, found)
        yield found
    finally:
        os.chdir(before)


def failures(source: Any, names: dict[str, Any], told: list[str]) -> int:
    """Of the examples of a module; `told` takes what doctest prints."""
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(source, globs=names):
        runner.run(test, out=told.append)
    return runner.summarize(verbose=False).failed


def test_readme_says_what_its_python_gives(names: dict[str, Any]) -> None:
    assert names["result"].indices.shape == (8, 5)
    assert Path("topk.html").exists()
    assert names["train"].features[0:8].shape == (8, 10, 10240)


def test_readme_makes_a_project_of_a_folder(names: dict[str, Any]) -> None:
    Path("folder.py").write_text(DATA + FOLDER_FILE)
    store = gs.featurize(gs.load_project("folder.py"), split="train", out="stores/folder", proj_dim=16)
    assert store.features[:].shape == (2, 2, 16)
    assert [store.preview(row) for row in (0, 1)] == ["the cat sat", "a dog ran."]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(names: dict[str, Any], module: str) -> None:
    told: list[str] = []
    assert not failures(importlib.import_module(module), names, told), "".join(told)


@pytest.mark.parametrize("name", gs.__all__)
def test_every_public_name_has_an_example_and_all_its_arguments(name: str) -> None:
    public = getattr(gs, name)
    (found,) = [test for test in doctest.DocTestFinder(recurse=False).find(public) if test.examples]
    assert len(found.examples) <= 4
    assert not any(example.options for example in found.examples), "nothing is skipped"
    documented = set(re.findall(r"^    \*{0,2}(\w+): ", inspect.getdoc(public) or "", re.MULTILINE))
    if "settings" in documented:  # whose class says what each does
        documented |= {setting.name for setting in fields(Settings)}
    assert inspect.isabstract(public) or set(inspect.signature(public).parameters) <= documented


def test_a_wrong_example_fails(names: dict[str, Any]) -> None:
    def wrong() -> None:
        """
        >>> 1 + 1
        3
        """

    assert failures(wrong, names, told := []) == 1
    assert "Expected:\n    3\nGot:\n    2" in "".join(told)
