"""`store.features` against a plain array: every index gives the same values, shape or kind of error."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import basic_indices
from synthetic import clustered, write_store

import gradstore as gs
from gradstore.store.features import Features

N, C, K = SHAPE = (23, 3, 12)


@pytest.fixture(scope="module", params=["float16", "int8"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Features, np.ndarray]:
    """The features of a store in several shards, and the same restored from its columns by NumPy."""
    path = tmp_path_factory.mktemp("features") / "store"
    store = write_store(path, clustered(N, C, K), shard_rows=5, dtype=request.param)
    columns = store.read(0, N)
    return store.features, columns["features"].astype(np.float32) * columns["scale"][..., None]


def outcome(array: Any, key: Any) -> Any:
    try:
        return np.asarray(array[key])
    except (IndexError, TypeError, ValueError) as error:
        return type(error)


def same(features: Features, plain: np.ndarray, key: Any) -> bool:
    ours, theirs = outcome(features, key), outcome(plain, key)
    if isinstance(theirs, type):
        return ours is theirs
    return isinstance(ours, np.ndarray) and ours.dtype == np.float32 and np.array_equal(ours, theirs)


def one_axis(size: int) -> st.SearchStrategy[Any]:
    """What may stand for an axis, now and then out of its range."""
    index = st.integers(-size, size - 1) | st.integers(-size - 1, size)
    lists = st.lists(st.integers(-size, size - 1), max_size=4) | st.lists(index, max_size=3)
    slices = st.builds(
        slice, *[st.none() | st.integers(-size - 2, size + 2)] * 2, st.sampled_from([None, 1, 2, -1, -3])
    )
    mask = st.lists(st.booleans(), min_size=size, max_size=size)
    return st.one_of(
        index,
        index.map(np.int16),
        slices,
        lists,
        lists.map(lambda rows: np.array(rows, np.int32)),
        st.lists(st.integers(0, size - 1), min_size=4, max_size=4).map(
            lambda rows: np.array(rows, np.uint8).reshape(2, 2)
        ),
        mask,
        mask.map(np.array),
    )


@st.composite
def mixtures(draw: st.DrawFn) -> Any:
    """Some axes' indices, with `...` and new axes between them."""
    parts: list[Any] = [draw(one_axis(size)) for size in SHAPE[: draw(st.integers(1, 3))]]
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), None)
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), Ellipsis)
    return tuple(parts) if len(parts) > 1 or draw(st.booleans()) else parts[0]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(key=basic_indices(SHAPE, min_dims=0, allow_newaxis=True, allow_ellipsis=True))
def test_every_basic_index(both: tuple, key: Any) -> None:
    assert same(*both, key)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(key=mixtures())
def test_every_mixture_of_integers_slices_arrays_and_masks(both: tuple, key: Any) -> None:
    assert same(*both, key), key


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), axes=st.integers(2, 3))
def test_masks_of_several_axes(both: tuple, data: st.DataObject, axes: int) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    mask = rng.random(SHAPE[:axes]) < data.draw(st.sampled_from([0, 0.1, 0.9]))
    key = data.draw(st.sampled_from([mask, (mask, ...), (..., mask) if axes == 3 else (mask, slice(0, 4))]))
    assert same(*both, key)
    assert same(*both, rng.random((N, C + 1)) < 0.5)
    assert same(*both, (slice(2, 9), rng.random((C, K)) < 0.5))


def test_tensors_and_numbers_of_other_kinds(both: tuple) -> None:
    features, plain = both
    mask = torch.arange(N) % 3 == 0
    for key, theirs in (
        (torch.tensor([4, -1, 4]), [4, -1, 4]),
        (mask, mask.numpy()),
        (torch.tensor(3), 3),
        ((np.array(3), slice(None), torch.tensor([2, 0])), (3, slice(None), [2, 0])),
        (range(2, 20, 7), [2, 9, 16]),
    ):
        np.testing.assert_array_equal(features[key], plain[theirs], strict=True)
    assert isinstance(features[1, 2, 3], np.float32)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (N, "index 23 is out of bounds for axis 0 with size 23"),
        (-N - 1, "index -24 is out of bounds for axis 0"),
        ([0, 40], "index 40 is out of bounds for axis 0"),
        ((0, C), "index 3 is out of bounds for axis 1"),
        ((slice(0, 2), 0, [1, 12]), "index 12 is out of bounds for axis 2"),
        (np.ones(N + 1, bool), "boolean index did not match indexed array along axis 0"),
        ((0, 0, 0, 0), "too many indices"),
        ((..., 0, ...), "can only have a single ellipsis"),
        (1.0, "only integers, slices"),
        ([0.0, 1.0], "must be of integer"),
        ("features", "only integers, slices"),
        (True, "a single boolean chooses nothing"),
        (np.False_, "a single boolean chooses nothing"),
        (torch.tensor(True), "a single boolean chooses nothing"),
    ],
)
def test_what_is_no_index_is_refused_with_the_shape(both: tuple, key: Any, problem: str) -> None:
    with pytest.raises(IndexError, match=rf"{problem}.*; the features have the shape \[23, 3, 12\]$"):
        both[0][key]


def test_it_is_an_array_to_numpy(both: tuple) -> None:
    features, plain = both
    assert (features.shape, features.ndim, features.size) == (plain.shape, plain.ndim, plain.size)
    assert (features.dtype, features.nbytes, len(features)) == (plain.dtype, plain.nbytes, len(plain))
    np.testing.assert_array_equal(np.asarray(features), plain, strict=True)
    np.testing.assert_array_equal(np.asarray(features, dtype=np.float64), plain.astype(np.float64), strict=True)
    np.testing.assert_array_equal(np.array(features, copy=True), plain, strict=True)
    np.testing.assert_array_equal(np.array(list(features)), plain, strict=True)
    np.testing.assert_array_equal(np.concatenate([features, plain]), np.concatenate([plain, plain]))
    assert np.mean(features) == np.mean(plain)
    np.testing.assert_array_equal(plain + features, plain + plain)
    rows = iter(features)
    for _ in range(N):
        next(rows)
    with pytest.raises(StopIteration):
        next(rows)
    with pytest.raises(ValueError, match="on the disk, so reading them makes a copy"):
        np.asarray(features, copy=False)
    for comparison in (lambda: features == 0, lambda: features != features):
        with pytest.raises(TypeError, match=r"compare np.asarray\(features\)"):
            comparison()
    with pytest.raises(TypeError, match="item assignment"):
        features[0] = 0
    assert len(pickle.dumps(features)) < len(pickle.dumps(features._store)) + 500
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(features))[3:5], plain[3:5])
    assert repr(features).startswith("Features([23, 3, 12] float32, read from ")


def test_results_are_the_callers_own(both: tuple) -> None:
    features, plain = both
    for key in (slice(None), 3, slice(None, None, -1), (slice(0, 9), 1), [4, 2], (..., slice(0, 4))):
        found = features[key]
        assert found.flags.c_contiguous
        assert found.base is None or found.base.nbytes == found.nbytes
        torch.from_numpy(found).zero_()
    np.testing.assert_array_equal(features[:], plain)


def test_only_the_rows_that_are_touched_are_read(both: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    features, store = both[0], both[0]._store
    read: list[int] = []
    monkeypatch.setattr(
        store, "read", lambda a, b, **more: read.extend(range(a, b)) or type(store).read(store, a, b, **more)
    )
    monkeypatch.setattr(store, "gather", lambda rows, out: read.extend(rows) or type(store).gather(store, rows, out))
    mask = np.zeros((N, C), bool)
    mask[6, 1] = mask[20, 0] = True
    for key, rows in (
        ((4, 1), [4]),
        (slice(20, 3, -8), [4, 12, 20]),
        ([17, 3, 17, 4], [3, 4, 17]),
        (mask, [6, 20]),
        ((None, slice(3, 5), [0, 1]), [3, 4]),
        (slice(5, 5), []),
    ):
        read.clear()
        features[key]
        assert read == rows


def test_pieces_are_put_together(both: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    features, plain = both
    monkeypatch.setattr("gradstore.store.features._PIECE_BYTES", 4 * 200)
    for key in (slice(None), slice(1, None, 3), (slice(None), 1, [3, 0]), [22, 0, 5, 4, 3], np.arange(N) % 4 != 2):
        np.testing.assert_array_equal(features[key], plain[key], strict=True)
    np.testing.assert_array_equal(np.asarray(features, np.float64), plain)


def test_a_store_without_rows_yet(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", clustered(0, C, K), n=N)
    assert store.features.shape == (0, C, K)
    for key in (slice(None), [], np.zeros(0, bool), (..., 0), slice(None, None, -2)):
        assert same(store.features, np.empty((0, C, K), np.float32), key)
    assert list(store.features) == []
    assert np.asarray(store.features).shape == (0, C, K)
    with pytest.raises(IndexError):
        store.features[0]
    assert isinstance(store.labels, np.ndarray)
    assert gs.open(tmp_path / "store").logits.shape == (0, C)
