"""Rows featurized on the spot answer like stored ones, wherever rows are read."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import MismatchError, UsageError
from gradstore.explain.linearisation import linearise_store
from gradstore.featurization.on_the_spot import featurize_queries
from gradstore.store.export import export

pytestmark = pytest.mark.numerical


def make_project(seed: int = 0) -> gs.Project:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs = torch.randn(90, 6, generator=generator)
    labels = torch.arange(90) % 3
    splits = {"train": TensorDataset(inputs[:40], labels[:40]), "test": TensorDataset(inputs[40:], labels[40:])}
    return gs.Project(model=model, splits=splits, classes=["a", "b", "c"], poisoned={"test": [3, 20]})


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("layout", ["per-class", "sum"])
def test_results_are_those_of_a_stored_query_set(dtype: str, layout: str, tmp_path: Path) -> None:
    settings = {"proj_dim": 200, "seed": 5, "dtype": dtype, "layout": layout, "precision": "exact"}
    kernel = "proj-pntk" if layout == "sum" else "proj-trntk"
    project = make_project()
    train = gs.featurize(project, split="train", out=tmp_path / "train", **settings)
    stored = gs.featurize(project, split="test", out=tmp_path / "test", **settings)
    rows = [33, 2, 3, 49, 17, 2]
    fresh = featurize_queries(project, train, split="test", rows=rows)
    ours, theirs = gs.topk(train, fresh, 4, kernel), gs.topk(train, stored, 4, kernel, rows=rows)
    np.testing.assert_array_equal(ours.indices, theirs.indices)
    np.testing.assert_array_equal(ours.similarity, theirs.similarity)
    assert ours.records() == theirs.records()
    np.testing.assert_array_equal(fresh.poisoned, stored.poisoned[rows])
    ours.save_csv(tmp_path / "ours.csv")
    theirs.save_csv(tmp_path / "theirs.csv")
    assert (tmp_path / "ours.csv").read_text() == (tmp_path / "theirs.csv").read_text()
    certified = gs.topk(train, fresh, 4, kernel, mode="certified")
    np.testing.assert_array_equal(certified.similarity, ours.similarity)


def test_all_rows_by_default_and_pages(tmp_path: Path) -> None:
    project = make_project()
    train = gs.featurize(project, split="train", out=tmp_path / "train", proj_dim=64)
    fresh = featurize_queries(project, train, split="test")
    assert fresh.shape == (50, 3, 64)
    page = gs.topk(train, fresh, 2).save_html(tmp_path / "page.html").read_text()
    assert "test of the project" in page


def test_another_model_is_refused(tmp_path: Path) -> None:
    train = gs.featurize(make_project(), split="train", out=tmp_path / "train", proj_dim=64)
    with pytest.raises(MismatchError, match="weights"):
        gs.topk(train, featurize_queries(make_project(1), train, split="test", rows=[0]))


def test_rows_that_do_not_exist(tmp_path: Path) -> None:
    train = gs.featurize(make_project(), split="train", out=tmp_path / "train", proj_dim=64)
    with pytest.raises(UsageError, match=r"--rows: no such query row \(expected 0 to 49, got 50\)"):
        featurize_queries(make_project(), train, split="test", rows=[1, 50])


# -- every reader of rows ----------------------------------------------------------------------------------------

SOME = [33, 2, 3, 49, 17, 2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """(project, training store, query store, the same queries in memory)."""
    project, folder = make_project(), tmp_path_factory.mktemp("stores")
    settings = {"proj_dim": 96, "precision": "exact"}
    train, stored = (gs.featurize(project, split=s, out=folder / s, **settings) for s in ("train", "test"))
    return project, train, stored, featurize_queries(project, train, split="test")


def test_they_read_as_stored_rows_do(made: tuple) -> None:
    _, _, stored, fresh = made
    scattered = np.array([0, 3, 7, 8, 49])
    room = stored.schema.empty(7)
    blocks = [{**columns} for _, columns in fresh.blocks(50)]
    for ours, theirs in (
        (fresh.read(3, 20), stored.read(3, 20)),
        (fresh.read(3, 9, out=fresh.schema.empty(8)), stored.read(3, 9)),
        (fresh.gather(scattered, fresh.schema.empty(7)), stored.gather(scattered, room)),
        (blocks[0], stored.read(0, 50)),
    ):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name, strict=True)
    columns, space = stored.schema.empty(20, features=False), stored.schema.empty(6)["features"]
    parts = [(first, part.copy()) for first, part in fresh.stream(5, 25, columns, space)]
    assert [first for first, _ in parts] == [5, 11, 17, 23]
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), stored.read(5, 25)["features"])
    np.testing.assert_array_equal(columns["digest"], stored.read(5, 25)["digest"])
    for name in ("labels", "logits", "norms", "sq_norms", "rows", "poisoned"):
        np.testing.assert_array_equal(getattr(fresh, name), getattr(stored, name), strict=True)
    np.testing.assert_array_equal(fresh.features[:], stored.features[:], strict=True)
    assert len(fresh.dataset()) == 50
    assert (fresh.complete, fresh.shape, fresh.fingerprint) == (True, stored.shape, stored.fingerprint)
    assert fresh.identity == stored.identity
    assert fresh.card()["split"] == "test, 50 of 50 rows, featurized on the spot"
    assert repr(fresh).startswith("FreshRows(")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fresh)).features[:], stored.features[:])
    for read in (lambda: fresh.read(0, 51), lambda: fresh.gather(np.array([4, 50]), room)):
        with pytest.raises(UsageError, match="test of the project: rows out of range"):
            read()


def test_what_was_read_can_be_changed_without_harm(made: tuple) -> None:
    _, _, stored, fresh = made
    for array in (*fresh.read(0, 5).values(), fresh.features[0:3], fresh.features[:]):
        array[...] = 0
    np.testing.assert_array_equal(fresh.features[:], stored.features[:])


@pytest.mark.parametrize("kernel", ["proj-trntk", "proj-pntk", "proj-trntk0"])
def test_gram_matrices(made: tuple, kernel: str, tmp_path: Path) -> None:
    _, train, stored, fresh = made
    pairs = {"rows": ((fresh, train), (stored, train)), "columns": ((train, fresh), (train, stored))}
    for name, (ours, theirs) in {**pairs, "both": ((fresh, None), (stored, None))}.items():
        a = gs.gram(*ours, kernel, out=tmp_path / f"{name} a.h5")
        b = gs.gram(*theirs, kernel, out=tmp_path / f"{name} b.h5")
        np.testing.assert_array_equal(a[:], b[:])
        assert a.attributes == b.attributes


def test_two_selections_of_a_split_are_not_the_same_rows(made: tuple, tmp_path: Path) -> None:
    project, train, stored, _ = made
    a, b = (featurize_queries(project, train, split="test", rows=rows) for rows in (SOME, SOME[::-1]))
    (tile,) = gs.gram(stored)
    whole = np.triu(tile.values) + np.triu(tile.values, 1).T
    gram = gs.gram(a, b, out=tmp_path / "gram.h5")
    np.testing.assert_allclose(gram[:], whole[np.ix_(SOME, SOME[::-1])], rtol=1e-4, atol=1e-5)
    assert not gram.symmetric
    for ours, theirs in ((b, a), (b, b), (stored, b)):
        with pytest.raises(MismatchError, match="exists and is not the Gram matrix that was asked for"):
            gs.gram(ours, theirs, out=tmp_path / "gram.h5")
    assert gs.gram(a, a, out=tmp_path / "own.h5").symmetric


@pytest.mark.parametrize("mode", ["exact", "certified", "approx"])
def test_searches_and_forensics(made: tuple, mode: str) -> None:
    project, train, stored, fresh = made
    ours, theirs = (gs.topk(train, queries, 4, mode=mode, error_bars=True) for queries in (fresh, stored))
    np.testing.assert_array_equal(ours.indices, theirs.indices)
    np.testing.assert_array_equal(ours.similarity, theirs.similarity)
    np.testing.assert_array_equal(ours.standard_error, theirs.standard_error)
    some = featurize_queries(project, train, split="test", rows=SOME)
    np.testing.assert_array_equal(gs.topk(train, some, 4, mode=mode).similarity, theirs.similarity[SOME])
    found = [gs.forensics(train, queries, poisoned=range(0, 40, 2)).as_dict() for queries in (fresh, stored)]
    for record in found:
        for flagged in record["flagged"]:
            del flagged["store"]
    assert found[0] == found[1]
    assert found[0]["flagged"]
    flagged = gs.forensics(train, some, poisoned=range(40), votes=1).as_dict()["flagged"]
    assert [query["row"] for query in flagged] == SOME


@pytest.mark.parametrize("kernel", ["proj-trntk", "proj-pntk"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_surrogates(made: tuple, kernel: str) -> None:
    project, train, stored, fresh = made
    model = gs.KernelGLM(kernel, alpha=1e-2).fit(train)
    np.testing.assert_array_equal(model.logits(fresh), model.logits(stored))
    np.testing.assert_array_equal(model.predict(fresh), model.predict(stored))
    assert gs.evaluate(model, fresh, bootstrap=5) == gs.evaluate(model, stored, bootstrap=5)
    assert linearise_store(model, fresh, bootstrap=5) == linearise_store(model, stored, bootstrap=5)
    np.testing.assert_array_equal(gs.attribute(model, fresh, 7).values, gs.attribute(model, stored, 7).values)
    some = featurize_queries(project, train, split="test", rows=SOME)
    np.testing.assert_array_equal(gs.attribute(model, some, 3).values, gs.attribute(model, stored, 49).values)


def test_residuals_are_of_the_rows_of_the_split(made: tuple, tmp_path: Path) -> None:
    project, train, stored, fresh = made
    ours, theirs = (gs.residual(project, train, rows, pairs=100) for rows in (fresh, stored))
    np.testing.assert_array_equal(ours.exact, theirs.exact)
    np.testing.assert_array_equal(ours.projected, theirs.projected)
    some = featurize_queries(project, train, split="test", rows=SOME)
    found = gs.residual(project, train, some, pairs=1000)
    whole = gs.exact_gram(project, "train", "test")
    np.testing.assert_allclose(found.exact, whole[found.rows_a, np.array(SOME)[found.rows_b]], rtol=1e-4, atol=1e-6)
    lines = found.save_csv(tmp_path / "pairs.csv").read_text().splitlines()[1:]
    assert {int(line.split(",")[1]) for line in lines} == set(SOME)


def test_they_may_be_written_elsewhere_and_trained_on_but_not_indexed(made: tuple, tmp_path: Path) -> None:
    project, train, stored, fresh = made
    for name in ("rows.npy", "rows.safetensors"):
        ours, theirs = export(fresh, tmp_path / f"a-{name}"), export(stored, tmp_path / f"b-{name}")
        assert ours.read_bytes() == theirs.read_bytes()
    here = featurize_queries(project, train, split="train")
    ours, theirs = gs.topk(here, stored, 4), gs.topk(train, stored, 4)
    np.testing.assert_array_equal(ours.similarity, theirs.similarity)
    models = [gs.KernelGLM(alpha=1e-2).fit(rows) for rows in (here, train)]
    np.testing.assert_array_equal(models[0].coef_, models[1].coef_)
    np.testing.assert_array_equal(
        gs.attribute(models[0], fresh, 1, train=here).values, gs.attribute(models[1], stored, 1).values
    )
    half = featurize_queries(project, train, split="train", rows=slice(0, 20))
    with pytest.raises(MismatchError, match=r"\n  data\.inputs "):
        gs.attribute(models[0], fresh, 1, train=half)
    message = "train of the project: an index is kept beside a store, and these rows were featurized on the spot"
    for index in (lambda: gs.Session(here), lambda: gs.topk(here, stored, mode="certified")):
        with pytest.raises(UsageError, match=message):
            index()
    with pytest.raises(UsageError, match="--train: the surrogate was fitted on rows in memory"):
        gs.attribute(models[0], fresh, 1)


def test_no_rows_at_all_are_refused(made: tuple) -> None:
    project, train, *_ = made
    with pytest.raises(UsageError, match=r"--rows: no query row is chosen \(expected at least one\)"):
        featurize_queries(project, train, split="test", rows=[])
