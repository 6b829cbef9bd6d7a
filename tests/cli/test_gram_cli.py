"""`gradstore gram` and `gradstore residual` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_cli import PROJECT, run

import gradstore as gs
from gradstore.kernels.gram_matrix import open_gram


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "project.py").write_text(PROJECT)
    for split in ("train", "test"):
        assert run(folder, "featurize project.py --split", split, "--out", split, "--proj-dim 256").status == 0
    return folder


def test_gram_of_stores(folder: Path) -> None:
    result = run(folder, "gram train test --out gram.h5 --json")
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert (facts["shape"], facts["kernel"]) == ([48, 10], "proj-trntk")
    (tile,) = gs.gram(gs.open(folder / "train"), gs.open(folder / "test"))
    np.testing.assert_array_equal(open_gram(folder / "gram.h5")[:], tile.values)
    alone = run(folder, "gram train --kernel proj-pntk --arithmetic int8 --out own.h5")
    assert "shape" in alone.out
    assert "48, 48" in alone.out


def test_gram_of_a_project(folder: Path) -> None:
    result = run(folder, "gram project.py train test --kernel ck --out exact.h5 -o seed=0")
    assert result.status == 0, result.err
    expected = gs.exact_gram(gs.load_project(folder / "project.py"), "train", "test", "ck")
    np.testing.assert_allclose(open_gram(folder / "exact.h5")[:], expected, atol=1e-7)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("gram train --out g.h5 --kernel trntk", 2, "trntk needs a project, not a store"),
        ("gram project.py train --out g.h5 --kernel proj-trntk", 2, "proj-trntk needs stores, not a project"),
        ("gram project.py --out g.h5", 2, "expected 1 or 2 splits after the first argument, got 0"),
        ("gram train test test --out g.h5", 2, "expected 0 or 1 stores after the first argument, got 2"),
        ("gram train --out project.py", 4, "the output exists and is not the Gram matrix that was asked for"),
        ("residual project.py train --kernel cosine", 2, "unknown kernel"),
    ],
)
def test_wrong_commands_are_explained(folder: Path, words: str, status: int, message: str) -> None:
    result = run(folder, words)
    assert result.status == status
    assert message in result.err


def test_residual(folder: Path) -> None:
    result = run(folder, "residual project.py train test --pairs 36 --html r.html --csv r.csv --json")
    assert result.status == 0, result.err
    values = json.loads(result.out)
    assert (values["pairs"], values["K"]) == (36, 256)
    assert "<polyline" in (folder / "r.html").read_text()
    assert len((folder / "r.csv").read_text().splitlines()) == 37
