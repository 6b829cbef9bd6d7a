"""Gram matrices of stores against dense float64 products, however they are cut; what cannot be computed is refused."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import clustered, dense_similarity, write_store
from torch_threads import torch_threads

import gradstore as gs
from gradstore.arithmetic import matrix_unit
from gradstore.arithmetic.bfloat16_limbs import error_bound
from gradstore.arithmetic.chooser import choose_arithmetic
from gradstore.arithmetic.float32 import Float32Operand
from gradstore.arithmetic.int8 import MOST_COLUMNS, STEPS, IntegerOperand, integer_products_are_exact
from gradstore.arithmetic.names import BFLOAT16X2
from gradstore.arithmetic.product import multiply
from gradstore.errors import CorruptError, MismatchError, NonFiniteError, UsageError
from gradstore.kernels.definitions import projected_kernel
from gradstore.kernels.gram import StoreTiles
from gradstore.kernels.gram_tiles import Grid, nothing, plan_grid
from gradstore.machine.threads import Workers
from gradstore.store.feature_store import FeatureStore

pytestmark = pytest.mark.numerical

KERNELS = ["proj-trntk", "proj-pntk", "proj-trntk0"]
needs_unit = pytest.mark.skipif(not matrix_unit.available(), reason="this processor has no matrix unit")
needs_int8 = pytest.mark.skipif(not integer_products_are_exact(), reason="no exact products of 8-bit integers here")
EVERY = ["float32", pytest.param(BFLOAT16X2.name, marks=needs_unit), pytest.param("int8", marks=needs_int8)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, FeatureStore]:
    path = tmp_path_factory.mktemp("stores")
    return write_store(path / "train", clustered(150, 3, 200)), write_store(
        path / "test", clustered(70, 3, 200, seed=1)
    )


def assemble(tiles: object, shape: tuple[int, int]) -> np.ndarray:
    """The matrix, NaN where no tile came; no value may come twice."""
    found = np.full(shape, np.nan)
    for tile in tiles:  # type: ignore[attr-defined]
        assert np.isnan(found[tile.start_a : tile.rows.stop, tile.start_b : tile.columns.stop]).all()
        found[tile.start_a : tile.rows.stop, tile.start_b : tile.columns.stop] = tile.values
    return found


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("memory", ["400KB", "1GB"])
def test_two_stores_give_the_dense_products(stores: tuple, kernel: str, memory: str, tmp_path: Path) -> None:
    train, test = stores
    expected = dense_similarity(test, train, kernel)
    scale = np.abs(expected).max()
    tiles = list(gs.gram(train, test, kernel, memory=memory))
    assert (len(tiles) > 1) == (memory == "400KB")
    np.testing.assert_allclose(assemble(tiles, expected.shape), expected, rtol=2e-6, atol=2e-6 * scale)
    written = gs.gram(train, test, kernel, out=tmp_path / "gram.h5", memory=memory)
    np.testing.assert_allclose(written[:], expected, rtol=2e-6, atol=2e-6 * scale)


def test_projected_kernels_by_hand(tmp_path: Path) -> None:
    """P g^c of two examples: (1, 0), (0, 2) and (1, 1), (1, 0).

    Eq. 8: (1 + 0) / (√(1 + 4) √(2 + 1)). Eq. 7, of the sums (1, 2) and (2, 1): 4 / (√5 √5).
    """
    store = write_store(tmp_path / "s", np.array([[[1.0, 0], [0, 2]], [[1, 1], [1, 0]]]))
    expected = {"proj-trntk": 1 / 15**0.5, "proj-pntk": 4 / 5, "proj-trntk0": 1.0}
    for kernel, value in expected.items():
        assert gs.gram(store, kernel=kernel, out=tmp_path / f"{kernel}.h5")[0, 1] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("memory", ["400KB", "1GB"])
def test_one_store_computes_the_upper_half_and_writes_both(
    stores: tuple, kernel: str, memory: str, tmp_path: Path
) -> None:
    train = stores[0]
    expected = dense_similarity(train, train, kernel)
    computed = assemble(gs.gram(train, kernel=kernel, memory=memory), expected.shape)
    upper = np.triu(np.ones(expected.shape, bool))
    assert not np.isnan(computed[upper]).any()
    if memory == "400KB":
        assert np.isnan(computed).mean() > 0.3, "most of the lower half is left out"
    whole = gs.gram(train, kernel=kernel, memory=memory, out=tmp_path / "gram.h5")[:]
    np.testing.assert_array_equal(whole, whole.T)
    np.testing.assert_allclose(whole, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())
    if kernel != "proj-trntk0":
        np.testing.assert_array_equal(np.diag(whole), 1.0)
    assert np.linalg.eigvalsh(whole.astype(np.float64)).min() > -1e-5 * np.abs(expected).max()


def test_a_store_given_twice_is_one_store(stores: tuple, tmp_path: Path) -> None:
    assert gs.gram(stores[0], gs.open(stores[0].path), out=tmp_path / "gram.h5").symmetric


@needs_int8
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_products_of_rounded_rows_stay_within_their_bound(dtype: str, kernel: str, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", np.random.default_rng(0).standard_normal((90, 3, 2000)), dtype=dtype)
    expected = dense_similarity(store, store, kernel)
    found = gs.gram(store, kernel=kernel, out=tmp_path / "gram.h5", arithmetic="int8")[:]
    norms = np.sqrt(np.diag(expected))
    error = (found - expected) / np.outer(norms, norms)
    np.fill_diagonal(error, 0)  # a square does not average its rounding out
    e = 4.5 / (STEPS * np.sqrt(12))  # rounding of a row whose peak is 4.5 standard deviations
    assert np.abs(error).max() < 6 * e * np.sqrt(2 / (2000 * (1 if kernel == "proj-pntk" else 3)))


@needs_unit
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("peak", [1.0, 3e4])
def test_products_in_limbs_stay_within_their_bound(dtype: str, kernel: str, peak: float, tmp_path: Path) -> None:
    """Also where a row is mostly one value, and where every class of every row has a scale of its own."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((90, 3, 700)) * 2.0 ** rng.integers(-12, 12, (90, 3, 1))
    features[::7, 1, 5] *= peak
    store = write_store(tmp_path / "store", features, dtype=dtype)
    written = gs.gram(store, kernel=kernel, out=tmp_path / "gram.h5", arithmetic=BFLOAT16X2.name)
    assert written.attributes["arithmetic"] == BFLOAT16X2.name
    expected = dense_similarity(store, store, kernel)
    values = store.features[:].astype(np.float64)
    values = np.abs(values.sum(1) if kernel == "proj-pntk" else values.reshape(90, -1))
    sizes = values @ values.T
    if kernel != "proj-trntk0":
        norms = np.linalg.norm(values, axis=1)
        sizes /= np.outer(norms, norms)
    error = np.abs(written[:] - expected)
    exact = dtype != "float32" and kernel != "proj-pntk"
    # beside it: three roundings of factors and one of norms, for each class
    assert (error <= sizes * (error_bound(700, exact_values=exact) + 3 * 4 * 2.0**-24)).all()
    assert error.max() > 0


@needs_int8
@given(
    values=st.lists(st.integers(-127, 127), min_size=4, max_size=40),
    pieces=st.integers(1, 3),
    exponent=st.integers(-20, 20),
)
@settings(deadline=None, max_examples=60)
def test_int8_products_of_8_bit_rows_are_exact(values: list[int], pieces: int, exponent: int) -> None:
    rows = np.array([values, values[::-1]], np.int64)
    rows[:, 0] = 127  # the peak, so that a unit is one
    rows = np.stack([np.roll(rows, i, 1) for i in range(pieces)], 1)
    phi = torch.from_numpy(rows).float() * 2.0**exponent
    operand = IntegerOperand.empty(2, pieces, phi.shape[2], normalised=False)
    operand.fill(0, phi, torch.ones(2, pieces, dtype=torch.float64), range(2))
    np.testing.assert_array_equal(operand.values.numpy(), rows.reshape(2, -1))
    expected = rows.reshape(2, -1) @ rows.reshape(2, -1).T * 4.0**exponent
    np.testing.assert_allclose(multiply([operand], operand), expected, rtol=5e-7)


@needs_int8
@pytest.mark.parametrize("shape", [(40, 1, 1), (40, 3, 1), (6, 1, MOST_COLUMNS + 1)])
def test_int8_products_of_one_column(shape: tuple[int, int, int], tmp_path: Path) -> None:
    """Torch 2.13 multiplies int8 matrices of one column wrongly; such pieces are also what long rows may end with."""
    store = write_store(tmp_path / "store", np.random.default_rng(0).uniform(-1, 1, shape), dtype="float32")
    found = gs.gram(store, kernel="proj-trntk0", arithmetic="int8", out=tmp_path / "gram.h5")[:]
    expected = dense_similarity(store, store, "proj-trntk0")
    assert np.abs(found - expected).max() < 0.01 * np.diag(expected).max()


@pytest.mark.parametrize("arithmetic", EVERY[1:])
def test_the_bits_do_not_depend_on_how_the_work_is_cut(arithmetic: str, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", clustered(600, 3, 200))
    whole = gs.gram(store, out=tmp_path / "whole.h5", arithmetic=arithmetic)[:]
    with torch_threads(1):
        cut = gs.gram(store, out=tmp_path / "cut.h5", arithmetic=arithmetic, memory="900KB")[:]
    np.testing.assert_array_equal(cut, whole)
    twins = write_store(tmp_path / "twins", np.concatenate([clustered(20, 3, 200)] * 2))
    found = gs.gram(twins, out=tmp_path / "t.h5", arithmetic=arithmetic)[:]
    np.testing.assert_allclose(np.diag(found, 20), 1, atol=4e-6)


def test_without_a_matrix_unit_auto_is_float32(stores: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSTORE_SIMD", "plain")
    assert gs.gram(stores[0], out=tmp_path / "auto.h5").attributes["arithmetic"] == "float32"
    with pytest.raises(UsageError, match=r"--arithmetic: this processor has no matrix unit.*Use --arithmetic auto"):
        gs.gram(stores[0], arithmetic=BFLOAT16X2.name)
    monkeypatch.setenv("GRADSTORE_SIMD", "")
    best = BFLOAT16X2.name if matrix_unit.available() else "float32"
    assert gs.gram(stores[0], out=tmp_path / "best.h5").attributes["arithmetic"] == best


def test_where_8_bit_products_are_wrong_they_are_refused(
    stores: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstore.arithmetic.int8.integer_products_are_exact", lambda: False)
    said = r"--arithmetic: torch's products of 8-bit integers are missing or overflow on this processor \(got 'int8'\)"
    with pytest.raises(UsageError, match=rf"{said}\. Use --arithmetic float32"):
        gs.gram(stores[0], out=tmp_path / "gram.h5", arithmetic="int8")


@pytest.mark.parametrize("arithmetic", EVERY)
def test_rows_that_lie_apart_are_multiplied_as_those_that_lie_together(arithmetic: str) -> None:
    phi = torch.from_numpy(clustered(150, 2, 64))
    operand = choose_arithmetic(arithmetic)
    group = operand.empty(100, 2, 64, normalised=False)
    blocks = [group.part(0, 48), group.part(48, 100), operand.empty(50, 2, 64, normalised=False)]
    for start, block in zip((0, 48, 100), blocks, strict=True):
        block.fill(0, phi[start : start + len(block)].clone(), torch.ones(len(block), 2).double(), range(150))
    flat = phi.flatten(1).double().numpy()
    tolerance = {"rtol": 0, "atol": (3e-2 if arithmetic == "int8" else 1e-5) * np.abs(flat @ flat.T).max()}
    np.testing.assert_allclose(multiply(blocks[:2], blocks[2]), flat[:100] @ flat[100:].T, **tolerance)
    np.testing.assert_allclose(multiply(blocks, blocks[2]), flat @ flat[100:].T, **tolerance)
    own = multiply(blocks[:2], blocks[1])
    np.testing.assert_allclose(own, flat[:100] @ flat[48:100].T, **tolerance)
    np.testing.assert_array_equal(own[48:], own[48:].T)


def test_leaving_the_tiles_early_restores_the_threads(stores: tuple) -> None:
    before, threads = torch.get_num_threads(), threading.active_count()
    for _ in gs.gram(stores[0], memory="400KB"):
        break
    gc.collect()
    assert (torch.get_num_threads(), threading.active_count()) == (before, threads)


@needs_int8
def test_rounding_refuses_a_row_that_is_mostly_one_value(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((40, 1, 4000)).astype(np.float32)
    features[7, 0, 0] = 300
    store = write_store(tmp_path / "store", features)
    gs.gram(store, out=tmp_path / "float.h5")
    message = r"int8 loses too much of row 7 \(expected at most 3\.00% of its norm.*use another arithmetic"
    with pytest.raises(UsageError, match=message):
        gs.gram(store, out=tmp_path / "rounded.h5", arithmetic="int8")


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("arithmetic", EVERY[:2])
def test_a_cosine_neither_overflows_nor_vanishes(arithmetic: str, scale: float, tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((20, 2, 64)).astype(np.float32)
    found = []
    for name, factor in (("a", 1), ("b", scale)):
        store = write_store(tmp_path / name, features * np.float32(factor), dtype="float32")
        found.append(gs.gram(store, out=tmp_path / f"{name}.h5", arithmetic=arithmetic)[:])
    np.testing.assert_allclose(*found, atol=1e-6 if arithmetic == "float32" else 4e-6)


@given(
    n=st.integers(1, 90),
    m=st.one_of(st.none(), st.integers(1, 90)),
    block=st.sampled_from([16, 32, 48]),
    blocks=st.integers(1, 4),
    done=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=60)
def test_every_wanted_value_is_computed_once_from_the_right_rows(
    n: int, m: int | None, block: int, blocks: int, done: int
) -> None:
    grid = Grid(n, n if m is None else m, m is None, block, block * blocks)
    rng = np.random.default_rng(done)
    known = np.repeat(rng.random((n, -(-grid.m // 16))) < 0.7, 16, axis=1)[:, : grid.m]
    skipped: list[tuple[range, range]] = []

    def skip(rows: range, columns: range) -> bool:
        if known[rows.start : rows.stop, columns.start : columns.stop].all():
            skipped.append((rows, columns))
            return True
        return False

    def multiply(rows: list[range], columns: range) -> np.ndarray:
        return np.concatenate([np.add.outer(1000 * np.asarray(r), np.asarray(columns)) for r in rows])

    found = assemble(grid.tiles(lambda r: r, lambda r: r, multiply, skip), (n, grid.m))
    for rows, columns in skipped:
        found[rows.start : rows.stop, columns.start : columns.stop] = np.add.outer(
            1000 * np.asarray(rows), np.asarray(columns)
        )
    upper = np.triu(np.ones(found.shape, bool)) if grid.symmetric else np.ones(found.shape, bool)
    np.testing.assert_array_equal(found[upper], np.add.outer(1000 * np.arange(n), np.arange(grid.m))[upper])


@given(
    n=st.integers(1, 10**6),
    held=st.integers(4, 10**6),
    loading=st.integers(4, 10**6),
    memory=st.integers(10**4, 10**11),
)
def test_a_grid_keeps_its_budget(n: int, held: int, loading: int, memory: int) -> None:
    try:
        grid = plan_grid(n, n, symmetric=True, held=held, loading=loading, value=12, memory=memory)
    except UsageError:
        assert memory < 16 * (loading + 4 * held + 12 * 16)
        return
    assert grid.group * held + grid.block * (3 * held + loading) + grid.group * grid.block * 12 <= memory
    assert grid.group % grid.block == grid.block % 16 == 0


# -- bad input -------------------------------------------------------------------------------------------------------


def test_unusable_arguments_are_named(stores: tuple) -> None:
    train = stores[0]
    with pytest.raises(UsageError, match=r"--kernel: unknown kernel \(expected one of proj-trntk"):
        gs.gram(train, kernel="rbf")
    with pytest.raises(
        UsageError,
        match=r"--arithmetic: unknown arithmetic \(expected one of auto, float32, bfloat16x2, int8, got 'bf4'\)",
    ):
        gs.gram(train, arithmetic="bf4")
    with pytest.raises(UsageError, match=r"--memory: too little memory \(expected at least .* kB, got 1.0 kB\)"):
        gs.gram(train, memory="1KB")


def test_stores_that_cannot_be_compared_are_refused(stores: tuple, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", clustered(20, 3, 100))
    with pytest.raises(MismatchError, match=r"projection\.K"):
        gs.gram(stores[0], other)
    unfinished = write_store(tmp_path / "part", clustered(64, 3, 200), n=100)
    with pytest.raises(UsageError, match=r"unfinished \(expected 100 rows, got rows 64:100 missing\)"):
        gs.gram(stores[0], unfinished)


def test_a_sum_store_serves_pntk_only(tmp_path: Path) -> None:
    store = write_store(tmp_path / "sum", clustered(20, 1, 50), layout="sum", names=("a", "b"))
    with pytest.raises(UsageError, match="needs the features of each class"):
        gs.gram(store)
    expected = dense_similarity(store, store, "proj-pntk")
    found = gs.gram(store, kernel="proj-pntk", out=tmp_path / "gram.h5")[:]
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_row_of_norm_zero_is_named(tmp_path: Path) -> None:
    features = clustered(70, 2, 50)
    features[37] = 0
    store = write_store(tmp_path / "store", features)
    for kernel in ("proj-trntk", "proj-pntk"):
        with pytest.raises(NonFiniteError, match=f"the features of row 37 have no direction, so {kernel} is undefined"):
            list(gs.gram(store, kernel=kernel))
    tiles = list(gs.gram(store, kernel="proj-trntk0"))
    assert not tiles[0].values[37].any()


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", clustered(70, 2, 50))
    start = store.manifest.shards[0].offsets["features"]
    with next(store.path.glob("shard-00000*")).open("r+b") as file:
        file.seek(start + 5 * 2 * 50 * 2)
        file.write(b"\x01\x02\x03")
    with pytest.raises(CorruptError, match="row 5 does not match its digest"):
        list(gs.gram(gs.open(store.path)))


@pytest.mark.parametrize("memory", [400_000, 1 << 30])
def test_the_way_of_a_gpu_gives_the_same_matrix(stores: tuple, memory: int) -> None:
    train, test = stores
    for a, b in ((train, None), (test, train)):
        tiles = StoreTiles(a, b, projected_kernel("proj-trntk"), memory, "float32")
        expected = assemble(tiles.tiles(), (len(a), len(b or a)))
        found = assemble(tiles._tiles_there(Workers(), nothing), expected.shape)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_a_gpu_multiplies_in_float32_only() -> None:
    there = torch.device("cuda")
    assert choose_arithmetic("auto", there) is choose_arithmetic("float32", there) is Float32Operand
    with pytest.raises(UsageError, match="not an arithmetic of a GPU"):
        choose_arithmetic("int8", there)
