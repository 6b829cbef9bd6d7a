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
from gradstore.explain.faithfulness import Measure, evaluate, faithfulness, kendall, r_miss, tied_pairs
from gradstore.explain.linearisation import MAPS, Linearisation, class_logits, linearise, linearise_store, r_squared
from gradstore.explain.surrogate.alpha import log_odds


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
    assert found.r_miss.value == pytest.approx(1 / 3)  # query 3, of 1, 3 and 5
    assert found.agreement.value == pytest.approx(4 / 6)
    a, b = np.array([2.0, 1, 3, -1, 1, -2]), np.array([3.0, -1, 2, -2, 1, 1])
    assert found.tau.value == pytest.approx(tau_b(a, b))
    assert found.pearson.value == pytest.approx(np.corrcoef(expit(a), expit(b))[0, 1])
    ranks = [np.array([sorted(v).index(x) + (np.sum(v == x) - 1) / 2 for x in v]) for v in (a, b)]
    assert found.spearman.value == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found.ties == (1, 1)


def test_r_miss_is_eq_21() -> None:
    """Mistakes count as shared only where both name the same class: truth 0, network 1, surrogate 2 shares nothing."""

    def of(labels: list[int], network: list[int], surrogate: list[int]) -> float | None:
        return r_miss(np.array(labels), np.array(network), np.array(surrogate)).value

    assert of([0], [1], [2]) == 0.0
    assert of([0], [1], [1]) == 1.0
    # right, alike, different, the network alone, the surrogate alone
    assert of([0, 0, 0, 0, 0], [0, 1, 1, 2, 0], [0, 1, 2, 0, 2]) == pytest.approx(1 / 4)
    logits = np.eye(3)
    assert faithfulness(np.array([0]), logits[[1]], logits[[2]], bootstrap=0).r_miss.value == 0.0


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
    assert r_miss(labels, labels, np.array([0, 1, 0, 0, 0])).value == 0
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
        (np.array([0, 1, 1]), np.full((3, 2), np.nan), r"surrogate's logits are not known .*got 3 without"),
    ],
)
def test_bad_input_gets_one_line(labels: np.ndarray, surrogate: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        faithfulness(labels, np.zeros((3, 2)), surrogate)
    with pytest.raises(UsageError, match="do not fit together"):
        faithfulness(np.zeros(3, int), np.zeros(3), np.zeros(3))
    with pytest.raises(UsageError, match="no queries"):
        faithfulness(np.zeros(0, int), np.zeros((0, 2)), np.zeros((0, 2)))


def two_classes(z: np.ndarray) -> np.ndarray:
    """Logits of two classes of which the second's logit is z."""
    return np.stack([np.zeros_like(z), z], axis=1)


TRUE = {
    "phi1": {"nu": 1.7, "mu": -0.4},
    "phi2": {"nu": 6.0, "mu": -2.0, "alpha": 0.5, "beta": 0.7},
    "phi3": {"nu": -5.0, "mu": 0.3, "alpha": -0.5, "beta": 0.4},
}


def test_maps_by_hand() -> None:
    """Φ² passes ν/2 + μ at α and 3ν/4 + μ at α + β ln 3; Φ³ passes 1/2 + μ at α and ν/4 + 1/2 + μ at α - 2β."""
    maps = {
        name: Linearisation(name, "logits", p, Measure(0, None, 0), Measure(0, None, 0), True, 0)
        for name, p in TRUE.items()
    }
    assert maps["phi1"](np.array(2.0)) == pytest.approx(1.7 * 2 - 0.4)
    np.testing.assert_allclose(maps["phi2"](np.array([0.5, 0.5 + 0.7 * np.log(3)])), [3 - 2, 4.5 - 2])
    np.testing.assert_allclose(maps["phi3"](np.array([-0.5, -0.5 - 0.8])), [0.5 + 0.3, -1.25 + 0.5 + 0.3])


def test_r_squared_by_hand() -> None:
    """Observations 1, 2, 3 against 1, 2, 4: residuals 0, 0, -1, spread 2. The other way the spread is 14/3."""
    y, x = np.array([1.0, 2, 3]), np.array([1.0, 2, 4])
    assert r_squared(x, y).value == pytest.approx(1 - 1 / 2)
    assert r_squared(y, x).value == pytest.approx(1 - 3 / 14)


def test_r_squared_of_what_does_not_vary_is_undefined() -> None:
    """Also where equal values differ from their mean by rounding, as three times 0.1 do."""
    for y in (np.full(3, 0.1), np.full(41, 2.7)):
        assert r_squared(y + 1e-3, y).note == "all probabilities of the network are equal"
    assert r_squared(np.ones(1), np.ones(1)).note == "fewer than two values are left"
    rng = np.random.default_rng(0)
    labels, surrogate = np.zeros(41, int), rng.standard_normal((41, 2))
    for name in MAPS:
        found = linearise(labels, np.tile([-1, 2.7], (41, 1)), surrogate, name)
        assert str(found.r2) == "n/a (all probabilities of the network are equal)"
    nearly = np.tile([0.3, 0.1], (41, 1)) + 1e-17 * surrogate
    found = linearise(labels, surrogate, nearly, "phi2")
    assert not found.converged
    with pytest.raises(UsageError, match=r"there is no map .*surrogate are equal"):
        found(np.zeros(3))


@pytest.mark.parametrize("seed", range(5))
def test_a_straight_line_is_found_by_every_map(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.standard_normal(200)
    network = two_classes(2 * z + 0.5 * rng.standard_normal(200))
    found = [linearise(np.zeros(200, int), network, two_classes(z), name, bootstrap=0) for name in MAPS]
    assert all(curve.converged for curve in found)
    assert [curve.r2.value for curve in found] == pytest.approx([found[0].r2.value] * 3, abs=0.02)


@pytest.mark.parametrize("name", MAPS)
def test_linearisation_finds_the_curve_that_made_the_data(name: str) -> None:
    rng = np.random.default_rng(3)
    z = rng.uniform(-4, 5, 400)
    y = Linearisation(name, "logits", TRUE[name], Measure(0, None, 0), Measure(0, None, 0), True, 0)(z)
    found = linearise(rng.integers(0, 2, 400), two_classes(y), two_classes(z), name, bootstrap=20)
    assert found.parameters == pytest.approx(TRUE[name], rel=1e-4)
    assert found.r2.value == pytest.approx(1)
    assert found.r2_log_p.value == pytest.approx(1)
    assert (found.r2.n, found.masked) == (200, 0)


def test_linearisation_of_probabilities() -> None:
    rng = np.random.default_rng(5)
    z, labels = rng.uniform(-4, 5, 400), rng.integers(0, 2, 400)
    network = two_classes((z - 0.5) / 0.7)  # p = Φ²(z) of ν = 1, μ = 0
    found = linearise(labels, network, two_classes(z), "phi2", target="probabilities", bootstrap=0)
    assert found.parameters == pytest.approx({"nu": 1, "mu": 0, "alpha": 0.5, "beta": 0.7}, rel=1e-3, abs=1e-5)
    assert found.r2.value == pytest.approx(1)
    straight = linearise(labels, network, two_classes(z), "phi1", target="probabilities", bootstrap=0)
    assert 0.8 < straight.r2.value < 0.99
    assert str(straight.r2_log_p) == "n/a (the map leaves (0, 1))"


def test_of_more_than_two_classes_all_are_compared() -> None:
    rng = np.random.default_rng(6)
    surrogate, labels = rng.standard_normal((60, 3)), rng.integers(0, 3, 60)
    logits = class_logits(surrogate)
    p = softmax(surrogate, axis=1)
    np.testing.assert_allclose(logits, np.log(p / (1 - p)))
    network = surrogate + 0.5 * rng.standard_normal((60, 3))
    found = linearise(labels, network, surrogate, bootstrap=0)
    rows = np.random.default_rng(0).permutation(60)
    fit, judge = rows[:30], rows[30:]
    slope, intercept = np.polyfit(logits[fit].ravel(), class_logits(network)[fit].ravel(), 1)
    assert found.parameters == pytest.approx({"nu": slope, "mu": intercept})
    mapped, truth = slope * logits[judge] + intercept, class_logits(network)[judge]
    assert found.r2.value == pytest.approx(r_squared(mapped.ravel(), truth.ravel()).value)
    own = np.arange(30), labels[judge]
    assert found.r2_log_p.value == pytest.approx(
        r_squared(np.log(expit(mapped[own])), np.log(softmax(network, axis=1)[judge][own])).value
    )


def test_linearisation_judges_on_rows_it_was_not_fitted_on_and_masks_saturated_ones() -> None:
    rng = np.random.default_rng(4)
    z, labels = rng.standard_normal(300), np.zeros(300, int)
    network = z + rng.standard_normal(300)

    def found(y: np.ndarray, x: np.ndarray) -> Linearisation:
        return linearise(labels[: len(x)], two_classes(y), two_classes(x), bootstrap=0)

    assert found(network, z).r2.value == pytest.approx(0.5, abs=0.15)
    assert found(rng.standard_normal(300), z).r2.value < 0.1
    network[:30] = 500
    assert found(network, z).masked == 30
    assert "not saturated" in found(network[:35], z[:35]).r2.note
    assert "are equal" in found(network, np.zeros(300)).r2.note
    with pytest.raises(UsageError, match=r"unknown map .*phi1, phi2, phi3"):
        linearise(labels, two_classes(network), two_classes(z), "phi4")


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
