"""Faithfulness measures against their definitions, counted pair by pair, and where they are undefined."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from synthetic import clustered, write_store

import gradstore as gs
from gradstore.errors import UsageError
from gradstore.faithfulness import evaluate, faithfulness, kendall, r_miss, tied_pairs
from gradstore.linearisation import MAPS, linearise, linearise_store
from gradstore.surrogate.alpha import log_odds


def tau_b(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall 1945, over all pairs."""
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in combinations(range(len(a)), 2)]
    x, y = np.array(signs).T
    return float((x * y).sum() / np.sqrt((x != 0).sum() * (y != 0).sum()))


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=30))
@settings(max_examples=60, deadline=None)
def test_tau_counts_pairs_and_allows_for_ties(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, float).T
    found = kendall(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert found.value is None
        assert "are equal" in found.note
        return
    assert found.value == pytest.approx(tau_b(a, b))
    assert tied_pairs(a) == sum(x == y for x, y in combinations(a, 2))


def test_log_odds_are_those_of_the_probability_and_do_not_saturate() -> None:
    rng = np.random.default_rng(0)
    logits, labels = 5 * rng.standard_normal((50, 4)), rng.integers(0, 4, 50)
    p = softmax(logits, axis=1)[np.arange(50), labels]
    np.testing.assert_allclose(log_odds(logits, labels), np.log(p / (1 - p)), rtol=1e-6)
    certain = np.array([[900.0, 0, 0], [800.0, 0, 0]])
    assert np.diff(log_odds(certain, np.zeros(2, int))) == pytest.approx(-100)


def test_measures_of_a_worked_example() -> None:
    labels = np.array([0, 0, 1, 1, 1, 0])
    network = np.array([[2.0, 0], [1, 0], [0, 3], [1, 0], [0, 1], [0, 2]])  # wrong on 3 and 5
    surrogate = np.array([[3.0, 0], [0, 1], [0, 2], [2, 0], [0, 1], [1, 0]])  # wrong on 1 and 3
    found = faithfulness(labels, network, surrogate, bootstrap=0)
    assert found.network_accuracy.value == pytest.approx(4 / 6)
    assert found.tad.value == pytest.approx(0)
    assert found.r_miss.value == pytest.approx(1 / 3)
    assert found.agreement.value == pytest.approx(4 / 6)
    a, b = np.array([2.0, 1, 3, -1, 1, -2]), np.array([3.0, -1, 2, -2, 1, 1])
    assert found.tau.value == pytest.approx(tau_b(a, b))
    assert found.pearson.value == pytest.approx(np.corrcoef(expit(a), expit(b))[0, 1])
    ranks = [np.array([sorted(v).index(x) + (np.sum(v == x) - 1) / 2 for x in v]) for v in (a, b)]
    assert found.spearman.value == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found.ties == (1, 1)


def test_saturated_probabilities_are_counted_and_ranked_all_the_same() -> None:
    rng = np.random.default_rng(1)
    gaps = np.sort(rng.uniform(0, 60, 40))
    network = np.stack([gaps, np.zeros(40)], axis=1)
    found = faithfulness(np.zeros(40, int), network, 0.5 * network, bootstrap=0)
    assert found.tau.value == pytest.approx(1)
    assert found.saturated[0] == int((expit(gaps).astype(np.float32) == 1).sum()) > found.saturated[1] > 0
    assert found.tau_unsaturated.n == 40 - found.saturated[0]


def test_what_is_undefined_says_why() -> None:
    labels, right = np.zeros(5, int), np.array([[1.0, 0]] * 5)
    found = faithfulness(labels, right, right + np.arange(5)[:, None] * [1, 0], bootstrap=3)
    assert str(found.tau) == "n/a (all probabilities of the network are equal)"
    assert str(found.r_miss) == "n/a (neither makes a mistake)"
    assert r_miss(np.ones(3), np.array([1.0, 0, 1])).value == 0
    certain = np.array([[35.0 + i, 0] for i in range(5)])
    found = faithfulness(labels, certain, certain, bootstrap=0)
    assert found.pearson.note == "all probabilities of the network are equal up to rounding"
    assert found.tau.value == pytest.approx(1)
    sure = np.array([[90.0 + i, 0] for i in range(5)])
    assert faithfulness(labels, sure, sure, bootstrap=0).tau_unsaturated.note == "fewer than two queries are left"


def test_bootstrap_errors_are_those_of_fresh_samples() -> None:
    rng = np.random.default_rng(2)

    def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        z = rng.standard_normal((300, 2))
        return rng.integers(0, 2, 300), z, z + rng.standard_normal((300, 2))

    fresh = [faithfulness(*sample(), bootstrap=0).tau.value for _ in range(60)]
    estimated = np.mean([faithfulness(*sample(), bootstrap=40, seed=i).tau.error for i in range(5)])
    assert estimated == pytest.approx(np.std(fresh), rel=0.35)


@pytest.mark.parametrize(
    ("labels", "surrogate", "message"),
    [
        (np.array([0, -1, 1]), np.zeros((3, 2)), r"labels are missing .*got 1 without, the first in row 1"),
        (np.array([0, 1]), np.zeros((3, 2)), "do not fit together"),
        (np.array([0, 1, 1]), np.zeros((3, 3)), "do not fit together"),
    ],
)
def test_bad_input_gets_one_line(labels: np.ndarray, surrogate: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        faithfulness(labels, np.zeros((3, 2)), surrogate)
    with pytest.raises(UsageError, match="no queries"):
        faithfulness(np.zeros(0, int), np.zeros((0, 2)), np.zeros((0, 2)))


@pytest.mark.parametrize(("name", "nu"), [("phi1", 1.0), ("phi2", 0.4), ("phi3", 1.8)])
def test_linearisation_finds_the_curve_that_made_the_data(name: str, nu: float) -> None:
    rng = np.random.default_rng(3)
    z = rng.uniform(-4, 5, 400)
    s = {"phi3": 0.5 + np.arctan((z - 0.5) / 0.7) / np.pi}.get(name, expit((z - 0.5) / 0.7))
    p = s ** (1 / nu)
    found = linearise(np.log(p / (1 - p)), z, name, bootstrap=20)
    np.testing.assert_allclose(found.parameters, [0.5, 0.7, nu][: len(found.parameters)], rtol=1e-3)
    assert found.r2.value > 0.9999
    assert found.r2.n == 200
    assert found.masked == 0


def test_linearisation_judges_on_rows_it_was_not_fitted_on_and_masks_saturated_ones() -> None:
    rng = np.random.default_rng(4)
    z = rng.standard_normal(300)
    network = z + rng.standard_normal(300)
    assert linearise(network, z, bootstrap=0).r2.value == pytest.approx(0.5, abs=0.15)
    assert linearise(rng.standard_normal(300), z, bootstrap=0).r2.value < 0.1
    network[:30] = 500
    assert linearise(network, z, bootstrap=0).masked == 30
    assert "not saturated" in linearise(network[:35], z[:35]).r2.note
    assert "are equal" in linearise(network, np.zeros(300)).r2.note


def test_a_store_is_compared_with_its_networks_logits(tmp_path: Path) -> None:
    features = clustered(120, 3, 16, seed=5)
    rng = np.random.default_rng(6)
    logits = features.reshape(120, -1) @ rng.standard_normal((48, 3)) * 4
    train, test = (
        write_store(tmp_path / name, features[rows], logits=logits[rows])
        for name, rows in (("train", slice(0, 80)), ("test", slice(80, 120)))
    )
    model = gs.KernelGLM(alpha=1e-4, target="predictions").fit(train)
    found = evaluate(model, test, bootstrap=10)
    expected = faithfulness(test.labels, test.logits, model.decision_function(test), bootstrap=0)
    assert found.tau.value == expected.tau.value > 0.4
    assert 0 < found.tau.error < 0.3
    assert [curve.name for curve in linearise_store(model, test, bootstrap=2)] == list(MAPS)
