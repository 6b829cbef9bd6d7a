"""The certified index: bounds that hold, answers that are those of a scan, a cache that is not believed blindly."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import clustered, dense_similarity, rows_of_every_kind, write_store

import gradstore as gs
from gradstore.arithmetic.int8 import integer_product
from gradstore.errors import NonFiniteError, NoSpaceError, UsageError
from gradstore.kernels.definitions import projected_kernel
from gradstore.kernels.feature_map import FeatureMap
from gradstore.search.index.basis import fit_basis
from gradstore.search.index.index_file import load_index
from gradstore.search.index.sketch import SketchBlock, sketch_queries
from gradstore.search.index.store_index import index_path, open_index
from gradstore.search.query_batch import load_queries
from gradstore.search.request import Request
from gradstore.search.session import Session
from gradstore.store.feature_store import FeatureStore

pytestmark = pytest.mark.numerical

KERNELS = ["proj-trntk", "proj-pntk", "proj-trntk0"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, FeatureStore]:
    path = tmp_path_factory.mktemp("stores")
    train = write_store(path / "train", clustered(1500, 2, 300, noise=0.02), shard_rows=400)
    return train, write_store(path / "test", clustered(40, 2, 300, seed=1, noise=0.02))


def require_same(a: gs.topk, b: gs.topk) -> None:  # type: ignore[valid-type]
    np.testing.assert_array_equal(a.indices, b.indices)
    np.testing.assert_array_equal(a.similarity, b.similarity)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("k", [1, 7])
def test_certified_answers_are_those_of_a_scan_and_read_few_rows(stores: tuple, kernel: str, k: int) -> None:
    train, queries = stores
    session = Session(train, kernel)
    found = session.topk(queries, k)
    require_same(found, gs.topk(train, queries, k, kernel))
    assert found.search.mode == "certified"
    if kernel == "proj-trntk":
        one = session.topk(queries, k, rows=[5])
        assert one.search.note == ""
        assert one.search.rows_read < 150


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    noise=st.sampled_from([0.0, 1e-4, 0.1, 3.0, None]),
    dtype=st.sampled_from(["float16", "float32", "int8"]),
    kernel=st.sampled_from(KERNELS[:2]),
    size=st.integers(1, 60),
)
def test_bounds_hold_for_every_pair(
    seed: int, noise: float | None, dtype: str, kernel: str, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("bounds")
    if noise is None:
        features = rows_of_every_kind(np.random.default_rng(seed), 89, 300).reshape(-1, 2, 150) + np.float32(1e-9)
    else:
        features = np.concatenate([clustered(80, 2, 150, seed=seed + i, noise=noise) for i in (0, 1)])
    train = write_store(path / "a", features[:80], dtype=dtype)
    queries = write_store(path / "b", features[80:89], dtype=dtype)
    request = Request.checked(train, queries, 1, projected_kernel(kernel))
    basis = fit_basis(train, request.phis[0], np.arange(0, 80, 2), size)
    rows = SketchBlock(train, request.phis[0], basis, 80).sketch(0, 80)
    estimate, spread = sketch_queries(basis, load_queries(request)[0]).bounds(rows)
    error = np.abs(dense_similarity(train, queries, kernel) - estimate.numpy())
    assert (error <= spread.numpy()).all()


def test_a_basis_of_the_whole_space_leaves_little(tmp_path: Path) -> None:
    train = write_store(tmp_path / "a", clustered(60, 1, 40, noise=0.5), dtype="float32")
    phi = FeatureMap(projected_kernel("proj-trntk"), 1, 40)
    basis = fit_basis(train, phi, np.arange(60), 40)
    rows = SketchBlock(train, phi, basis, 60).sketch(0, 60)
    assert basis.size == 40
    assert rows.rest.max() < 0.03  # of a unit feature; sqrt(3e-4) is what the bound allows for float32
    assert rows.error.max() < 0.02


def test_products_in_float32_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.integers(-127, 128, shape).astype(np.int8)) for shape in ((5, 2500), (2500, 17)))
    a[0], b[:, 0] = 127, 127
    monkeypatch.setattr("gradstore.arithmetic.int8.integer_products_are_exact", lambda: False)
    assert torch.equal(integer_product(a, b).long(), a.long() @ b.long())


def test_a_weak_bound_says_so_and_falls_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    train = write_store(tmp_path / "a", rng.standard_normal((300, 2, 400)).astype(np.float32))
    queries = write_store(tmp_path / "b", rng.standard_normal((5, 2, 400)).astype(np.float32))
    found = gs.topk(train, queries, 3, mode="certified")
    require_same(found, gs.topk(train, queries, 3))
    assert found.search.note == "the index proves too little for 5 of 5 queries; a scan answered these"
    assert found.search.rows_read >= 300


def test_so_many_queries_that_a_scan_is_faster_are_left_to_it(tmp_path: Path) -> None:
    features = clustered(300, 2, 64)
    train, queries = write_store(tmp_path / "a", features), write_store(tmp_path / "b", features[:65])
    session = gs.Session(train)
    found = session.topk(queries, 3)
    require_same(found, gs.topk(train, queries, 3))
    assert found.search.note == "a scan is faster than 65 queries through the index, and answered them"
    assert found.search.rows_read == 300
    assert session.topk(queries, 3, rows=range(64)).search.note == "", "fewer are not"


def test_duplicates_are_all_listed_in_order(tmp_path: Path) -> None:
    features = np.concatenate([np.repeat(clustered(1, 2, 64), 100, axis=0), clustered(900, 2, 64, seed=3)])
    train = write_store(tmp_path / "a", features, shard_rows=500)
    found = gs.topk(train, write_store(tmp_path / "b", features[:1]), 30, mode="certified")
    np.testing.assert_array_equal(found.indices[0], np.arange(30))


@pytest.mark.parametrize("n", [1, 2, 8])
def test_recall_of_a_few_rows_is_a_number(n: int, tmp_path: Path) -> None:
    """All of them were fitted, so that none is held out; the mean of no recall was NaN."""
    train = write_store(tmp_path / "train", clustered(n, 2, 60))
    found = gs.topk(train, train, 1, mode="approx")
    assert found.search.recall == 1
    assert found.indices[:, 0].tolist() == list(range(n))


def test_approximate_search_reports_the_recall_it_measured(stores: tuple) -> None:
    train, queries = stores
    session = Session(train)
    found = session.topk(queries, 10, mode="approx")
    truth = gs.topk(train, queries, 10)
    actual = np.mean([np.isin(a, b).mean() for a, b in zip(truth.indices, found.indices, strict=True)])
    assert found.search.mode == "approx"
    assert found.search.rows_read < 40 * 100
    assert 0.9 < found.search.recall <= 1
    assert abs(found.search.recall - actual) < 0.1
    assert open_index(train).recall == {"100": found.search.recall}, "kept in the index"
    everything = session.topk(queries, 10, mode="approx", candidates=len(train))
    require_same(everything, truth)
    assert everything.search.recall == 1


def test_an_index_is_opened_again_without_reading_the_store(stores: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = stores
    open_index(train)
    monkeypatch.setattr(FeatureStore, "read", lambda *a, **b: pytest.fail("read a row"))
    assert open_index(FeatureStore(train.path)).event == "opened"


@pytest.fixture
def small(tmp_path: Path) -> FeatureStore:
    store = write_store(tmp_path / "train", clustered(200, 2, 64), shard_rows=50)
    open_index(store)
    return store


def test_a_damaged_index_is_built_again(small: FeatureStore) -> None:
    path = index_path(small, projected_kernel("proj-trntk"))
    good = path.read_bytes()
    for at in np.linspace(0, len(good) - 1, 60).astype(int):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        assert isinstance(load_index(path, small, 1 << 30), str), at
    for size in (0, 7, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        assert load_index(path, small, 1 << 30) == "it is damaged"
    assert open_index(small).event == "built: it is damaged"
    assert open_index(small).event == "opened"


def test_an_index_of_another_store_is_never_trusted(small: FeatureStore, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", clustered(200, 2, 64, seed=9), shard_rows=50)
    wider = write_store(tmp_path / "wider", clustered(200, 2, 65), shard_rows=50)
    for store, why in ((other, "the store has changed"), (wider, "it belongs to another store")):
        shutil.copy(index_path(small, projected_kernel("proj-trntk")), store.path)
        assert open_index(store).event == f"built: {why}"


def test_a_link_is_not_followed(small: FeatureStore, tmp_path: Path) -> None:
    path = index_path(small, projected_kernel("proj-trntk"))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert open_index(small).event == "built: it is not a regular file"
    assert not path.is_symlink()


def test_an_index_is_extended_when_the_store_has_grown(small: FeatureStore, tmp_path: Path) -> None:
    features = np.concatenate([clustered(200, 2, 64), clustered(130, 2, 64, seed=5)])
    grown = write_store(tmp_path / "grown", features, shard_rows=50)
    shutil.copy(index_path(small, projected_kernel("proj-trntk")), grown.path)
    index = open_index(grown)
    assert index.event == "extended by 130 rows"
    assert len(index.sketch) == 330
    assert open_index(grown).event == "opened"
    queries = write_store(tmp_path / "q", clustered(8, 2, 64, seed=6))
    require_same(gs.topk(grown, queries, 5, mode="certified"), gs.topk(grown, queries, 5))
    much = write_store(tmp_path / "much", np.concatenate([features, clustered(800, 2, 64, seed=7)]), shard_rows=50)
    shutil.copy(index_path(small, projected_kernel("proj-trntk")), much.path)
    assert open_index(much).event == "built: the store has outgrown it"


def test_a_store_that_cannot_be_written_is_one_line(
    small: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("gradstore.store.files.disk.Disk._pwrite", refuse)
    with pytest.raises(UsageError, match=r"the index cannot be saved .*Permission denied.* Use mode exact"):
        open_index(small, rebuild=True)
    assert not list(small.path.glob("*.tmp"))
    monkeypatch.undo()
    monkeypatch.setattr("gradstore.store.files.disk.Disk.free_bytes", lambda *args: 100)
    with pytest.raises(NoSpaceError, match="the index does not fit the disk"):
        open_index(small, rebuild=True)


def test_kernels_with_one_feature_map_share_an_index(small: FeatureStore) -> None:
    assert open_index(small, "proj-trntk0").event == "opened"
    assert open_index(small, "proj-pntk").event == "built: there is none yet"


def test_a_size_is_kept_or_built(small: FeatureStore) -> None:
    assert open_index(small, size=10).event == "built: another size was asked for"
    assert open_index(small).basis.size == 10
    assert open_index(small, size=10).event == "opened"
    assert open_index(small, rebuild=True).basis.size > 10


def test_rows_with_nan_are_named(tmp_path: Path) -> None:
    features = clustered(120, 2, 32)
    features[77, 0, 3] = np.nan
    with pytest.raises(NonFiniteError, match="row 77 "):
        open_index(write_store(tmp_path / "a", features))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "psychic"}, "--mode: unknown mode (expected one of exact, certified, approx, got 'psychic')."),
        (
            {"mode": "certified", "classes": "0"},
            "--mode: an index serves no class weights (expected exact, got certified).",
        ),
        ({"mode": "certified", "k": 1501}, "-k: k does not fit the training store (expected 1 to 1500, got 1501)."),
        ({"mode": "certified", "memory": 2000}, "--memory: too little memory (expected at least "),
    ],
)
def test_bad_requests_say_what_would_be_right(stores: tuple, arguments: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        gs.topk(*stores, **arguments)
    assert str(caught.value).startswith(message)


def test_bad_sessions_say_what_would_be_right(stores: tuple) -> None:
    with pytest.raises(UsageError, match=r"--size: unusable number of directions \(expected 1 to 512, got 513\)"):
        Session(stores[0], size=513)
    with pytest.raises(UsageError, match=r"--candidates: too few candidates \(expected at least k = 5, got 4\)"):
        Session(stores[0]).topk(stores[1], 5, mode="approx", candidates=4)
    with pytest.raises(UsageError, match=r"--mode: unknown mode \(expected certified or approx"):
        Session(stores[0]).topk(stores[1], 5, mode="exact")


def test_no_queries_and_unfinished_stores(stores: tuple, tmp_path: Path) -> None:
    train, queries = stores
    for mode in ("certified", "approx"):
        assert gs.topk(train, queries, 3, rows=[], mode=mode).indices.shape == (0, 3)
    with pytest.raises(UsageError, match="rows 64:100 missing"):
        open_index(write_store(tmp_path / "t", clustered(64, 2, 8), n=100))
