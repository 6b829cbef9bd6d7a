"""Error bars beside similarities: of one row, the textbook (1 - ρ²) / sqrt(K); everywhere they are shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PROJECT, run
from synthetic import clustered, write_store

import gradstore as gs
from gradstore.kernels.definitions import projected_kernel
from gradstore.kernels.projection_error import standard_errors
from gradstore.store.feature_store import FeatureStore

pytestmark = pytest.mark.numerical

NAMES = ("cat", "dog", "bird")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, FeatureStore]:
    path = tmp_path_factory.mktemp("stores")
    return write_store(path / "train", clustered(60, 3, 900), names=NAMES), write_store(
        path / "test", clustered(6, 3, 900, seed=1), names=NAMES
    )


@pytest.mark.parametrize(("classes", "weights"), [("cat - dog", (1, -1, 0)), ("cat", (1, 0, 0)), (None, (1, 1, 1))])
def test_of_a_single_row_they_are_the_textbooks(stores: tuple, classes: str | None, weights: tuple[float, ...]) -> None:
    result = gs.topk(*stores, 4, "proj-pntk", classes=classes, error_bars=True)
    assert result.standard_error.shape == (6, 4)
    single = np.asarray(weights, np.float64)
    a = np.einsum("ncK,c->nK", stores[1].features[:].astype(np.float64), single)
    b = np.einsum("ncK,c->nK", stores[0].features[:].astype(np.float64), single)
    for q in range(6):
        for rank, i in enumerate(result.indices[q]):
            cosine = a[q] @ b[i] / np.linalg.norm(a[q]) / np.linalg.norm(b[i])
            assert result.standard_error[q, rank] == pytest.approx((1 - cosine**2) / 30, rel=0.02, abs=1e-4)


def test_of_all_classes_they_are_those_of_the_features(stores: tuple) -> None:
    result = gs.topk(*stores, 3, rows=[4, 1], error_bars=True)
    kernel = projected_kernel("proj-trntk")
    for q, row in enumerate((4, 1)):
        own = torch.from_numpy(stores[1].features[row])[None].expand(3, -1, -1)
        others = torch.from_numpy(stores[0].features[result.indices[q]])
        np.testing.assert_allclose(result.standard_error[q], standard_errors(own, others, kernel), rtol=1e-9)
    own = gs.topk(stores[0], stores[0], 1, error_bars=True)
    assert own.standard_error.max() < 1e-6, "a row with itself"


def test_they_are_shown_only_when_asked_for(stores: tuple, tmp_path: Path) -> None:
    plain, barred = gs.topk(*stores, 2), gs.topk(*stores, 2, error_bars=True)
    assert plain.standard_error is None
    assert "standard_error" not in plain.records()[0]["neighbours"][0]
    np.testing.assert_array_equal(plain.similarity, barred.similarity)
    near = barred.records()[3]["neighbours"][1]
    assert near["standard_error"] == barred.standard_error[3, 1]
    assert barred.explanation(3).neighbours[1].standard_error == barred.standard_error[3, 1]
    lines = barred.save_csv(tmp_path / "bars.csv").read_text().splitlines()
    assert lines[0].endswith("similarity,standard_error")
    assert float(lines[1].split(",")[-1]) == barred.standard_error[0, 0]
    assert plain.save_csv(tmp_path / "plain.csv").read_text().splitlines()[0].endswith("similarity")
    assert f"± {barred.standard_error[0, 0]:.3f}" in barred.save_html(tmp_path / "bars.html").read_text()
    assert "±" not in plain.save_html(tmp_path / "plain.html").read_text()


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "project.py").write_text(PROJECT)
    for split in ("train", "test"):
        assert run(tmp_path, "featurize project.py --split", split, "--out", split, "--proj-dim 64").status == 0
    shown = run(tmp_path, "topk train test -k 2 --error-bars")
    assert shown.status == 0, shown.err
    assert shown.out.count("± 0.") == 20
    values = json.loads(run(tmp_path, "topk train test -k 2 --error-bars --json").out)
    assert 0 < values[0]["neighbours"][0]["standard_error"] < 0.5
