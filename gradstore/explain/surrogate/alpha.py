"""Choose the strength of the penalty by what a fit on most training rows says of the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax
from scipy.stats import kendalltau
from sklearn.model_selection import StratifiedShuffleSplit

from gradstore.errors import UsageError
from gradstore.explain.surrogate.fit_settings import Settings, Solver
from gradstore.explain.surrogate.training_data import TrainingData

HELD_OUT = 0.2


def choose_alpha(
    solver: Solver, candidates: Sequence[float], data: TrainingData, settings: Settings
) -> tuple[float, dict[float, float]]:
    """The candidate that does best on rows held out, and how each did.

    By τ: Kendall's τ between the surrogate's and the network's log-odds of the labelled class. The rows held out are
    ones that the network was trained on; the surrogate was not. By likelihood, or where the network's outputs are not
    known: mean log-likelihood of the labels.

    Returns:
        (alpha, alpha -> its score).
    """
    keep = _kept(data, settings.seed)
    scores = {}
    for alpha in candidates:
        fitted = solver.fit(alpha, keep)
        scores[alpha] = _score(solver.held_out(fitted, keep), data, ~keep, settings)
    return max(scores, key=lambda alpha: scores[alpha]), scores


def log_odds(basis: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Logit of p_y for p = softmax(basis), float64 [n]; it does not saturate as p_y itself does.

    Args:
        basis: [n, classes].
        labels: y, int64 [n].

    Returns:
        float64 [n].
    """
    at = np.arange(len(labels))
    others = np.array(basis, np.float64)
    others[at, labels] = -np.inf
    return basis[at, labels] - np.logaddexp.reduce(others, axis=1)


def _kept(data: TrainingData, seed: int) -> np.ndarray:
    """Rows to fit on, bool [n]; the others hold their share of every class."""
    split = StratifiedShuffleSplit(1, test_size=HELD_OUT, random_state=seed)
    try:
        rows, _ = next(split.split(np.zeros((data.n, 1)), data.labels))
    except ValueError as error:
        raise UsageError("too few rows to choose alpha", where="--alpha", got=str(error)) from error
    keep = np.zeros(data.n, bool)
    keep[rows] = True
    return keep


def _score(basis: np.ndarray, data: TrainingData, held: np.ndarray, settings: Settings) -> float:
    labels = data.labels[held]
    if settings.select == "likelihood" or data.outputs is None:
        return float(log_softmax(basis, axis=1)[np.arange(len(labels)), labels].mean())
    tau = float(kendalltau(log_odds(basis, labels), log_odds(data.outputs[held], labels)).statistic)
    return tau if np.isfinite(tau) else -1.0
