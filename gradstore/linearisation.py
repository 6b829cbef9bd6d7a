"""Linearisation: how well one curve turns a surrogate's logits into its network's (Engel et al., ICLR 2024, App. L).

Three invertible maps x ↦ y, with σ(u) = exp(u) / (1 + exp(u)):

    Φ¹(x) = ν x + μ
    Φ²(x) = ν σ((x - α) / β) + μ
    Φ³(x) = (ν / π) arctan(-(x - α) / (2 β)) + 1/2 + μ

x is the surrogate's logit of a class and y the network's output for it: its logit, or its probability. A logit is
log(p / (1 - p)) of the class's softmax probability p (App. L), which for a network with one output is that output. Of
two classes the second is compared, of more every one, their values put one after another. Values whose probability
rounds to 0 or 1 are left out, as in the paper.

Each map is fitted by least squares on one half of the queries and judged by R² on the other half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.special import expit, log_expit

from gradstore.errors import UsageError
from gradstore.faithfulness import Measure, checked_labels, saturated, with_error
from gradstore.store import FeatureStore
from gradstore.surrogate import KernelGLM
from gradstore.surrogate.alpha import log_odds
from gradstore.surrogate.training_data import two_logits

MAPS = ("phi1", "phi2", "phi3")
TARGETS = ("logits", "probabilities")
_FEWEST = 8  # queries in a half
_WIDTHS = (0.3, 1.0, 3.0, 10.0)  # β to start from, of standardised logits: from a step to nearly a straight line
_WIDEST = 1e3  # β beyond which Φ² and Φ³ are straight lines to rounding


@dataclass(frozen=True)
class Linearisation:
    """One fitted map.

    Attributes:
        name: "phi1", "phi2" or "phi3".
        target: "logits" or "probabilities", what it maps to.
        parameters: ν, μ and, except for phi1, α and β > 0, by their names "nu", "mu", "alpha", "beta"; none where
            nothing could be fitted.
        r2: of the network's values y and the map's Φ(x), on the half that it was not fitted on (App. G).
        r2_log_p: the same of the natural logarithm of the correct class's probability, for which App. G writes R²;
            undefined where the map leaves (0, 1).
        masked: values left out because the network's or the surrogate's probability rounds to 0 or 1 in float32.
    """

    name: str
    target: str
    parameters: dict[str, float]
    r2: Measure
    r2_log_p: Measure
    masked: int

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """What the map expects of the network at the surrogate's logits x, of any shape."""
        return _CURVES[self.name](x, **self.parameters)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; null where undefined."""
        return asdict(self)


def linearise(
    labels: np.ndarray,
    network: np.ndarray,
    surrogate: np.ndarray,
    name: str = "phi1",
    *,
    target: str = "logits",
    bootstrap: int = 200,
    seed: int = 0,
) -> Linearisation:
    """Fit one map on a random half of the queries and judge it on the other.

    Args:
        labels: correct classes, int64 [m].
        network: logits of the network, [m, classes].
        surrogate: numbers whose softmax is the surrogate's probabilities, [m, classes].
        name: which map.
        target: "logits" or "probabilities" of the network.
        bootstrap: resamples of the second half's queries for the errors of R²; 0 for none.
        seed: of the halves and the resamples.

    Raises:
        UsageError: there is no such map or target, shapes differ, or a query has no label.
    """
    labels = checked_labels(labels, network, surrogate)
    for what, value, choices in (("map", name, MAPS), ("target", target, TARGETS)):
        if value not in choices:
            raise UsageError(f"unknown {what}", where=what, expected=f"one of {', '.join(choices)}", got=repr(value))
    x, logits = class_logits(surrogate), class_logits(network)
    y = logits if target == "logits" else expit(logits)
    kept = ~(saturated(x) | saturated(logits)) & np.isfinite(x) & np.isfinite(logits)
    masked = int((~kept).sum())
    rng = np.random.default_rng(seed)
    rows = rng.permutation(np.flatnonzero(kept.any(axis=1)))
    fit, judge = np.split(rows, [len(rows) // 2])
    if len(fit) < _FEWEST or np.ptp(x[fit][kept[fit]]) == 0:
        few = len(fit) < _FEWEST
        why = "too few queries are not saturated" if few else "all probabilities of the surrogate are equal"
        nothing = Measure(None, None, len(judge), why)
        return Linearisation(name, target, {}, nothing, nothing, masked)
    parameters = _fitted(name, x[fit][kept[fit]], y[fit][kept[fit]])
    resamples = [rng.integers(0, len(judge), len(judge)) for _ in range(bootstrap)]
    mapped = _CURVES[name](x[judge], **parameters)
    r2 = with_error(lambda a, b, ok: r_squared(a[ok], b[ok]), (mapped, y[judge], kept[judge]), resamples)
    logs = _log_p(mapped, labels[judge], target), log_expit(log_odds(network, labels)[judge])
    known = _of_class(kept[judge], labels[judge])
    r2_log_p = with_error(_r_squared_within, (*logs, known), resamples)
    return Linearisation(name, target, parameters, r2, r2_log_p, masked)


def linearise_store(
    model: KernelGLM, queries: FeatureStore, *, target: str = "logits", bootstrap: int = 200, seed: int = 0
) -> list[Linearisation]:
    """All three maps for a surrogate and the network's logits and labels in a store; see `linearise`."""
    basis, logits = model.log_odds_basis(queries), two_logits(queries.logits)
    return [
        linearise(queries.labels, logits, basis, name, target=target, bootstrap=bootstrap, seed=seed) for name in MAPS
    ]


def class_logits(basis: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) of the softmax p of numbers [m, classes]: of the second of two classes, [m, 1], or of all."""
    classes = range(1, 2) if basis.shape[1] == 2 else range(basis.shape[1])
    return np.stack([log_odds(basis, np.full(len(basis), c)) for c in classes], axis=1)


def r_squared(x: np.ndarray, y: np.ndarray) -> Measure:
    """Coefficient of determination of observations y and what a model says of them, x (App. G).

    1 - Σ_i (y_i - x_i)² / Σ_i (y_i - ȳ)². It is not symmetric; y is the network here.
    """
    if not len(y):
        return Measure(None, None, 0, "no values are left")
    total = float(((y - y.mean()) ** 2).sum())
    if total == 0:
        return Measure(None, None, len(y), "all probabilities of the network are equal")
    return Measure(1 - float(((y - x) ** 2).sum()) / total, None, len(y))


def _r_squared_within(x: np.ndarray, y: np.ndarray, ok: np.ndarray) -> Measure:
    if np.isnan(x[ok]).any():
        return Measure(None, None, int(ok.sum()), "the map leaves (0, 1)")
    return r_squared(x[ok], y[ok])


def _log_p(mapped: np.ndarray, labels: np.ndarray, target: str) -> np.ndarray:
    """Logarithm of the correct class's probability that a map gives, float64 [m]; NaN where it is none."""
    if target == "logits":
        sign = np.where(labels == 1, 1.0, -1.0) if mapped.shape[1] == 1 else 1.0
        return log_expit(sign * _of_class(mapped, labels))
    p = _of_class(mapped, labels)
    p = np.where(labels == 1, p, 1 - p) if mapped.shape[1] == 1 else p
    return np.log(np.where((p > 0) & (p < 1), p, np.nan))


def _of_class(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The column of each row's label, or the only one; [m]."""
    return values[:, 0] if values.shape[1] == 1 else values[np.arange(len(labels)), labels]


def _fitted(name: str, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Least squares; of Φ² and Φ³ the best from several widths, each begun where its slope at α is the line's."""
    slope, intercept = np.polyfit(x, y, 1)
    if name == "phi1":
        return {"nu": float(slope), "mu": float(intercept)}
    centre, spread = float(x.mean()), float(x.std())
    rise = {"phi2": 4.0, "phi3": -2 * np.pi}[name]  # ν / (slope at α · β)
    height = {"phi2": 0.5, "phi3": 0.0}[name]  # (Φ(α) - base) / ν
    base = {"phi2": 0.0, "phi3": 0.5}[name]
    # α and β are in units of the spread from here on, so that a step is as large in each direction.
    curve = lambda p: _CURVES[name](x, p[0], p[1], centre + spread * p[2], spread * p[3])  # noqa: E731
    found = []
    for width in _WIDTHS:
        nu = rise * slope * width * spread
        start = [nu, slope * centre + intercept - height * nu - base, 0.0, width]
        bounds = ([-np.inf, -np.inf, -np.inf, 1e-3], [np.inf, np.inf, np.inf, _WIDEST])
        found.append(least_squares(lambda p: curve(p) - y, start, bounds=bounds, x_scale="jac"))
    nu, mu, alpha, beta = min(found, key=lambda result: result.cost).x
    return {
        "nu": float(nu),
        "mu": float(mu),
        "alpha": float(centre + spread * alpha),
        "beta": float(spread * beta),
    }


def _phi1(x: np.ndarray, nu: float, mu: float) -> np.ndarray:
    return nu * x + mu


def _phi2(x: np.ndarray, nu: float, mu: float, alpha: float, beta: float) -> np.ndarray:
    return nu * expit((x - alpha) / beta) + mu


def _phi3(x: np.ndarray, nu: float, mu: float, alpha: float, beta: float) -> np.ndarray:
    return nu / np.pi * np.arctan(-(x - alpha) / (2 * beta)) + 0.5 + mu


_CURVES: dict[str, Callable[..., np.ndarray]] = {"phi1": _phi1, "phi2": _phi2, "phi3": _phi3}
