"""Rows answer alike wherever they are: in one store, in memory, or in several stores one after another."""

from __future__ import annotations

import pickle
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import clustered, dense_similarity, write_store
from torch import nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.arithmetic.int8 import integer_products_are_exact
from gradstore.errors import CorruptError, MismatchError, UsageError
from gradstore.store.export import export

pytestmark = pytest.mark.numerical

# Rows are computed 64 together, and only rows of groups of one size have the same bits on every processor.
N, HALF, M = 192, 64, 12
KERNELS = ["proj-trntk", "proj-pntk", "proj-trntk0"]
SOURCES = ["one store", "in memory", "two stores", "three, one of them in memory"]


def make_project(**more: object) -> gs.Project:
    """`train` is `first` and `second` one after another; groups of rows that are computed together are of one size."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(N + M, 6, generator=generator), torch.arange(N + M) % 3
    spans = {"train": (0, N), "first": (0, HALF), "second": (HALF, N), "test": (N, N + M)}
    splits = {name: TensorDataset(x[low:high], y[low:high]) for name, (low, high) in spans.items()}
    poisoned = {"train": list(range(0, N, 2)), "first": list(range(0, HALF, 2)), "second": list(range(0, N - HALF, 2))}
    return gs.Project(model=model, splits=splits, classes=["a", "b", "c"], **{"poisoned": poisoned, **more})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The project, its stores by split, and every source of the rows of `train`."""
    project, folder = make_project(), tmp_path_factory.mktemp("stores")
    settings = {"proj_dim": 96, "precision": "exact"}
    stores = {s: gs.featurize(project, split=s, out=folder / s, **settings) for s in project.splits}
    fresh = gs.featurize_queries(project, stores["train"], split="train")
    late = gs.featurize_queries(project, stores["train"], split="second", rows=slice(HALF, None))
    start = gs.featurize_queries(project, stores["train"], split="second", rows=slice(0, HALF))
    sources = dict(
        zip(
            SOURCES,
            (
                stores["train"],
                fresh,
                gs.concat([stores["first"], stores["second"]]),
                gs.concat([gs.concat([stores["first"], start]), gs.concat([late])]),
            ),
            strict=True,
        )
    )
    return {"project": project, **stores, **sources}


@pytest.fixture(params=SOURCES)
def rows(made: dict, request: pytest.FixtureRequest) -> gs.Rows:
    return made[request.param]


# -- reading -----------------------------------------------------------------------------------------------------


def require_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """The same datasets, bit for bit; a digest is of the row in its own store, so it is compared there."""
    assert ours.keys() == theirs.keys()
    for name in set(theirs) - {"digest"}:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name, strict=True)


@pytest.mark.parametrize("spare", [1, 8 << 20], ids=["a row at a time", "at once"])
def test_every_way_to_read(made: dict, rows: gs.Rows, spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("gradstore.store.concatenated"), "_SPARE_BYTES", spare)
    whole, schema = made["train"], made["train"].schema
    assert isinstance(rows, gs.Rows)
    assert (rows.shape, rows.schema, len(rows)) == (whole.shape, schema, N)
    for start, stop in ((0, N), (HALF - 3, HALF + 5), (HALF, HALF), (100, 101)):
        require_equal(rows.read(start, stop), whole.read(start, stop))
        require_equal(rows.read(start, stop, out=schema.empty(N), check=False), whole.read(start, stop))
        columns, room = schema.empty(N, features=False), schema.empty(5)["features"]
        parts = [(first, part.copy()) for first, part in rows.stream(start, stop, columns, room)]
        assert [first for first, _ in parts] == [start + sum(len(p) for _, p in parts[:i]) for i in range(len(parts))]
        read = np.concatenate([room[:0], *(part for _, part in parts)])
        require_equal({n: c[: stop - start] for n, c in columns.items()} | {"features": read}, whole.read(start, stop))
    for scattered in ([], [3], [0, 3, HALF - 1, HALF, 100, N - 1], [HALF, HALF + 1]):
        at = np.array(scattered, np.int64)
        require_equal(rows.gather(at, schema.empty(7)), whole.gather(at, schema.empty(7)))
    for (ours, a), (theirs, b) in zip(rows.blocks(13), whole.blocks(13), strict=True):
        assert ours == theirs
        require_equal(a, b)
    for read in (lambda: rows.read(0, N + 1), lambda: rows.gather(np.array([4, N]), schema.empty(2))):
        with pytest.raises(UsageError, match="rows out of range"):
            read()


def test_columns_and_features(made: dict, rows: gs.Rows) -> None:
    whole = made["train"]
    for name in ("labels", "logits", "predicted", "norms", "sq_norms", "rows", "poisoned"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(whole, name), err_msg=name, strict=True)
    everything = np.asarray(whole.features)
    for key in (17, slice(10, 20), slice(None, None, -7), [30, 2, 17, 2], np.arange(N) % 5 == 0, (slice(12, 19), 1)):
        np.testing.assert_array_equal(rows.features[key], everything[key], strict=True)
    assert len(rows.dataset()) == N
    assert rows.dataset()[20][1] == whole.labels[20]
    assert (rows.complete, rows.fingerprint, rows.classes) == (True, whole.fingerprint, whole.classes)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows)).features[:], everything)
    assert "192 rows" in rows.card()["split"] or "192 of 192" in rows.card()["split"]
    assert rows._repr_html_().startswith("<table>")


# -- what is made of them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_gram_matrices(made: dict, rows: gs.Rows, kernel: str, tmp_path: Path) -> None:
    whole, queries = made["train"], made["test"]
    for name, (ours, theirs) in {
        "rows": ((rows, queries), (whole, queries)),
        "columns": ((queries, rows), (queries, whole)),
        "both": ((rows, None), (whole, None)),
    }.items():
        a = gs.gram(*ours, kernel, out=tmp_path / f"{name} a.h5")
        b = gs.gram(*theirs, kernel, out=tmp_path / f"{name} b.h5")
        np.testing.assert_array_equal(a[:], b[:])
        assert a.symmetric == b.symmetric == (name == "both")
    dense = dense_similarity(whole, queries, kernel).T
    np.testing.assert_allclose(gs.gram(rows, queries, kernel, out=tmp_path / "rows a.h5")[:], dense, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_exact_search(made: dict, rows: gs.Rows, kernel: str) -> None:
    whole, queries = made["train"], made["test"]
    across = range(HALF - 6, HALF + 6)
    for ours, theirs, asked in (((rows, queries), (whole, queries), None), ((queries, rows), (queries, whole), across)):
        a, b = (gs.topk(*sides, 5, kernel, rows=asked, error_bars=True) for sides in (ours, theirs))
        np.testing.assert_array_equal(a.indices, b.indices)
        np.testing.assert_array_equal(a.similarity, b.similarity)
        np.testing.assert_array_equal(a.standard_error, b.standard_error)
        assert a.records() == b.records()
    best = -np.sort(-dense_similarity(whole, queries, kernel), axis=1)[:, :5]
    np.testing.assert_allclose(gs.topk(rows, queries, 5, kernel).similarity, best, rtol=1e-12, atol=1e-6)


def test_forensics(made: dict, rows: gs.Rows) -> None:
    ours, theirs = (gs.forensics(train, made["test"], k=5, votes=3).as_dict() for train in (rows, made["train"]))
    assert ours == theirs
    assert ours["flagged"]


@pytest.mark.parametrize("backend", ["multinomial", "sgd"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_surrogates_and_attributions(made: dict, rows: gs.Rows, backend: str, tmp_path: Path) -> None:
    whole, queries = made["train"], made["test"]
    ours, theirs = (gs.KernelGLM(backend=backend, alpha=1e-2).fit(train) for train in (rows, whole))
    np.testing.assert_array_equal(ours.coef_, theirs.coef_)
    again = gs.KernelGLM.load(ours.save(tmp_path / "surrogate.safetensors"))
    np.testing.assert_array_equal(again.logits(queries), theirs.logits(queries))
    np.testing.assert_array_equal(theirs.logits(rows), theirs.logits(whole))
    assert gs.evaluate(again, rows, bootstrap=3) == gs.evaluate(theirs, whole, bootstrap=3)
    found = gs.attribute(again, queries, 3, train=rows)
    np.testing.assert_array_equal(found.values, gs.attribute(theirs, queries, 3).values)
    np.testing.assert_array_equal(gs.attribute(theirs, rows, 20).values, gs.attribute(theirs, whole, 20).values)
    if rows.source:
        np.testing.assert_array_equal(gs.attribute(again, queries, 3).values, found.values)
    else:
        with pytest.raises(UsageError, match="fitted on rows in memory"):
            gs.attribute(again, queries, 3)


def test_exports_and_residuals(made: dict, rows: gs.Rows, tmp_path: Path) -> None:
    whole, project = made["train"], made["project"]
    paths = [export(source, tmp_path / f"{i}.npy") for i, source in enumerate((rows, whole))]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    export(rows, tmp_path / "rows.safetensors")
    found = gs.residual(project, rows, made["test"], pairs=400)
    exact = gs.exact_gram(project, "train", "test")
    np.testing.assert_allclose(found.exact, exact[found.rows_a, found.rows_b], rtol=1e-4, atol=1e-6)
    dense = dense_similarity(made["test"], whole, "proj-trntk")
    np.testing.assert_allclose(found.projected, dense[found.rows_a, found.rows_b], rtol=1e-4, atol=1e-6)


def test_an_index_is_kept_beside_a_store(made: dict, rows: gs.Rows) -> None:
    if rows is made["one store"]:
        found = gs.topk(rows, made["test"], mode="certified")
        np.testing.assert_array_equal(found.similarity, gs.topk(rows, made["test"]).similarity)
        return
    for index in (lambda: gs.Session(rows), lambda: gs.topk(rows, made["test"], mode="certified")):
        with pytest.raises(UsageError, match="an index is kept beside a store, and these rows") as error:
            index()
        assert "\n" not in str(error.value)
        assert str(error.value).endswith("got 192 rows). Search in mode exact, which needs none.")


# -- several stores ----------------------------------------------------------------------------------------------


def test_another_order_is_another_answer(made: dict, tmp_path: Path) -> None:
    """The control: equal bits above mean that rows are where they should be."""
    both, swapped = made["two stores"], gs.concat([made["second"], made["first"]])
    order = np.roll(np.arange(N), -HALF)
    np.testing.assert_array_equal(swapped.features[:], both.features[:][order])
    assert not np.array_equal(swapped.features[:], both.features[:])
    ours, theirs = (gs.topk(train, made["test"], 4) for train in (swapped, both))
    np.testing.assert_array_equal(order[ours.indices], theirs.indices)
    assert not np.array_equal(ours.indices, theirs.indices)
    assert swapped != both
    assert gs.concat([gs.open(made[s].path) for s in ("first", "second")]) == both
    model = gs.KernelGLM(alpha=1e-2).fit(both)
    gram = gs.gram(both, made["test"], out=tmp_path / "gram.h5")
    assert gs.gram(both, made["test"], out=tmp_path / "gram.h5").attributes == gram.attributes
    with pytest.raises(MismatchError, match="exists and is not the Gram matrix that was asked for"):
        gs.gram(swapped, made["test"], out=tmp_path / "gram.h5")
    for other, field in ((swapped, r"data\.part 1\.length"), (made["train"], r"data\.part 1\.length")):
        with pytest.raises(MismatchError, match=rf"\n  {field} "):
            gs.attribute(model, made["test"], 0, train=other)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_stores_cut_into_shards_elsewhere(dtype: str, tmp_path: Path) -> None:
    x = clustered(300, 3, 40)
    whole = write_store(tmp_path / "whole", x, dtype=dtype, shard_rows=64)
    cuts = [(0, 7), (7, 200), (200, 300)]
    both = gs.concat([write_store(tmp_path / f"{low}", x[low:high], dtype=dtype, shard_rows=11) for low, high in cuts])
    queries = write_store(tmp_path / "test", clustered(20, 3, 40, seed=1), dtype=dtype)
    for kernel in KERNELS:
        theirs = gs.topk(whole, queries, 9, kernel)
        for engine in ("auto", "float32", *(["int8"] if integer_products_are_exact() else [])):
            ours = gs.topk(both, queries, 9, kernel, engine=engine, memory="3MB")
            np.testing.assert_array_equal(ours.indices, theirs.indices)
            np.testing.assert_array_equal(ours.similarity, theirs.similarity)
        a, b = (gs.gram(rows, None, kernel, out=tmp_path / f"{kernel}{i}.h5") for i, rows in enumerate([both, whole]))
        np.testing.assert_array_equal(a[:], b[:])


def test_reports_name_the_store_of_a_row(made: dict, tmp_path: Path) -> None:
    both = made["two stores"]
    part, row = both.part(HALF + 4)
    assert (part, row) == (made["second"], 4)
    assert both.part(HALF - 1) == (made["first"], HALF - 1)
    assert both.parts == (made["first"], made["second"])
    assert both.split == "first + second"
    page = gs.topk(both, made["test"], 3)
    shown = page.explanation(0).neighbours
    for neighbour, i in zip(shown, page.indices[0], strict=True):
        own, at = both.part(int(i))
        assert (neighbour.example.split, neighbour.example.row) == (own.split, at)
    listed = [value for name, value in page.page().provenance if name == "training store"]
    assert listed == [f"{made[s].path} · {s}, {n} rows" for s, n in (("first", HALF), ("second", N - HALF))]
    page.save_html(tmp_path / "page.html")
    flagged = gs.forensics(made["train"], both, votes=1).as_dict()["flagged"]
    assert {"store": str(made["second"].path), "row": 4} in flagged
    assert len(flagged) == len({tuple(query.values()) for query in flagged})


def test_splits_of_one_name_are_told_apart(tmp_path: Path) -> None:
    stores = [write_store(tmp_path / name / "train", clustered(4, 2, 16, seed=i)) for i, name in enumerate("ab")]
    result = gs.topk(gs.concat(stores), stores[1], 1)
    assert result.explanation(2).neighbours[0].example.split == f"train of {stores[1].path}"


def test_what_one_store_does_not_know_stays_unknown(tmp_path: Path) -> None:
    projects = {"first": make_project(show=gs.text(lambda x: f"x = {x[0]}")), "second": make_project(poisoned=None)}
    first, second = (
        gs.featurize(project, split=split, out=tmp_path / split, proj_dim=64) for split, project in projects.items()
    )
    both = gs.concat([first, second])
    assert first.poisoned is not None
    assert (both.poisoned, both.schema.preview) == (None, ())
    assert both.card()["poisoned"] == "not known"
    np.testing.assert_array_equal(both.read(0, N)["sq_norm"], np.concatenate([first.sq_norms, second.sq_norms]))
    assert both.preview(3) == first.preview(3) is not None
    assert both.preview(HALF + 3) is None
    with pytest.raises(UsageError, match="it is not known which training examples are poisoned"):
        gs.forensics(both, second)
    assert gs.forensics(both, second, poisoned=range(HALF)).poisoned.sum() == HALF


def test_labels_and_logits_stay_unknown_by_row(tmp_path: Path) -> None:
    x, logits = clustered(8, 2, 16), np.arange(16.0).reshape(8, 2)
    known, unknown = (write_store(tmp_path / str(i), x, logits=v) for i, v in enumerate((logits, logits * np.nan)))
    assert gs.concat([known, unknown]).predicted.tolist() == [1] * 8 + [-1] * 8


def test_damage_is_found_where_it_is(tmp_path: Path) -> None:
    stores = [write_store(tmp_path / name, clustered(20, 2, 64, seed=i)) for i, name in enumerate("ab")]
    shard = stores[1].manifest.shards[0]
    file = stores[1].path / stores[1].manifest.file_of(0)
    content = bytearray(file.read_bytes())
    content[shard.offsets["features"]] ^= 1
    file.write_bytes(content)
    both = gs.concat(stores)
    for read in (
        lambda: both.read(10, 30),
        lambda: both.gather(np.array([3, 20]), both.schema.empty(2)),
        lambda: gs.topk(both, stores[0], 2),
        lambda: next(gs.gram(both)),
    ):
        with pytest.raises(CorruptError, match="row 0 does not match its digest") as error:
            read()
        assert error.value.where == file
    both.read(10, 30, check=False)
    both.read(0, 20)


def test_what_cannot_be_concatenated(made: dict, tmp_path: Path) -> None:
    other = gs.featurize(make_project(), split="second", out=tmp_path / "other", proj_dim=64)
    with pytest.raises(MismatchError, match=r"\n  projection\.K +96 +64"):
        gs.concat([made["first"], made["second"], other])
    names = [write_store(tmp_path / n, clustered(4, 2, 16), names=pair) for n, pair in (("a", "xy"), ("b", "xz"))]
    assert gs.concat(names).classes == ("x", "y")  # names are annotations, and the first ones are shown
    unfinished = write_store(tmp_path / "unfinished", clustered(64, 2, 16), n=100)
    with pytest.raises(UsageError, match="the store is unfinished"):
        gs.concat([unfinished])
    for nothing, got in (([], "none"), (["stores/a"], "str"), (names[0], "FeatureStore")):
        with pytest.raises(UsageError, match=rf"nothing to concatenate \(expected a list of stores, got {got}\)"):
            gs.concat(nothing)
    assert len(gs.concat(store for store in (names[0], names[0]))) == 8
    with pytest.raises(UsageError, match="rows out of range"):
        names[0].part(4)
