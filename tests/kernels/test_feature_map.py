"""A kernel is one entry: toy ones, weighted by row and fitted, go through everything that takes a store."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from synthetic import clustered, write_store
from torch import Tensor

import gradstore as gs
from gradstore.arithmetic.matrix_unit import available
from gradstore.errors import NonFiniteError, UsageError
from gradstore.kernels.definitions import EXACT, PROJECTED, Kernel
from gradstore.kernels.feature_map import FeatureMap
from gradstore.search.bounds.bounds import Bounds
from gradstore.search.bounds.bounds_bfloat16 import LimbBounds
from gradstore.search.bounds.bounds_float32 import Float32Bounds
from gradstore.search.bounds.bounds_int8 import IntegerBounds
from gradstore.store.feature_store import FeatureStore
from gradstore.store.rows import Rows

pytestmark = pytest.mark.numerical

MEANS: tuple[type[Bounds], ...] = (Float32Bounds, IntegerBounds, LimbBounds)
ENGINES = ["auto", *(means.choice.name for means in MEANS if means.refusal(1) is None)]
README = Path(__file__).parent.parent.parent / "README.md"


def loss_weights(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """softmax_c − 1[c = y], of the gradient of the loss."""
    return softmax(columns["logits"].astype(np.float64), axis=1) - np.eye(3)[columns["label"]]


def mean(rows: Rows, phi: FeatureMap, memory: int) -> dict[str, np.ndarray]:
    step = max(1, memory // (8 * phi.length * 4))
    total = sum(phi.rows(columns, rows.where)[0].double().sum(0) for _, columns in rows.blocks(step))
    return {"mean": (total / len(rows)).float().numpy()}  # type: ignore[union-attr]


def without(phi: Tensor, state: Mapping[str, np.ndarray]) -> Tensor:
    return phi.sub_(torch.from_numpy(state["mean"]))


TOYS = {
    toy.name: toy
    for toy in (
        Kernel("toy-loss", "⟨Σ_c w_c φ^c, Σ_c w_c φ^c⟩", sums_classes=True, normalised=False, weights=loss_weights),
        Kernel("toy-centred", "cosine of φ − mean", sums_classes=False, normalised=True, fit=mean, apply=without),
        Kernel(
            "toy-both",
            "both",
            sums_classes=True,
            normalised=True,
            weights=loss_weights,
            fit=mean,
            apply=without,
            note="both",
        ),
    )
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, toy in TOYS.items():
        monkeypatch.setitem(PROJECTED, name, toy)


@pytest.fixture(scope="module", params=["float16", "int8"])
def stores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, ...]:
    path, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)

    def made(name: str, n: int, seed: int) -> FeatureStore:
        features = clustered(n, 3, 2100, seed=seed) * np.float32(1e-3) + np.float32(2e-5)
        return write_store(path / name, features, dtype=request.param, logits=rng.standard_normal((n, 3)))

    return made("train", 120, 0), made("test", 14, 1)


def dense_phi(store: FeatureStore, name: str, train: FeatureStore) -> np.ndarray:
    """Φ float64 [n, D], divided by its norm under a cosine, without any of the library's."""

    def raw(rows: FeatureStore) -> np.ndarray:
        values = rows.features[:].astype(np.float64)
        if TOYS[name].weights is None:
            return values.reshape(len(values), -1)
        odds = np.exp(rows.logits.astype(np.float64))
        weights = odds / odds.sum(1, keepdims=True)
        weights[np.arange(len(rows)), rows.labels] -= 1
        return np.einsum("nck,nc->nk", values, weights)

    phi = raw(store) - (0 if TOYS[name].fit is None else raw(train).mean(0))
    return phi / np.linalg.norm(phi, axis=1, keepdims=True) if TOYS[name].normalised else phi


def dense(a: FeatureStore, b: FeatureStore, name: str) -> np.ndarray:
    """κ float64 [a, b], of rows b like those of training."""
    return dense_phi(a, name, b) @ dense_phi(b, name, b).T


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("arithmetic", ["float32", "auto"])
def test_gram(name: str, arithmetic: str, stores: tuple, tmp_path: Path) -> None:
    train, test = stores
    for a, b in ((train, None), (test, train)):
        found = gs.gram(a, b, name, arithmetic=arithmetic, out=tmp_path / f"{b is None}.h5", memory="3MB")
        expected = dense(a, b or a, name)
        np.testing.assert_allclose(found[:], expected, rtol=0, atol=4e-6 * np.abs(expected).max())
        assert found.attributes["arithmetic"] == ("bfloat16x2" if available() and arithmetic == "auto" else "float32")


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_topk(name: str, engine: str, stores: tuple) -> None:
    train, test = stores
    expected, first = dense(test, train, name), gs.topk(train, test, 9, name)
    scale = np.abs(expected).max()
    for memory in ("1GB", "40MB"):
        found = gs.topk(train, test, 9, name, engine=engine, memory=memory)
        np.testing.assert_array_equal(found.indices, first.indices)
        np.testing.assert_array_equal(found.similarity, first.similarity)
        np.testing.assert_allclose(found.similarity, -np.sort(-expected)[:, :9], rtol=0, atol=2e-6 * scale)
        np.testing.assert_allclose(np.take_along_axis(expected, found.indices, 1), found.similarity, atol=2e-6 * scale)


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("backend", ["multinomial", "sgd"])
def test_a_surrogate_keeps_what_was_fitted_and_its_attributions_add_up(
    name: str, backend: str, stores: tuple, tmp_path: Path
) -> None:
    train, test = stores
    model = gs.KernelGLM(name, backend, alpha=0.1).fit(train)
    again = gs.KernelGLM.load(model.save(tmp_path / "surrogate"))
    expected = dense(test, train, name) @ model.coef_.T + model.intercept_
    np.testing.assert_allclose(model.logits(test), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(again.logits(test), model.logits(test))
    found = gs.attribute(again, test, 3)
    np.testing.assert_allclose(
        found.similarity, dense(test, train, name)[3], atol=2e-6 * np.abs(found.similarity).max()
    )
    np.testing.assert_allclose(found.values.sum(1), model.logits(test)[3], rtol=0, atol=1e-6)


def test_weights_that_a_caller_gives_come_before_the_kernels_own(stores: tuple) -> None:
    train, test = stores
    mine = gs.topk(train, test, 5, "toy-loss", classes="0 - 0.5 2")
    np.testing.assert_array_equal(
        mine.similarity, gs.topk(train, test, 5, "proj-trntk0", classes="0 - 0.5 2").similarity
    )
    centred = gs.topk(train, test, 5, "toy-centred", classes="1").similarity
    phis = [
        store.features[:, 1].astype(np.float64) - train.features[:, 1].astype(np.float64).mean(0) for store in stores
    ]
    unit = [phi / np.linalg.norm(phi, axis=1, keepdims=True) for phi in phis]
    np.testing.assert_allclose(centred, -np.sort(-(unit[1] @ unit[0].T))[:, :5], rtol=0, atol=2e-6)


def test_error_bars_of_weighted_classes_and_none_of_a_fit(stores: tuple) -> None:
    train, test = stores
    found = gs.topk(train, test, 3, "toy-loss", error_bars=True, rows=[0, 1])
    phi, other = dense_phi(test, "toy-loss", train), dense_phi(train, "toy-loss", train)[found.indices[1, 2]]
    K = 2100  # (⟨g, h⟩² + ‖g‖² ‖h‖²) / K, but for a bias of order 1/K
    expected = np.sqrt(((phi[1] @ other) ** 2 + (phi[1] @ phi[1]) * (other @ other)) / K)
    assert found.standard_error[1, 2] == pytest.approx(expected, rel=2e-3)
    with pytest.raises(UsageError, match="no error is known of features that are fitted"):
        gs.topk(train, test, 3, "toy-centred", error_bars=True)


@pytest.mark.parametrize("name", TOYS)
def test_an_index_refuses_in_one_line(name: str, stores: tuple) -> None:
    with pytest.raises(UsageError, match="an index serves no Φ that is weighted or fitted") as refused:
        gs.topk(*stores, 3, name, mode="certified")
    assert "\n" not in str(refused.value)


def test_a_kernel_without_an_exact_kin_has_no_residuals(stores: tuple) -> None:
    with pytest.raises(
        UsageError, match=r"no exact kernel is its like .*expected one of proj-trntk, proj-pntk, proj-trntk0"
    ):
        gs.residual(None, stores[0], kernel="toy-loss")  # type: ignore[arg-type]


def test_a_layout_that_holds_only_the_sum_serves_no_weights(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a", clustered(9, 1, 30), layout="sum", names=("a", "b"))
    with pytest.raises(UsageError, match=r"toy-loss needs the features of each class.* Use --kernel proj-pntk"):
        gs.gram(store, kernel="toy-loss")


def test_a_row_whose_fitted_features_vanish_is_named_wherever_it_is_met(tmp_path: Path) -> None:
    one = np.arange(1, 41, dtype=np.float32).reshape(1, 1, 40)
    store = write_store(tmp_path / "a", np.concatenate([one, 3 * one, 2 * one]))  # row 2 is the mean of all
    what = "row 2 have no direction, so toy-centred is undefined"
    for refused in (
        lambda: list(gs.gram(store, kernel="toy-centred", arithmetic="float32")),
        lambda: gs.topk(store, store, 1, "toy-centred"),
        lambda: gs.KernelGLM("toy-centred").fit(store),
    ):
        with pytest.raises(NonFiniteError, match=f"a: the features of {what}"):
            refused()


def test_help_and_errors_list_what_is_registered(stores: tuple) -> None:
    from gradstore_cli.options import kernel_help

    assert kernel_help().endswith("toy-loss, toy-centred or toy-both (both).")
    with pytest.raises(UsageError, match=r"expected one of proj-trntk, .*, toy-loss, toy-centred, toy-both, got 'toy'"):
        gs.topk(*stores, 1, "toy")


def test_the_registry_imports_no_torch() -> None:
    code = "import sys, gradstore.kernels.definitions; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_readme_names_every_kernel_and_what_it_computes() -> None:
    there = README.read_text()
    shipped = [kernel for name, kernel in {**PROJECTED, **EXACT}.items() if name not in TOYS]
    assert len(shipped) >= 11
    assert not [kernel.name for kernel in shipped if f"| `{kernel.name}` | {kernel.formula} |" not in there]
