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
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.special import expit, log_expit

from gradstore.errors import UsageError
from gradstore.explain.faithfulness import Measure, Resamples, checked_labels, is_constant, saturated, with_error
from gradstore.explain.surrogate import KernelGLM
from gradstore.explain.surrogate.alpha import log_odds
from gradstore.explain.surrogate.training_data import two_logits
from gradstore.store.present_rows import present_rows
from gradstore.store.rows import Rows

MAPS = ("phi1", "phi2", "phi3")
TARGETS = ("logits", "probabilities")
_FEWEST = 8  # queries in a half
_WIDTHS = (0.1, 1.0, 10.0)  # β to start from, in units of the logits' spread: from a step to nearly a straight line
_NARROWEST, _WIDEST = 1e-3, 1e3  # β beyond which Φ² and Φ³ are a step, or straight lines, to rounding


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
        converged: whether the fit ended at a minimum.
        masked: values left out because the network's or the surrogate's probability rounds to 0 or 1 in float32.
    """

    name: str
    target: str
    parameters: dict[str, float]
    r2: Measure
    r2_log_p: Measure
    converged: bool
    masked: int

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """What the map expects of the network at the surrogate's logits x, of any shape.

        Returns:
            float64, of the shape of x.

        Raises:
            UsageError: there is no map, since nothing could be fitted; `r2.note` says why.
        """
        if not self.parameters:
            raise UsageError("there is no map", where=self.name, got=self.r2.note)
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

    Returns:
        The map and its R².

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
    if len(fit) < _FEWEST or is_constant(x[fit][kept[fit]]):
        few = len(fit) < _FEWEST
        why = "too few queries are not saturated" if few else "all probabilities of the surrogate are equal"
        nothing = Measure(None, None, len(judge), why)
        return Linearisation(name, target, {}, nothing, nothing, converged=False, masked=masked)
    parameters, converged = _fitted(name, x[fit][kept[fit]], y[fit][kept[fit]])
    resamples = Resamples(rng, len(judge), bootstrap)
    mapped = _CURVES[name](x[judge], **parameters)
    r2 = with_error(lambda a, b, ok: r_squared(a[ok], b[ok]), (mapped, y[judge], kept[judge]), resamples)
    r2 = replace(r2, n=len(judge))
    logs = _log_p(mapped, labels[judge], target), log_expit(log_odds(network, labels)[judge])
    known = _of_class(kept[judge], labels[judge])
    r2_log_p = with_error(_r_squared_within, (*logs, known), resamples)
    return Linearisation(name, target, parameters, r2, r2_log_p, converged, masked)


def linearise_store(
    model: KernelGLM, queries: Rows, *, target: str = "logits", bootstrap: int = 200, seed: int = 0
) -> list[Linearisation]:
    """All three maps for a surrogate and the network's logits and labels of some rows; see `linearise`."""
    queries = present_rows(queries)
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

    Returns:
        R²; no value where it is undefined, and why.
    """
    if len(y) < 2:
        return Measure(None, None, len(y), "fewer than two values are left")
    if is_constant(y):
        return Measure(None, None, len(y), "all probabilities of the network are equal")
    return Measure(1 - float(((y - x) ** 2).sum() / ((y - y.mean()) ** 2).sum()), None, len(y))


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


def _fitted(name: str, x: np.ndarray, y: np.ndarray) -> tuple[dict[str, float], bool]:
    """Parameters of least squares, and whether that is where the search ended.

    Given α and β, ν and μ are those of a line, so that only α and β are searched for (Golub and Pereyra, 1973), from
    several widths.

    Returns:
        (parameters, bool).
    """
    if name == "phi1":
        nu, mu = _line(x, y)
        return {"nu": nu, "mu": mu}, True
    curve, centre, spread = _CURVES[name], float(x.mean()), float(x.std())

    def parameters(p: np.ndarray) -> dict[str, float]:
        alpha, beta = centre + spread * float(p[0]), spread * float(np.exp(p[1]))
        nu, mu = _line(curve(x, 1.0, 0.0, alpha, beta), y)
        base = 0.5 if name == "phi3" else 0.0
        return {"nu": nu, "mu": mu + (nu - 1) * base, "alpha": alpha, "beta": beta}

    far = float(np.abs((x - centre) / spread).max())  # beyond the logits nothing bends
    bounds = ([-far, np.log(_NARROWEST)], [far, np.log(_WIDEST)])
    starts = [[0.0, np.log(width)] for width in _WIDTHS]
    found = [least_squares(lambda p: curve(x, **parameters(p)) - y, start, bounds=bounds) for start in starts]
    best = min(found, key=lambda result: result.cost)
    return parameters(best.x), bool(best.status > 0)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) of least squares; the slope is 0 where x does not vary."""
    centred = x - x.mean()
    square = float(centred @ centred)
    slope = float(centred @ y) / square if square > 0 else 0.0
    return slope, float(y.mean() - slope * x.mean())


def _phi1(x: np.ndarray, nu: float, mu: float) -> np.ndarray:
    return nu * x + mu


def _phi2(x: np.ndarray, nu: float, mu: float, alpha: float, beta: float) -> np.ndarray:
    return nu * expit((x - alpha) / beta) + mu


def _phi3(x: np.ndarray, nu: float, mu: float, alpha: float, beta: float) -> np.ndarray:
    return nu / np.pi * np.arctan(-(x - alpha) / (2 * beta)) + 0.5 + mu


_CURVES: dict[str, Callable[..., np.ndarray]] = {"phi1": _phi1, "phi2": _phi2, "phi3": _phi3}
