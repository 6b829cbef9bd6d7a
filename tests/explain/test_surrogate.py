"""The surrogate against independent dense float64 references, and against scikit-learn's own fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import SGDClassifier
from sklearn.utils.estimator_checks import check_estimator
from synthetic import clustered, dense_similarity, write_store

import gradstore as gs
from gradstore.errors import CorruptError, MismatchError, NonFiniteError, UsageError
from gradstore.explain.surrogate.one_vs_rest import epoch_orders
from gradstore.store.feature_store import FeatureStore

N, M, C, K = 100, 17, 3, 24


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, FeatureStore]:
    folder = tmp_path_factory.mktemp("stores")
    rng = np.random.default_rng(1)
    return tuple(
        write_store(folder / name, clustered(n, C, K, seed=seed), logits=3 * rng.standard_normal((n, C)), shard_rows=16)
        for name, n, seed in (("train", N, 2), ("test", M, 3))
    )  # type: ignore[return-value]


def reference(gram: np.ndarray, labels: np.ndarray, alpha: float, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W and b of the softmax cross-entropy with the penalty alpha/2 tr(W K Wᵀ), by BFGS on W in float64."""
    n, c = len(gram), labels.max() + 1
    target, floor = np.eye(c)[labels], gram + 1e-10 * np.eye(n)
    root = np.linalg.cholesky(floor)

    def objective(p: np.ndarray) -> tuple[float, np.ndarray]:
        u, b = p[: n * c].reshape(n, c), p[n * c :]
        logits = root @ u + b
        residual = weights[:, None] * (softmax(logits, axis=1) - target) / n
        value = -(weights[:, None] * target * log_softmax(logits, axis=1)).sum() / n + alpha / 2 * (u**2).sum()
        return value, np.concatenate([(root.T @ residual + alpha * u).ravel(), residual.sum(axis=0)])

    found = minimize(objective, np.zeros(n * c + c), jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 4000})
    return np.linalg.solve(root.T, found.x[: n * c].reshape(n, c)).T, found.x[n * c :]


def balanced(labels: np.ndarray) -> np.ndarray:
    counts = np.bincount(labels)
    return len(labels) / (len(counts) * counts[labels])


@pytest.mark.parametrize("kernel", ["proj-trntk", "proj-pntk", "proj-trntk0"])
@pytest.mark.parametrize("memory", ["2GB", "9MB"], ids=["on the Gram matrix", "on the features"])
def test_multinomial_is_the_minimum_of_its_objective(
    stores: tuple, kernel: str, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = stores
    if memory == "9MB":  # so small a problem always fits; forbid the factor
        monkeypatch.setattr(
            "gradstore.explain.surrogate.fitting.factored", lambda gram: pytest.fail("used the Gram matrix")
        )
        monkeypatch.setattr("gradstore.explain.surrogate.fitting.FACTOR_COPIES", 10**6)
    model = gs.KernelGLM(kernel, alpha=1e-2, tolerance=3e-4, memory=memory).fit(train)
    square, rectangle = dense_similarity(train, train, kernel), dense_similarity(train, test, kernel)
    scale = np.trace(square) / N
    W, b = reference(square / scale, train.labels, 1e-2, balanced(train.labels))
    expected = rectangle @ (W / scale).T + b
    np.testing.assert_allclose(model.decision_function(test), expected - expected.mean(1, keepdims=True)
                               + model.decision_function(test).mean(1, keepdims=True), atol=2e-3)  # fmt: skip
    np.testing.assert_allclose(model.predict_proba(test), softmax(expected, axis=1), atol=1e-3)
    assert model.converged_
    assert model.logit_error_ <= 3e-4


def test_answers_need_no_training_store_and_are_w_kappa_plus_b(stores: tuple) -> None:
    train, test = stores
    model = gs.KernelGLM(alpha=1e-3).fit(train)
    dense = dense_similarity(train, test, "proj-trntk") @ model.coef_.T + model.intercept_
    np.testing.assert_allclose(model.decision_function(test), dense, atol=1e-5)
    assert model.vectors_.shape == (C, C * K)
    assert (model.predict(test) == dense.argmax(1)).all()


@pytest.mark.parametrize("memory", ["2GB", "64KB"], ids=["in one block", "a few rows at a time"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_sgd_is_scikit_learns_own_fit(stores: tuple, memory: str, shuffle: bool, tmp_path: Path) -> None:
    train, test = stores
    epochs = 4
    settings = {"alpha": 1e-2, "max_iter": epochs, "tolerance": 0.0, "shuffle": shuffle, "random_state": 5}
    square, wide = gs.gram(train, out=tmp_path / "a.h5"), gs.gram(test, train, out=tmp_path / "b.h5")
    model = gs.KernelGLM(backend="sgd", memory=memory, **settings).fit(square, train.labels)
    gram, weights = square[:].astype(float), balanced(train.labels)
    own = SGDClassifier(loss="log_loss", penalty="l2", alpha=1e-2, shuffle=False, random_state=5)
    own.class_weight = {c: weights[train.labels == c][0] for c in range(C)}
    if not shuffle:
        own.max_iter, own.tol = epochs, None
        own.fit(gram, train.labels)
    else:
        rows = {"2GB": N, "64KB": 32_000 // (16 * N)}[memory]
        for _, orders in zip(range(epochs), epoch_orders(N, rows, 5, shuffle=True), strict=False):
            order = np.concatenate(orders)
            own.partial_fit(gram[order], train.labels[order], classes=np.arange(C))
    np.testing.assert_allclose(model.coef_, own.coef_, atol=1e-6)
    np.testing.assert_allclose(model.intercept_, own.intercept_, atol=1e-6)
    d = own.decision_function(wide[:].astype(float))
    np.testing.assert_allclose(model.decision_function(wide), d, atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(wide), expit(d) / expit(d).sum(1, keepdims=True), atol=1e-6)


def test_sgd_on_a_store_writes_its_gram_matrix_to_scratch_and_removes_it(stores: tuple, tmp_path: Path) -> None:
    test = stores[1]
    rng, scratch = np.random.default_rng(3), tmp_path / "scratch"
    train = write_store(tmp_path / "train", clustered(300, C, K), logits=rng.standard_normal((300, C)))
    scratch.mkdir()
    here, there = (
        gs.KernelGLM(
            backend="sgd", alpha=1e-1, shuffle=False, max_iter=4, tolerance=0, memory=memory, scratch=scratch
        ).fit(train)
        for memory in ("2GB", "400KB")
    )
    np.testing.assert_allclose(there.decision_function(test), here.decision_function(test), atol=1e-2)
    dense = dense_similarity(train, test, "proj-trntk") @ there.coef_.T + there.intercept_
    np.testing.assert_allclose(there.decision_function(test), dense, atol=1e-5)
    assert not list(scratch.iterdir())


def test_sgd_stops_once_the_loss_stops_falling(stores: tuple) -> None:
    model = gs.KernelGLM(backend="sgd", alpha=1e-1, max_iter=500).fit(stores[0])
    assert model.converged_
    assert 5 < model.n_iter_ < 500
    with pytest.warns(ConvergenceWarning, match="has not converged after 2 iterations"):
        gs.KernelGLM(backend="sgd", max_iter=2).fit(stores[0])


@pytest.mark.parametrize("backend", ["multinomial", "sgd"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_is_a_scikit_learn_estimator(backend: str) -> None:
    check_estimator(gs.KernelGLM("linear", backend, alpha=1e-2, max_iter=40, tolerance=1e-2))


def test_two_classes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one = write_store(tmp_path / "one", clustered(40, 1, K), logits=rng.standard_normal((40, 1)))
    for backend in ("multinomial", "sgd"):
        model = gs.KernelGLM(backend=backend, alpha=1e-2).fit(one)
        assert model.decision_function(one).shape == (40, 2)
        p = model.predict_proba(one)
        np.testing.assert_allclose(p.sum(1), 1)
        assert (model.predict(one) == p.argmax(1)).all()
    np.testing.assert_allclose(model.coef_[0], -model.coef_[1])


def test_targets_are_the_networks_own_outputs(stores: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = stores
    hard = gs.KernelGLM(alpha=1e-3, target="predictions").fit(train)
    monkeypatch.setattr(FeatureStore, "labels", np.full(N, -1))
    unlabelled = gs.KernelGLM(alpha=1e-3, target="predictions").fit(train)
    assert (unlabelled.coef_ == hard.coef_).all()
    monkeypatch.undo()
    again = gs.KernelGLM(alpha=1e-3).fit(train, train.logits.argmax(1))
    np.testing.assert_allclose(hard.coef_, again.coef_, atol=1e-6 * np.abs(again.coef_).max())
    soft, sharp = (gs.KernelGLM("precomputed", alpha=1e-4, target=target, class_weight=None).fit(
        np.eye(N), train.labels, outputs=train.logits) for target in ("probabilities", "predictions"))  # fmt: skip
    far = [np.abs(m.predict_proba(np.eye(N)) - softmax(train.logits, axis=1)).mean() for m in (soft, sharp)]
    assert far[0] < 0.7 * far[1]


@pytest.mark.parametrize("backend", ["multinomial", "sgd"])
@pytest.mark.parametrize("select", ["tau", "likelihood"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_alpha_is_the_best_on_rows_held_out(stores: tuple, backend: str, select: str) -> None:
    model = gs.KernelGLM(backend=backend, alpha="auto", select=select, max_iter=60, tolerance=5e-2).fit(stores[0])
    assert model.alpha_ == max(model.alpha_scores_, key=model.alpha_scores_.get)
    assert len(set(model.alpha_scores_.values())) > 1


@pytest.mark.parametrize("backend", ["multinomial", "sgd"])
def test_saved_and_loaded_it_answers_the_same(stores: tuple, backend: str, tmp_path: Path) -> None:
    train, test = stores
    model = gs.KernelGLM(backend=backend, alpha=1e-2).fit(train)
    path = model.save(tmp_path / "new" / "s.safetensors")
    again = gs.KernelGLM.load(path)
    assert (again.decision_function(test) == model.decision_function(test)).all()
    assert (again.predict_proba(test) == model.predict_proba(test)).all()
    assert again.get_params() == model.get_params()
    assert again.converged_ == model.converged_


def test_a_surrogate_of_another_store_is_refused(stores: tuple, tmp_path: Path) -> None:
    train, test = stores
    model = gs.KernelGLM(alpha=1e-2).fit(train)
    other = write_store(tmp_path / "other", clustered(5, C, K, seed=9), dtype="float32")
    with pytest.raises(MismatchError, match="dtype") as caught:
        model.decision_function(other)
    assert "surrogate" in str(caught.value)
    with pytest.raises(MismatchError, match=r"data\.length"):
        gs.attribute(model, test, 0, train=test)
    with pytest.raises(UsageError, match=r"expected a store, got ndarray"):
        model.predict(np.zeros((2, C * K)))


def test_gram_files(stores: tuple, tmp_path: Path) -> None:
    train, test = stores
    square, wide = gs.gram(train, out=tmp_path / "a.h5"), gs.gram(test, train, out=tmp_path / "b.h5")
    by_file = gs.KernelGLM(alpha=1e-2).fit(square, train.labels)
    by_store = gs.KernelGLM(alpha=1e-2).fit(train)
    np.testing.assert_allclose(by_file.decision_function(wide), by_store.decision_function(test), atol=1e-3)
    assert (gs.KernelGLM.load(by_file.save(tmp_path / "s")).logits(wide) == by_file.logits(wide)).all()
    with pytest.raises(MismatchError, match="columns"):
        by_file.logits(gs.gram(train, test, out=tmp_path / "c.h5"))
    with pytest.raises(UsageError, match="a symmetric matrix"):
        gs.KernelGLM().fit(wide, train.labels)
    with pytest.raises(UsageError, match="has no labels"):
        gs.KernelGLM().fit(square)
    with pytest.raises(UsageError, match="another kernel"):
        gs.KernelGLM("proj-pntk").fit(square, train.labels)


BAD = [
    ({"backend": "svm"}, "unknown backend .*expected one of multinomial, sgd, got 'svm'"),
    ({"kernel": "trntk"}, "cannot be computed from a store"),
    ({"alpha": -1.0}, "alpha is unusable"),
    ({"alpha": "best"}, "expected a number above 0, or auto, got 'best'"),
    ({"target": "logits"}, "unknown target"),
    ({"backend": "sgd", "target": "probabilities"}, "sgd learns classes"),
    ({"class_weight": "heavy"}, "unknown class_weight"),
    ({"memory": "1KB"}, r"too little memory \(expected at least [0-9.]+ kB, got 1.0 kB\)"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_settings_get_one_line(stores: tuple, settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        gs.KernelGLM(**settings).fit(stores[0])
    assert "\n" not in str(caught.value)


def test_bad_labels_get_one_line(stores: tuple) -> None:
    train, _ = stores
    with pytest.raises(UsageError, match=r"labels are missing .*got 2 without, the first in row 3"):
        gs.KernelGLM().fit(train, np.where(np.isin(np.arange(N), (3, 7)), -1, train.labels))
    with pytest.raises(UsageError, match="one class, 1"):
        gs.KernelGLM().fit(train, np.ones(N, int))
    with pytest.raises(UsageError, match="not one a row"):
        gs.KernelGLM().fit(train, np.zeros(N - 1, int))
    with pytest.raises(UsageError, match="outputs are not known"):
        gs.KernelGLM("linear", target="predictions").fit(np.eye(4), np.arange(4) % 2)


def test_a_gram_matrix_that_is_none_is_refused() -> None:
    wrong = np.array([[0.0, 1.0], [1.0, 0.0]]) + 0.1 * np.eye(2)
    with pytest.raises(NonFiniteError, match="not positive semidefinite"):
        gs.KernelGLM("precomputed").fit(wrong, [0, 1])


def test_foreign_and_damaged_files_are_refused(stores: tuple, tmp_path: Path) -> None:
    path = gs.KernelGLM(alpha=1e-1).fit(stores[0]).save(tmp_path / "s")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.integers(0, len(whole))] ^= 1 << rng.integers(0, 8)
        path.write_bytes(damaged[: rng.integers(len(whole) // 2, len(whole) + 1)])
        with pytest.raises(CorruptError, match="no surrogate, or a damaged one") as caught:
            gs.KernelGLM.load(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"pickle")
    with pytest.raises(CorruptError, match="no surrogate, or a damaged one"):
        gs.KernelGLM.load(path)
    with pytest.raises(UsageError, match="there is no surrogate"):
        gs.KernelGLM.load(tmp_path / "none")
    path.write_bytes(whole[:-8])
    with pytest.raises(CorruptError, match="damaged"):
        gs.KernelGLM.load(path)
