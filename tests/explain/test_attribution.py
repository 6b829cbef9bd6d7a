"""Attribution: what it sums to, what it ranks, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import clustered, dense_similarity, write_store
from torch_threads import torch_threads

import gradstore as gs
from gradstore.errors import UsageError
from gradstore.explain.attribution import Attribution, class_index
from gradstore.search.exact_score import ExactScore
from gradstore.store.feature_store import FeatureStore

N, M, C, K = 70, 9, 3, 20


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[gs.KernelGLM, FeatureStore, FeatureStore]:
    folder = tmp_path_factory.mktemp("stores")
    names = ("cat", "dog", "owl")
    train = write_store(folder / "train", clustered(N, C, K, seed=2), shard_rows=16, names=names)
    test = write_store(folder / "test", clustered(M, C, K, seed=3), names=names)
    return gs.KernelGLM(alpha=1e-4).fit(train), train, test


@pytest.mark.parametrize("kernel", ["proj-trntk", "proj-pntk", "proj-trntk0"])
@pytest.mark.parametrize("backend", ["multinomial", "sgd"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_attributions_sum_to_the_logit(fitted: tuple, kernel: str, backend: str) -> None:
    _, train, test = fitted
    model = gs.KernelGLM(kernel, backend, alpha=1e-4, max_iter=40).fit(train)
    logits = model.decision_function(test)
    for row in (0, M - 1):
        found = gs.attribute(model, test, row)
        assert found.values.shape == (C, N)
        np.testing.assert_allclose(found.values.sum(1), logits[row], atol=1e-5)
        np.testing.assert_allclose(found.logits, logits[row], atol=1e-5)


def test_values_are_eq_3(fitted: tuple) -> None:
    model, train, test = fitted
    kappa = dense_similarity(train, test, "proj-trntk")
    for row in range(M):
        found = gs.attribute(model, test, row)
        np.testing.assert_allclose(found.similarity, kappa[row], atol=1e-6)
        for c in range(C):
            expected = [model.coef_[c, i] * kappa[row, i] + model.intercept_[c] / N for i in range(N)]
            np.testing.assert_allclose(found.values[c], expected, atol=1e-6 * np.abs(model.coef_).max())


@pytest.mark.parametrize("kernel", ["proj-trntk", "proj-pntk", "proj-trntk0"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_many_are_each_as_alone_to_the_bit(
    kernel: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = write_store(tmp_path / "train", clustered(N, C, K, seed=2), shard_rows=16, dtype=dtype)
    test = write_store(tmp_path / "test", clustered(M, C, K, seed=3), dtype=dtype)
    model = gs.KernelGLM(kernel, alpha=1e-2).fit(train)
    alone = [gs.attribute(model, test, row) for row in range(M)]
    asked = [5, 0, 8, 5]
    passes = []
    for memory in ("2GB", 3000):  # all of them in one pass, or some
        reads: list[int] = []
        monkeypatch.setattr(ExactScore, "_read", noted(ExactScore._read, reads))
        model.set_params(memory=memory)
        for threads in (1, 3):
            with torch_threads(threads):
                found = list(gs.attributions(model, test, asked))
            for each, row in zip(found, asked, strict=True):
                assert each.row == row
                for name in ("values", "similarity", "logits"):
                    np.testing.assert_array_equal(getattr(each, name), getattr(alone[row], name))
        passes.append(sum(reads) / (2 * N))
        monkeypatch.undo()
    assert passes[0] == 1
    assert 1 < passes[1] <= len(asked)


def noted(read: Callable[..., object], reads: list[int]) -> Callable[..., object]:
    """The same function, whose rows are counted."""

    def reading(self: object, batch: np.ndarray) -> object:
        reads.append(len(batch))
        return read(self, batch)

    return reading


def test_rows_are_chosen_as_everywhere(fitted: tuple, tmp_path: Path) -> None:
    model, train, test = fitted
    assert [found.row for found in gs.attributions(model, test)] == list(range(M))
    assert [found.row for found in gs.attributions(model, test, np.arange(M) > 6)] == [7, 8]
    assert list(gs.attributions(model, test, [])) == []
    square, wide = gs.gram(train, out=tmp_path / "a.h5"), gs.gram(test, train, out=tmp_path / "b.h5")
    by_file = gs.KernelGLM(alpha=1e-3).fit(square, train.labels)
    found = list(gs.attributions(by_file, wide, [4, 2]))
    np.testing.assert_array_equal(found[1].values, gs.attribute(by_file, wide, 2).values)
    for wrong in ([0, M], [0.5], "3"):  # said at once, before the first is taken
        with pytest.raises(UsageError, match="--rows"):
            gs.attributions(model, test, wrong)
    with pytest.raises(UsageError, match="expected a store, got Gram"):
        gs.attributions(model, wide)
    with pytest.raises(UsageError, match=r"too little memory .*expected at least .*got 1.0 kB"):
        list(gs.attributions(gs.KernelGLM.load(model.save(tmp_path / "s")).set_params(memory="1KB"), test))


def test_contrast_and_ranking(fitted: tuple) -> None:
    model, _, test = fitted
    found = gs.attribute(model, test, 1)
    other = (found.predicted + 1) % C
    difference = found.logits[found.predicted] - found.logits[other]
    np.testing.assert_allclose(found.contrast(found.predicted, other).sum(), difference, atol=1e-8)
    for rather_than in (None, other):
        top = found.top(4, rather_than=rather_than)
        values = top.values
        assert list(top.contributors) == sorted(np.flatnonzero(values > 0), key=lambda i: -values[i])[:4]
        assert list(top.opponents) == sorted(np.flatnonzero(values < 0), key=lambda i: values[i])[:4]


def by_hand() -> Attribution:
    """Two classes, three examples of labels 0, 1, 1: W_0 κ = (1, 2, 3), W_1 κ = (4, 5, 6), b = (0.3, 0.6)."""
    weighted, intercept = np.array([[1.0, 2, 3], [4, 5, 6]]), np.array([0.3, 0.6])
    values = weighted + intercept[:, None] / 3
    return Attribution(values, np.ones(3), values.sum(axis=1), intercept, ("a", "b"), row=0, labels=np.array([0, 1, 1]))


def test_a_viz_is_eq_23() -> None:
    """Of class 0 its one example takes all, 1 + 0.3 + (2 + 3); of class 1 two share 0.6 and 4."""
    found = by_hand()
    for c, rows, values in ((0, [0], [6.3]), (1, [1, 2], [5 + 0.3 + 2, 6 + 0.3 + 2])):
        own, shares = found.visual(c)
        assert own.tolist() == rows
        np.testing.assert_allclose(shares, values)
        assert shares.sum() == pytest.approx(found.logits[c])
    assert found.visual()[0].tolist() == [1, 2]  # of the predicted class


def test_class_means_are_those_of_app_m() -> None:
    means = by_hand().class_means()
    np.testing.assert_allclose(means, [[1.1, 2.6], [4.2, 5.7]])
    np.testing.assert_allclose(means @ [1, 2], by_hand().logits)  # eq. 22
    assert np.isnan(replace(by_hand(), labels=np.array([0, 0, 0])).class_means()[:, 1]).all()


def test_what_needs_labels_says_so() -> None:
    partly = replace(by_hand(), labels=np.array([0, -1, -1]))
    for ask in (partly.visual, partly.class_means):
        with pytest.raises(UsageError, match=r"labels of training examples are missing .*got 2 without, .* row 1"):
            ask()
    unknown = replace(by_hand(), labels=None)
    for ask in (unknown.visual, unknown.class_means):
        with pytest.raises(UsageError, match=r"labels of the training examples are not known"):
            ask()
    with pytest.raises(UsageError, match=r"no training example is of this class.*got b"):
        replace(by_hand(), labels=np.array([0, 0, 0])).visual(1)


def test_from_a_gram_matrix_and_an_array(fitted: tuple, tmp_path: Path) -> None:
    _, train, test = fitted
    square, wide = gs.gram(train, out=tmp_path / "a.h5"), gs.gram(test, train, out=tmp_path / "b.h5")
    by_file = gs.KernelGLM(alpha=1e-3).fit(square, train.labels)
    by_array = gs.KernelGLM("precomputed", alpha=1e-3).fit(square[:], train.labels)
    for model, queries in ((by_file, wide), (by_array, wide[:])):
        found = gs.attribute(model, queries, 4)
        np.testing.assert_allclose(found.values.sum(1), model.logits(queries)[4], atol=1e-8)


def test_json_names_classes_and_rows(fitted: tuple) -> None:
    model, _, test = fitted
    record = gs.attribute(model, test, 0).as_dict(k=2, c=2, rather_than=0)
    assert (record["class"], record["rather_than"], len(record["contributors"])) == ("owl", "cat", 2)
    assert record["contributors"][0]["attribution"] >= record["contributors"][1]["attribution"] > 0


def test_bad_input_gets_one_line(fitted: tuple) -> None:
    model, _, test = fitted
    with pytest.raises(UsageError, match=f"no such query row .*expected 0 to {M - 1}, got {M}"):
        gs.attribute(model, test, M)
    with pytest.raises(UsageError, match="keeps no training examples of an array"):
        gs.attribute(gs.KernelGLM("linear").fit(np.eye(4), [0, 1, 0, 1]), np.eye(4), 0)
    with pytest.raises(UsageError, match="expected one of cat, dog, owl, got 'fox'"):
        class_index(("cat", "dog", "owl"), "fox")
    with pytest.raises(UsageError, match="k is too small"):
        gs.attribute(model, test, 0).top(0)
    with pytest.raises(UsageError, match="compared with itself"):
        gs.attribute(model, test, 0).top(1, c=1, rather_than=1)
    for row in (-1, 1.0, True):
        with pytest.raises(UsageError, match=f"no such query row .*expected 0 to {M - 1}, got {row}"):
            gs.attribute(model, test, row)
    found = gs.attribute(model, test, 0)
    for wrong in (-1, C, 0.0):
        for call in (
            found.visual,
            lambda c: found.top(2, c),
            lambda c: found.contrast(0, c),
            lambda c: found.as_dict(rather_than=c),
        ):
            with pytest.raises(UsageError, match=f"no such class .*expected 0 to {C - 1}, got {wrong}"):
                call(wrong)


def test_a_training_store_that_was_moved_is_named(tmp_path: Path) -> None:
    train = write_store(tmp_path / "train", clustered(N, C, K, seed=2))
    model = gs.KernelGLM(alpha=1e-2).fit(train)
    before = gs.attribute(model, train, 3)
    (tmp_path / "train").rename(tmp_path / "moved")
    moved = gs.open(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"no longer where the surrogate was fitted\. Name it with --train"):
        gs.attribute(model, moved, 3)
    assert (gs.attribute(model, moved, 3, train=moved).values == before.values).all()
