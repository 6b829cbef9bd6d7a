"""Exact top-k against a dense float64 reference, however the search is cut."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import clustered, dense_similarity, write_store

import gradstore as gs
import gradstore.search.scan
from gradstore.arithmetic.int8 import integer_products_are_exact
from gradstore.errors import CorruptError, MismatchError, NonFiniteError, UsageError
from gradstore.kernels.definitions import projected_kernel
from gradstore.kernels.feature_map import FeatureMap
from gradstore.search.bounds.bounds_float32 import Float32Bounds
from gradstore.search.bounds.scan_plan import ScanPlan, plan_scan
from gradstore.search.class_weights import parse_weights
from gradstore.search.query_batch import QueryGroup, load_queries
from gradstore.store.feature_store import FeatureStore

pytestmark = pytest.mark.numerical

KERNELS = ["proj-trntk", "proj-pntk", "proj-trntk0"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, FeatureStore]:
    path = tmp_path_factory.mktemp("stores")
    names = ("cat", "dog", "bird")
    logits = np.random.default_rng(1).standard_normal((30, 3))
    train = write_store(path / "train", clustered(300, 3, 400), names=names)
    return train, write_store(path / "test", clustered(30, 3, 400, seed=1), names=names, logits=logits)


def require_top(result: gs.topk, similarity: np.ndarray, k: int) -> None:  # type: ignore[valid-type]
    """The k largest of each row, with ties by ascending column."""
    order = np.lexsort((np.broadcast_to(np.arange(similarity.shape[1]), similarity.shape), -similarity), axis=1)[:, :k]
    np.testing.assert_array_equal(result.indices, order)
    expected = np.take_along_axis(similarity, order, 1)
    np.testing.assert_allclose(result.similarity, expected, rtol=1e-12, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("k", [1, 5, 300])
def test_neighbours_are_those_of_the_dense_reference(stores: tuple, kernel: str, k: int) -> None:
    train, queries = stores
    require_top(gs.topk(train, queries, k, kernel), dense_similarity(train, queries, kernel), k)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("K", [1, 7, 2049, 4500])
def test_every_dtype_and_width_of_piece(dtype: str, K: int, tmp_path: Path) -> None:
    train = write_store(tmp_path / "a", clustered(50, 2, K), dtype=dtype)
    queries = write_store(tmp_path / "b", clustered(6, 2, K, seed=1), dtype=dtype)
    for kernel in KERNELS:
        similarity = dense_similarity(train, queries, kernel)
        np.testing.assert_allclose(
            gs.topk(train, queries, 50, kernel).similarity,
            -np.sort(-similarity, axis=1),
            rtol=2e-6,
            atol=2e-6 * np.abs(similarity).max(),
        )


@pytest.mark.parametrize("kernel", KERNELS)
def test_bits_depend_on_nothing_but_the_stores(stores: tuple, kernel: str) -> None:
    train, queries = stores
    first = gs.topk(train, queries, 7, kernel)
    phi = FeatureMap.of(projected_kernel(kernel), train, 0)
    least = next(b for b in range(20_000, 2_000_000, 2_000) if _fits(train, phi, b))
    assert _planned(train, phi, least) != _planned(train, phi, 10**9)
    some = [11, 0, 29]
    cuts = [(least, "float32"), (3 * least, "float32"), (10**9, "auto")]
    if integer_products_are_exact():
        cuts += [(10**9, "int8"), (2 * least, "int8")]
    for memory, engine in cuts:
        other = gs.topk(train, queries, 7, kernel, rows=some, memory=memory, engine=engine)
        np.testing.assert_array_equal(other.indices, first.indices[some])
        np.testing.assert_array_equal(other.similarity, first.similarity[some])


def _planned(train: FeatureStore, phi: FeatureMap, memory: int) -> ScanPlan:
    return plan_scan(train, [phi], 30, 7, memory, Float32Bounds)


def _fits(train: FeatureStore, phi: FeatureMap, memory: int) -> bool:
    try:
        _planned(train, phi, memory)
    except UsageError:
        return False
    return True


def test_any_number_of_ties_at_the_boundary_goes_to_the_lowest_rows(tmp_path: Path) -> None:
    distinct = clustered(4, 2, 64)
    features = np.concatenate(
        [np.repeat(distinct[:1], 3000, axis=0), distinct[1:], np.repeat(distinct[:1], 200, axis=0)]
    )
    train = write_store(tmp_path / "train", features, shard_rows=500)
    result = gs.topk(train, write_store(tmp_path / "test", distinct), 8, memory="20MB")
    np.testing.assert_array_equal(result.indices[0], np.arange(8))
    assert len(set(result.similarity[0])) == 1
    assert result.similarity[0, 0] == pytest.approx(1, abs=1e-15)
    np.testing.assert_array_equal(result.indices[:, 0], [0, 3000, 3001, 3002])
    both = gs.topk(train, write_store(tmp_path / "t", distinct[1:2]), 3203)
    assert sorted(both.indices[0]) == list(range(3203)), "the same example twice is listed twice"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_near_ties_come_in_the_order_of_float64(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    seed, n, k = (data.draw(st.integers(1, high)) for high in (2**31, 60, 12))
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((1, 2, 300))
    features = base + 10.0 ** -rng.integers(1, 5, (n, 1, 1)) * rng.standard_normal((n, 2, 300))
    path = tmp_path_factory.mktemp("near")
    train = write_store(path / "a", features[rng.integers(0, n, n)].astype(np.float32), shard_rows=17)
    queries = write_store(path / "b", base.astype(np.float32))
    result = gs.topk(train, queries, min(k, n))
    similarity = dense_similarity(train, queries, "proj-trntk")
    np.testing.assert_allclose(result.similarity, -np.sort(-similarity, axis=1)[:, : min(k, n)], rtol=0, atol=1e-14)
    ties = np.diff(result.similarity[0]) == 0
    assert (np.diff(result.similarity[0]) <= 0).all()
    assert (np.diff(result.indices[0])[ties] > 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gradients_of_any_size(scale: float, tmp_path: Path) -> None:
    features = clustered(40, 2, 96)
    plain = gs.topk(write_store(tmp_path / "a", features), write_store(tmp_path / "b", features[:5]), 4)
    train = write_store(tmp_path / "c", features * np.float32(scale))
    scaled = gs.topk(train, write_store(tmp_path / "d", features[:5] * np.float32(scale)), 4)
    np.testing.assert_array_equal(scaled.indices, plain.indices)
    np.testing.assert_allclose(scaled.similarity, plain.similarity, rtol=1e-4)


@pytest.mark.parametrize(
    ("classes", "weights"),
    [
        ("cat - dog", (1, -1, 0)),
        ({"bird": 1}, (0, 0, 1)),
        ("0.5 cat + 2 bird", (0.5, 0, 2)),
        ("-dog", (0, -1, 0)),
        ({"cat": 0.1, "dog": 0.3, "bird": -0.7}, (0.1, 0.3, -0.7)),
    ],
)
@pytest.mark.parametrize("kernel", ["proj-trntk", "proj-trntk0"])
def test_weighted_classes(stores: tuple, classes: object, weights: tuple[float, ...], kernel: str) -> None:
    train, queries = stores
    require_top(
        gs.topk(train, queries, 6, kernel, classes=classes), dense_similarity(train, queries, kernel, weights), 6
    )


def test_predicted_class_of_each_query(stores: tuple) -> None:
    train, queries = stores
    result = gs.topk(train, queries, 6, classes="predicted")
    predicted = queries.logits.argmax(axis=1)
    assert set(predicted) == {0, 1, 2}
    each = [dense_similarity(train, queries, "proj-trntk", np.eye(3)[c]) for c in range(3)]
    similarity = np.stack([each[c][q] for q, c in enumerate(predicted)])
    require_top(result, similarity, 6)


def test_equal_weights_are_the_pntk(stores: tuple) -> None:
    train, queries = stores
    everything = gs.topk(train, queries, 6, classes={"cat": 1, "dog": 1, "bird": 1})
    np.testing.assert_array_equal(everything.similarity, gs.topk(train, queries, 6, "proj-pntk").similarity)


def test_combinations_as_text() -> None:
    assert parse_weights("cat - dog") == {"cat": 1, "dog": -1}
    assert parse_weights(' - 2 * cat + 0.5 "polar bear"') == {"cat": -2, "polar bear": 0.5}
    assert parse_weights("cat + cat") == {"cat": 2}
    assert parse_weights('3 - "4"') == {"3": 1, "4": -1}
    for text in ("", "cat dog", "cat -", "+", "cat - - dog"):
        with pytest.raises(UsageError, match="not a combination of classes"):
            parse_weights(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 301}, "-k: k does not fit the training store (expected 1 to 300, got 301)."),
        ({"k": 0}, "-k: k does not fit the training store (expected 1 to 300, got 0)."),
        ({"k": 2.0}, "-k: k does not fit the training store (expected 1 to 300, got 2.0)."),
        ({"k": True}, "-k: k does not fit the training store (expected 1 to 300, got True)."),
        ({"rows": [30]}, "--rows: no such query row (expected 0 to 29, got 30)."),
        ({"rows": [-1]}, "--rows: no such query row (expected 0 to 29, got -1)."),
        (
            {"kernel": "rbf"},
            "--kernel: unknown kernel (expected one of proj-trntk, proj-pntk, proj-trntk0, got 'rbf').",
        ),
        ({"classes": "cat - fish"}, "--classes: no such class (expected one of cat, dog, bird, got 'fish')."),
        ({"classes": "cat - cat"}, "--classes: the weights of the classes are unusable"),
        (
            {"engine": "abacus"},
            "--engine: unknown engine (expected one of auto, float32, int8, bfloat16, cuda, got 'abacus').",
        ),
        ({"memory": 5000}, "--memory: too little memory (expected at least "),
    ],
)
def test_bad_requests_say_what_would_be_right(stores: tuple, arguments: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        gs.topk(*stores, **arguments)
    assert str(caught.value).startswith(message)


def test_no_queries_give_an_empty_result(stores: tuple) -> None:
    result = gs.topk(*stores, rows=[], k=3)
    assert result.indices.shape == result.similarity.shape == (0, 3)
    assert result.records() == []


def test_queries_in_any_order_and_repeated(stores: tuple) -> None:
    train, queries = stores
    everything, some = gs.topk(train, queries, 4), gs.topk(train, queries, 4, rows=[7, 2, 7, 29])
    np.testing.assert_array_equal(some.indices, everything.indices[[7, 2, 7, 29]])
    np.testing.assert_array_equal(some.similarity, everything.similarity[[7, 2, 7, 29]])


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_with_nan_are_named_and_never_dropped(kernel: str, tmp_path: Path) -> None:
    features = clustered(200, 2, 32)
    queries = write_store(tmp_path / "q", features[:3])
    features[123, 1, 5] = np.nan
    train = write_store(tmp_path / "t", features)
    with pytest.raises(NonFiniteError, match="row 123 "):
        gs.topk(train, queries, 3, kernel)
    with pytest.raises(NonFiniteError, match="row 123 "):
        gs.topk(queries, train, 3, kernel)


def test_a_combination_that_cancels_has_no_direction(tmp_path: Path) -> None:
    features = clustered(20, 2, 32)
    queries = write_store(tmp_path / "q", features[:3])
    features[7, 1] = features[7, 0]
    train = write_store(tmp_path / "t", features)
    with pytest.raises(
        NonFiniteError,
        match=r"row 7 have no direction, .* \(expected a finite norm above zero, got norm 0.0\)",
    ):
        gs.topk(train, queries, 3, classes="0 - 1")
    assert 7 in gs.topk(train, queries, 20, "proj-trntk0", classes="0 - 1").indices[0]


def test_damage_is_found_and_the_row_named(tmp_path: Path) -> None:
    features = clustered(100, 2, 64)
    train = write_store(tmp_path / "t", features, shard_rows=50)
    shard = train.manifest.shards[1]
    with (tmp_path / "t" / train.manifest.file_of(1)).open("r+b") as file:
        file.seek(shard.offsets["features"] + 9 * 2 * 64 * 2)
        file.write(b"\x01\x02\x03\x04")
    with pytest.raises(CorruptError, match="row 59 does not match its digest"):
        gs.topk(train, write_store(tmp_path / "q", features[:3]), 3)


def test_stores_of_different_projections_are_refused(stores: tuple, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", clustered(5, 3, 401), names=("cat", "dog", "bird"))
    with pytest.raises(MismatchError, match=r"projection\.K"):
        gs.topk(stores[0], other)


def test_unfinished_stores_are_refused(tmp_path: Path) -> None:
    train = write_store(tmp_path / "t", clustered(64, 2, 8), n=100)
    with pytest.raises(UsageError, match="rows 64:100 missing"):
        gs.topk(train, write_store(tmp_path / "q", clustered(3, 2, 8)), 3)


def test_layout_sum_serves_only_the_sum(tmp_path: Path) -> None:
    features = clustered(30, 1, 50)
    train = write_store(tmp_path / "t", features, layout="sum", names=("a", "b"))
    queries = write_store(tmp_path / "q", features[:4], layout="sum", names=("a", "b"))
    require_top(gs.topk(train, queries, 5, "proj-pntk"), dense_similarity(train, queries, "proj-pntk"), 5)
    with pytest.raises(UsageError, match="this store holds only"):
        gs.topk(train, queries, 5)
    with pytest.raises(UsageError, match="a combination of classes needs the features of each"):
        gs.topk(train, queries, 5, classes="a - b")


def test_queries_of_one_pass_are_gone_before_the_next_are_read(stores: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    train, queries = stores
    phi = FeatureMap.of(projected_kernel("proj-trntk"), train, 0)
    least = next(b for b in range(20_000, 2_000_000, 2_000) if _fits(train, phi, b))
    assert _planned(train, phi, least).batch < 15
    seen: list[weakref.ref[object]] = []

    def watched(*arguments: Any) -> list[QueryGroup]:
        assert all(group() is None for group in seen)
        groups = load_queries(*arguments)
        seen.extend(weakref.ref(group) for group in groups)
        return groups

    monkeypatch.setattr(gradstore.search.scan, "load_queries", watched)
    gs.topk(train, queries, 7, memory=least, engine="float32")
    assert len(seen) > 1
