"""Linearisation: how well one curve turns a surrogate's log-odds into its network's (Engel et al., ICLR 2024, App. L).

Three invertible maps from the surrogate's log-odds z of the correct class to the network's probability p:

    Φ¹   p = σ((z - A) / K)                        two parameters, a straight line in log-odds
    Φ²   p = σ((z - A) / K)^(1/ν)                  a generalised logistic
    Φ³   p = (1/2 + arctan((z - A) / K) / π)^(1/ν)  heavier tails

Each is fitted by least squares in log-odds on one half of the queries and judged by R² on the other half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.special import log_expit

from gradstore.faithfulness import Measure, saturated, with_error
from gradstore.store import FeatureStore
from gradstore.surrogate import KernelGLM
from gradstore.surrogate.alpha import log_odds
from gradstore.surrogate.training_data import two_logits

MAPS = ("phi1", "phi2", "phi3")
_FEWEST = 8  # queries in a half


@dataclass(frozen=True)
class Linearisation:
    """One fitted map.

    Attributes:
        name: "phi1", "phi2" or "phi3".
        parameters: A, K and, except for phi1, ν.
        r2: R² in log-odds on the half that it was not fitted on.
        masked: queries left out because the network's or the surrogate's probability rounds to 0 or 1 in float32.
    """

    name: str
    parameters: tuple[float, ...]
    r2: Measure
    masked: int

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """The network's log-odds that the map expects at the surrogate's log-odds z."""
        return _CURVES[self.name](z, np.asarray(self.parameters))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; null where undefined."""
        return asdict(self)


def linearise(
    network: np.ndarray, surrogate: np.ndarray, name: str = "phi1", *, bootstrap: int = 200, seed: int = 0
) -> Linearisation:
    """Fit one map on a random half of the queries and judge it on the other.

    Args:
        network: log-odds of the correct class, float64 [m].
        surrogate: the same of the surrogate.
        name: which map.
        bootstrap: resamples of the second half for the error of R²; 0 for none.
        seed: of the halves and the resamples.
    """
    masked = saturated(network) | saturated(surrogate) | ~np.isfinite(network) | ~np.isfinite(surrogate)
    rng = np.random.default_rng(seed)
    rows = rng.permutation(np.flatnonzero(~masked))
    half = len(rows) // 2
    fit, judge = rows[:half], rows[half:]
    if half < _FEWEST or np.ptp(surrogate[fit]) == 0:
        why = "too few queries are not saturated" if half < _FEWEST else "all probabilities of the surrogate are equal"
        return Linearisation(name, (), Measure(None, None, len(judge), why), int(masked.sum()))
    parameters = _fitted(name, surrogate[fit], network[fit])
    expected = _CURVES[name](surrogate[judge], parameters)
    resamples = [rng.integers(0, len(judge), len(judge)) for _ in range(bootstrap)]
    r2 = with_error(_r2, (network[judge], expected), resamples)
    return Linearisation(name, tuple(parameters.tolist()), r2, int(masked.sum()))


def linearise_store(
    model: KernelGLM, queries: FeatureStore, *, bootstrap: int = 200, seed: int = 0
) -> list[Linearisation]:
    """All three maps for a surrogate and the network's logits and labels in a store; see `linearise`."""
    surrogate = log_odds(model.log_odds_basis(queries), queries.labels)
    network = log_odds(two_logits(queries.logits), queries.labels)
    return [linearise(network, surrogate, name, bootstrap=bootstrap, seed=seed) for name in MAPS]


def _fitted(name: str, z: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares from the straight line; ν is kept within [0.1, 10], K above 0."""
    slope = max(float(np.cov(z, target)[0, 1] / np.var(z, ddof=1)), 1e-3)
    line = np.array([float(z.mean() - target.mean() / slope), 1 / slope])
    if name == "phi1":
        start, low, high = line, [-np.inf, 1e-9], [np.inf, np.inf]
    else:
        start, low, high = np.append(line, 1.0), [-np.inf, 1e-9, 0.1], [np.inf, np.inf, 10.0]
    found = least_squares(lambda p: _CURVES[name](z, p) - target, start, bounds=(low, high))
    return found.x


def _logit_of_power(log_s: np.ndarray, nu: float) -> np.ndarray:
    """Logit of s^(1/ν) from log s < 0, without rounding s to 1."""
    log_p = np.minimum(log_s / nu, -1e-300)
    return log_p - np.log(-np.expm1(log_p))


def _phi1(z: np.ndarray, p: np.ndarray) -> np.ndarray:
    return (z - p[0]) / p[1]


def _phi2(z: np.ndarray, p: np.ndarray) -> np.ndarray:
    return _logit_of_power(log_expit((z - p[0]) / p[1]), p[2])


def _phi3(z: np.ndarray, p: np.ndarray) -> np.ndarray:
    u = (z - p[0]) / p[1]
    # log(1/2 + arctan(u)/π): far out on the left the sum cancels, so arctan(u) = -π/2 - arctan(1/u) is used there.
    with np.errstate(divide="ignore", invalid="ignore"):
        log_s = np.where(u < 0, np.log(-np.arctan(1 / u) / np.pi), np.log1p(np.arctan(u) / np.pi - 0.5))
    return _logit_of_power(log_s, p[2])


_CURVES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"phi1": _phi1, "phi2": _phi2, "phi3": _phi3}


def _r2(truth: np.ndarray, expected: np.ndarray) -> Measure:
    spread = float(((truth - truth.mean()) ** 2).sum())
    if spread == 0:
        return Measure(None, None, len(truth), "all probabilities of the network are equal")
    return Measure(1 - float(((truth - expected) ** 2).sum()) / spread, None, len(truth))
