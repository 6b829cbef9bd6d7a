"""Every engine's bounds hold and its answers are the same; the compiled loops say what numpy and torch say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import clustered, dense_similarity, rows_of_every_kind, write_store

import gradstore as gs
from gradstore.arithmetic import chooser, matrix_unit
from gradstore.arithmetic.int8 import integer_product, integer_products_are_exact
from gradstore.arithmetic.int8_digits import add_integer_product, pair_products, round_rows
from gradstore.arithmetic.names import ENGINES
from gradstore.arithmetic.seven_bits import LeftRows
from gradstore.errors import UsageError
from gradstore.kernels.definitions import projected_kernel
from gradstore.kernels.feature_map import FeatureMap
from gradstore.native import library
from gradstore.search.bounds import bounds_int8, engines
from gradstore.search.bounds.bounds import Bounds
from gradstore.search.bounds.bounds_bfloat16 import LimbBounds, PackedQueries
from gradstore.search.bounds.bounds_float32 import Float32Bounds
from gradstore.search.bounds.bounds_int8 import IntegerBounds
from gradstore.search.exact_score import ExactScore, inner_products
from gradstore.search.query_batch import load_queries
from gradstore.search.request import Request
from gradstore.store.feature_store import FeatureStore

pytestmark = pytest.mark.numerical

LEVELS = (*library.levels(), "")
MEANS = {"float32": Float32Bounds, "int8": IntegerBounds, "bfloat16": LimbBounds}  # tests of cuda need a GPU
CPU_ENGINES = [name for name, means in MEANS.items() if means.refusal(1) is None]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    width=st.sampled_from([1, 7, 16, 31, 64, 129, 1000]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    exponent=st.sampled_from([-90, -10, 0, 10]),
    largest=st.sampled_from([63, 127]),
)
@pytest.mark.parametrize("simd", LEVELS)
def test_rounding_misses_no_more_than_it_says(
    simd: str, seed: int, width: int, dtype: torch.dtype, exponent: int, largest: int
) -> None:
    rng = np.random.default_rng(seed)
    room = torch.from_numpy(rows_of_every_kind(rng, 12, width + 3)).to(dtype)
    values, factors = room[:, 1 : width + 1], torch.full((12,), 2.0**exponent)
    values[3] = 0
    digits = torch.empty(2, 12, width, dtype=torch.int8)
    found = round_rows(values, factors, digits[0], digits[1], simd, largest=largest)
    exact = (values.float() * factors[:, None]).double()
    step = torch.from_numpy(found.step)[:, None]
    low = digits[1].double() * step / (2 * largest)
    kept = digits[0].double() * step + low
    assert int(digits.abs().max()) <= largest
    for bound, norm in ((found.missed, exact - kept), (found.low, low), (found.norm, kept)):
        assert (norm.norm(dim=1).numpy() <= bound).all()
    usable = exact.norm(dim=1).numpy() > 1e-12
    fine = 1e-4 * (127 / largest) ** 2 * width**0.5
    assert (found.missed[usable] <= fine * exact.abs().amax(dim=1).numpy()[usable]).all(), "and is fine"
    one = torch.empty(12, width, dtype=torch.int8)
    coarse = round_rows(values, factors, one, simd=simd, largest=largest)
    assert torch.equal(one, digits[0])
    assert ((exact - one.double() * step).norm(dim=1).numpy() <= coarse.missed).all()
    assert ((one.double() * step).norm(dim=1).numpy() <= coarse.norm).all()


@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_that_are_not_finite_are_seen(simd: str, bad: float, dtype: torch.dtype) -> None:
    values = torch.ones(3, 50, dtype=dtype)
    values[1, 37] = bad
    found = round_rows(values, torch.ones(3), *torch.empty(2, 3, 50, dtype=torch.int8), simd=simd)
    np.testing.assert_array_equal(np.isfinite(found.step), [True, False, True])
    np.testing.assert_array_equal(np.isfinite(found.norm), [True, False, True])


@pytest.mark.parametrize("simd", LEVELS)
def test_every_float16_is_read_as_it_is(simd: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[torch.isfinite(every)].contiguous()
    for part in finite.double().abs().log2().floor().unique().tolist():
        some = finite[finite.double().abs().log2().floor() == part][None]
        digits = torch.empty(2, 1, some.shape[1], dtype=torch.int8)
        step = round_rows(some, torch.ones(1), digits[0], digits[1], simd).step[0]
        error = (some.double() - (digits[0].double() + digits[1].double() / 254) * step).abs().max().item()
        assert error <= some.double().abs().max().item() * 2.0**-15


@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (3, 37), (50, 2048), (7, 15)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_inner_products_have_the_same_bits_at_every_level(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    (segments, K), width = shape, min(shape[1], 23)
    cut = -(-K // width)  # pieces of a segment, the last one padded
    queries = torch.zeros(segments, 9, cut * width)
    queries[..., :K] = torch.randn(segments, 9, K, generator=rng)
    pieces = queries.view(segments, 9, cut, width).transpose(1, 2).reshape(-1, 9, width)
    values, factors = torch.randn(3, segments, K, generator=rng).to(dtype), torch.rand(3, segments, generator=rng) + 0.5
    rows, places = np.array([0, 0, 2, 2, 2]), np.array([3, 0, 8, 3, 3])
    found = [inner_products(values, factors, pieces, rows, places, simd) for simd in LEVELS]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    vectors = (values.float() * factors[..., None]).double().numpy()
    exact = np.einsum("qsk,qsk->q", vectors[rows], queries[..., :K].double().numpy().transpose(1, 0, 2)[places])
    np.testing.assert_allclose(found[0], exact, rtol=0, atol=1e-13 * float(np.square(vectors).sum()))


@pytest.mark.parametrize("compiled", [True, False])
def test_integer_products_add_up(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setenv("GRADSTORE_SIMD", "none")
    rng = torch.Generator().manual_seed(0)
    queries, rows = (
        torch.randint(-63, 64, shape, generator=rng, dtype=torch.int8) for shape in ((2, 5, 700), (2, 33, 700))
    )
    queries[:, 0], rows[:, 0] = 63, 63
    steps = torch.rand(5, generator=rng), torch.rand(33, generator=rng)
    left, out = [LeftRows(part) for part in queries], torch.ones(5, 33)
    add_integer_product(left[0], steps[0], rows[0], steps[1], out)
    a, b, worth = queries.double(), rows.double(), torch.outer(steps[0].double(), steps[1].double())
    close = {"rtol": 1e-6, "atol": 1e-6 * 63**2 * 700}
    high, low = a[0] @ b[0].T, (a[1] @ b[0].T + a[0] @ b[1].T) / 126
    np.testing.assert_allclose(out.numpy(), (1 + high * worth).numpy(), **close)
    pairs = torch.tensor([4, 0, 1, 1]), torch.tensor([2, 2, 7, 32])
    for lower, expected in ((False, high), (True, low)):
        found = pair_products(left, steps[0], rows.unbind(), steps[1], pairs, lower=lower)
        np.testing.assert_allclose(found.numpy(), (expected * worth)[pairs].numpy(), **close)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(["float16", "float32", "int8"]),
    kernel=st.sampled_from(["proj-trntk", "proj-pntk", "proj-trntk0"]),
    K=st.sampled_from([1, 33, 300]),
    scale=st.sampled_from([1e-25, 1.0, 1e15]),
)
@pytest.mark.parametrize("engine", [*CPU_ENGINES, *(f"{name} refined" for name in CPU_ENGINES if name != "float32")])
def test_bounds_hold_for_every_pair(
    engine: str, seed: int, dtype: str, kernel: str, K: int, scale: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp("bounds")
    features = np.concatenate([rows_of_every_kind(rng, 40, 2 * K), clustered(10, 1, 2 * K, seed=seed)[:, 0]])
    features[~np.abs(features).any(axis=1)] = 1
    features = (features * scale).astype(np.float32).reshape(50, 2, K) + np.float32(1e-3 * scale)
    train = write_store(path / "a", features, dtype=dtype, shard_rows=20)
    queries = write_store(path / "b", features[::7], dtype=dtype)
    groups = load_queries(Request.checked(train, queries, 1, projected_kernel(kernel)))
    exact = dense_similarity(train, queries, kernel)
    bounds = MEANS[engine.split()[0]](train, groups)
    if engine == "bfloat16 refined":
        bounds.refine()
    least = -1e300 if engine == "int8 refined" else -np.inf  # which every pair may reach
    block = bounds.block(30)
    for start, stop in ((0, 30), (30, 50)):
        ((group, center, spread),) = block.bounds(start, stop, torch.full((8,), least, dtype=torch.float64))
        np.testing.assert_array_equal(group.members, np.arange(8))
        error = np.abs(center.numpy() - exact[:, start:stop])
        rounding = 1e-13 * np.abs(exact).max()  # of the reference
        assert (error <= spread.numpy() + rounding).all()
        if kernel != "proj-trntk0":
            most = {"bfloat16": 9e-3, "int8": 0.3}.get(engine, 2e-3)
            assert (spread < most * (1 + 40 * (dtype == "float16" and K == 1))).all(), "and are of use"


@pytest.mark.parametrize("kernel", ["proj-trntk", "proj-trntk0"])
@pytest.mark.skipif("int8" not in CPU_ENGINES, reason="no exact products of 8-bit integers here")
def test_bounds_hold_for_pairs_that_are_not_multiplied_to_the_end(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = write_store(tmp_path / "a", clustered(60, 6, 40))
    queries = write_store(tmp_path / "b", clustered(9, 6, 40, seed=1))
    (group,) = load_queries(Request.checked(train, queries, 1, projected_kernel(kernel)))
    exact = dense_similarity(train, queries, kernel)
    thresholds = torch.from_numpy(np.sort(exact, axis=1)[:, -3])
    seen: dict[bool, list[int]] = {False: [], True: []}

    def counted(*operands: Any, lower: bool) -> torch.Tensor:
        products = pair_products(*operands, lower=lower)
        seen[lower].append(len(products))
        return products

    monkeypatch.setattr(bounds_int8, "pair_products", counted)
    ((_, center, spread),) = IntegerBounds(train, [group]).block(60).bounds(0, 60, thresholds)
    assert min(seen[False]) >= 3 * 9
    assert max(seen[False]) < 9 * 60 / 3, "few of all pairs are multiplied to the end"
    assert 3 * 9 <= sum(seen[True]) / 6 <= max(seen[False]), "and few of these by both digits"
    size = np.abs(exact).max()
    error, best = np.abs(center.numpy() - exact), exact >= thresholds.numpy()[:, None]
    assert (error <= spread.numpy() + 1e-13 * size).all()
    assert (spread.numpy()[best] < 2e-3 * size).all(), "bounds of those are close"
    assert (spread.numpy() > 0.1 * size).any(), "and of others need not be"
    assert (center + spread < thresholds[:, None]).sum() > 9 * 30


@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize("c", range(6))
def test_values_that_are_not_finite_are_seen_in_every_class(engine: str, c: int, tmp_path: Path) -> None:
    """Where they are not in the norms, and most pairs are not multiplied to the end."""
    path, features = tmp_path / "a", clustered(60, 6, 40)
    store = write_store(path, features)
    with (path / store.manifest.file_of(0)).open("r+b") as file:
        file.seek(store.manifest.shards[0].offsets["features"] + 2 * (7 * 6 * 40 + 40 * c + 3))
        file.write(np.float16(np.nan).tobytes())
    train, queries = FeatureStore(path, verify=False), write_store(tmp_path / "b", features[:9])
    (group,) = load_queries(Request.checked(train, queries, 1, projected_kernel("proj-trntk")))
    thresholds = torch.full((9,), 0.95, dtype=torch.float64)
    ((_, center, _),) = MEANS[engine](train, [group]).block(60).bounds(0, 60, thresholds)
    finite = torch.isfinite(center).all(dim=0)
    assert torch.nonzero(~finite)[:, 0].tolist() == [7]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, FeatureStore]:
    path = tmp_path_factory.mktemp("engines")
    features = np.concatenate([clustered(200, 3, 90), clustered(30, 3, 90)])  # 30 of them twice
    logits = np.random.default_rng(1).standard_normal((20, 3))
    train = write_store(path / "train", features)
    return train, write_store(path / "test", clustered(20, 3, 90, seed=1), logits=logits)


@pytest.mark.parametrize(
    "what",
    [
        {},
        {"kernel": "proj-pntk"},
        {"kernel": "proj-trntk0"},
        {"classes": "predicted"},
        {"classes": "0 - 0.3 2", "kernel": "proj-trntk0"},
    ],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_every_engine_gives_the_same_bits(
    stores: tuple, what: dict, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = gs.topk(*stores, 9, engine="float32", **what)
    if not compiled:
        monkeypatch.setenv("GRADSTORE_SIMD", "none")
    for engine in (name for name in CPU_ENGINES if MEANS[name].refusal(1) is None):
        for memory in ("1GB", "2MB"):
            other = gs.topk(*stores, 9, engine=engine, memory=memory, **what)
            assert other.search.engine == engine
            np.testing.assert_array_equal(other.indices, first.indices)
            np.testing.assert_array_equal(other.similarity, first.similarity)


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_more_candidates_than_may_wait_change_nothing(
    engine: str, stores: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gs.topk(*stores, 9)
    monkeypatch.setattr("gradstore.search.best.pending_limit", lambda m, k: 1)
    other = gs.topk(*stores, 9, engine=engine, memory="2MB")
    np.testing.assert_array_equal(other.indices, expected.indices)
    np.testing.assert_array_equal(other.similarity, expected.similarity)


@pytest.mark.skipif("bfloat16" not in CPU_ENGINES, reason="this processor has no matrix unit")
def test_many_near_ties_are_told_apart_with_two_limbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((1, 2, 300)) + 0.02 * rng.standard_normal((600, 2, 300))).astype(np.float32)
    train, queries = write_store(tmp_path / "a", features), write_store(tmp_path / "b", features[:5])
    expected = gs.topk(train, queries, 3, engine="float32")
    monkeypatch.setattr("gradstore.search.best.pending_limit", lambda m, k: 50)
    monkeypatch.setattr("gradstore.search.bounds.bounds_bfloat16._BLOCK_BYTES", 40 * train.schema.row_bytes)
    seen = []
    monkeypatch.setattr(PackedQueries, "refined", lambda self, of=PackedQueries.refined: seen.append(1) or of(self))
    found = gs.topk(train, queries, 3, engine="bfloat16")
    assert seen == [1], "once, after the first of several blocks"
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.similarity, expected.similarity)


@pytest.mark.skipif("int8" not in CPU_ENGINES, reason="no exact products of 8-bit integers here")
def test_near_ties_are_told_apart_by_second_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    noise = rng.uniform(0, 0.2, (600, 1, 1)) * rng.standard_normal((600, 2, 300))
    features = (rng.standard_normal((1, 2, 300)) + noise).astype(np.float32)
    train, queries = write_store(tmp_path / "a", features), write_store(tmp_path / "b", features[:5])
    expected, scored = gs.topk(train, queries, 3, engine="float32"), []
    score = ExactScore.__call__
    monkeypatch.setattr(
        ExactScore, "__call__", lambda self, *pairs: scored.append(len(pairs[0])) or score(self, *pairs)
    )
    monkeypatch.setattr("gradstore.search.bounds.bounds_int8._BLOCK_BYTES", 40 * train.schema.row_bytes)
    found = gs.topk(train, queries, 3, engine="int8")
    assert sum(scored) < 5 * 600 / 3, "all of them are within what a first digit leaves open"
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.similarity, expected.similarity)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The names of what "auto" measures, however little work there is; the last one is found fastest."""
    seen: list[list[str]] = []

    def last(calls: Mapping[str, Callable[[], object]]) -> str:
        seen.append(list(calls))
        return seen[-1][-1]

    monkeypatch.setattr(engines, "_WORTH_MEASURING", 0)
    monkeypatch.setattr(chooser, "fastest", last)
    engines._fastest.cache_clear()
    yield seen
    engines._fastest.cache_clear()


def test_what_can_be_used_is_measured_and_the_fastest_is_taken(stores: tuple, measured: list[list[str]]) -> None:
    assert gs.topk(*stores, 2).search.engine == CPU_ENGINES[-1]
    assert measured == [CPU_ENGINES]


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_the_fastest_engine_is_one_of_them(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_WORTH_MEASURING", 0)
    train = write_store(tmp_path / "a", clustered(50, 2, 64), dtype=dtype)
    assert gs.topk(train, train, 2).search.engine in CPU_ENGINES


def test_the_matrix_unit_is_refused_where_there_is_none(
    stores: tuple, measured: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix_unit, "available", lambda: False)
    with pytest.raises(UsageError, match="--engine: this processor has no matrix unit"):
        gs.topk(*stores, 2, engine="bfloat16")
    gs.topk(*stores, 2)
    assert "bfloat16" not in measured[0]


@pytest.mark.skipif("bfloat16" not in CPU_ENGINES, reason="this processor has no matrix unit")
def test_where_packed_queries_do_not_fit_other_engines_are_used(stores: tuple, measured: list[list[str]]) -> None:
    assert gs.topk(*stores, 2).search.engine == "bfloat16"
    small = 30_000
    assert gs.topk(*stores, 2, memory=small).search.engine != "bfloat16"
    with pytest.raises(UsageError, match="too little memory"):
        gs.topk(*stores, 2, memory=small, engine="bfloat16")


def test_an_engine_that_reads_the_store_much_more_often_is_not_taken(
    stores: tuple, measured: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_as_many(
        train: FeatureStore, phis: list[FeatureMap], m: int, k: int, memory: int, means: type[Bounds]
    ) -> object:
        plan = plan_scan(train, phis, m, k, memory, means)
        return plan if means is Float32Bounds else dataclasses.replace(plan, batch=plan.batch // 2 - 1)

    plan_scan = engines.plan_scan
    monkeypatch.setattr(engines, "plan_scan", half_as_many)
    assert gs.topk(*stores, 2).search.engine == "float32"


def test_int8_needs_exact_products(stores: tuple, measured: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of torch only where nothing was compiled."""
    monkeypatch.setenv("GRADSTORE_SIMD", "none")
    monkeypatch.setattr("gradstore.arithmetic.int8.integer_products_are_exact", lambda: False)
    said = "--engine: torch's products of 8-bit integers are missing or overflow on this processor"
    with pytest.raises(UsageError, match=said):
        gs.topk(*stores, 2, engine="int8")
    gs.topk(*stores, 2)
    assert "int8" not in measured[0]


def test_an_unknown_engine_is_refused(stores: tuple) -> None:
    names = ", ".join(choice.name for choice in ENGINES)
    with pytest.raises(UsageError, match=f"--engine: unknown engine \\(expected one of {names}, got 'numpy'\\)"):
        gs.topk(*stores, 2, engine="numpy")


@pytest.mark.parametrize("width", [1, 2, 3, 15, 64, 300])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 9), (17, 1), (16, 40)])
def test_integer_products_of_every_shape_are_exact(width: int, sizes: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (size, width), generator=rng, dtype=torch.int8) for size in sizes)
    expected = a.long() @ b.T.long()
    assert torch.equal(integer_product(a, b.T).long(), expected)
    assert torch.equal(integer_product(a, b.T.contiguous()).long(), expected)


def test_long_sums_of_products_do_not_wrap_round() -> None:
    long = torch.full((2, 3 * 2**17 + 5), 127, dtype=torch.int8)
    assert integer_product(long, long.T).unique().tolist() == [127**2 * long.shape[1]]


def test_where_sums_would_not_fit_other_engines_are_used(
    stores: tuple, measured: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstore.search.bounds.bounds_int8.MAX_WIDTH", 89)
    gs.topk(*stores, 2)
    assert "int8" not in measured[0]
    with pytest.raises(UsageError, match=r"K is too large for sums of integers \(expected at most 89, got 90\)"):
        gs.topk(*stores, 2, engine="int8")


def test_products_that_saturate_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.int() @ b.int()).clamp(-(2**15), 2**15 - 1)

    integer_products_are_exact.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not integer_products_are_exact()
    integer_products_are_exact.cache_clear()


def test_a_store_of_one_feature(tmp_path: Path) -> None:
    features = np.array([3.0, -2, 1, 1e-3], np.float32).reshape(4, 1, 1)
    train = write_store(tmp_path / "t", features)
    for engine in CPU_ENGINES:
        found = gs.topk(train, train, 4, engine=engine, rows=[0])
        np.testing.assert_array_equal(found.indices[0], [0, 2, 3, 1])


def _uneven(rng: np.random.Generator, n: int, case: str) -> np.ndarray:
    """Features [n, 2, 300] whose combination of classes is tiny beside one of them."""
    values = rng.standard_normal((n, 2, 300)).astype(np.float32)
    if case == "one class":
        values[:, 1] *= 1e-22
    if case == "cancelling":  # but for entries where both are small
        values[:, :, 100:] *= 1e-24
        values[:, 1, :100] = values[:, 0, :100]
    return values


@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize(
    ("case", "weights"),
    [("one class", (0.0, 1.0)), ("weights", (1e-22, -1e-22)), ("weights", (1e22, -1e22)), ("cancelling", (1.0, -1.0))],
)
def test_answers_are_right_however_small_what_is_asked_about(
    case: str, weights: tuple[float, float], engine: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    train = write_store(tmp_path / "train", _uneven(rng, 200, case), dtype="float32")
    queries = write_store(tmp_path / "test", _uneven(rng, 20, case), dtype="float32")
    expected = dense_similarity(train, queries, "proj-trntk", weights)
    asked = {str(c): weight for c, weight in enumerate(weights) if weight}
    for k in (5, 150):
        found = gs.topk(train, queries, k, classes=asked, engine=engine)
        best = -np.sort(-expected, axis=1)[:, :k]
        np.testing.assert_allclose(found.similarity, best, atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(expected, found.indices, 1), best, atol=1e-5)
