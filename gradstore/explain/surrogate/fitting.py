"""From training data to W and b: which way to compute, and which strength of the penalty."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from scipy.special import log_expit

from gradstore.errors import UsageError
from gradstore.explain.surrogate.alpha import choose_alpha
from gradstore.explain.surrogate.fit_settings import (
    Fitted,
    Settings,
    Solver,
    class_weights,
    hard_labels,
    require_usable,
    targets,
)
from gradstore.explain.surrogate.map_rows import PhiRows, weighted_sum
from gradstore.explain.surrogate.one_vs_rest import fit_one_vs_rest
from gradstore.explain.surrogate.softmax import PAIRS, factored, fit_softmax
from gradstore.explain.surrogate.subspace import LEAST, Subspace, capacity_within
from gradstore.explain.surrogate.training_data import TrainingData
from gradstore.explain.surrogate.training_gram import TrainingGram
from gradstore.machine.byte_counts import format_bytes

ALPHAS = {"multinomial": (1e-2, 1e-3, 1e-4, 1e-5, 1e-6), "sgd": (1e-1, 1e-2, 1e-3, 1e-4)}

FACTOR_COPIES = 3
"""Float64 matrices [n, n] that factoring a Gram matrix holds."""


def fit(data: TrainingData, settings: Settings) -> Fitted:
    """Fit a surrogate, choosing alpha first where that is asked for.

    Returns:
        W, b and how the fit went.

    Raises:
        UsageError: a setting is unusable, or memory too small.
    """
    require_usable(data, settings)
    make = _multinomial if settings.backend == "multinomial" else _one_vs_rest
    with make(data, settings) as solver:
        scores: dict[float, float] = {}
        alpha = settings.alpha
        if isinstance(alpha, str):
            alpha, scores = choose_alpha(solver, ALPHAS[settings.backend], data, settings)
        fitted = solver.fit(float(alpha), None)
    if fitted.vectors is None and data.rows is not None:
        fitted = replace(fitted, vectors=weighted_sum(data.rows, fitted.coef))
    return replace(fitted, alpha_scores=scores)


class MultinomialSolver:
    """Softmax regression on features, or on a factor of the Gram matrix.

    The kernel is divided by the mean of κ(x_i, x_i); the penalty is multiplied instead.

    Args:
        rows: features whose inner products are the kernel.
        memory: bytes for what is held beside them.
        data: what is learnt from.
        settings: of the fit.
    """

    def __init__(self, rows: PhiRows, memory: int, data: TrainingData, settings: Settings) -> None:
        self._rows, self._settings = rows, settings
        self._is_phi = rows is data.rows
        self._subspace = Subspace(rows, _capacity(rows, len(data.classes), memory, settings), settings.seed)
        self._scale = self._subspace.mean_square
        self._targets = targets(data, settings)
        self._weights = class_weights(data, settings)[hard_labels(data, settings)]
        self._logits = np.empty(self._targets.shape)

    def fit(self, alpha: float, keep: np.ndarray | None) -> Fitted:
        """See `Solver`; rows left out weigh nothing."""
        weights = self._weights if keep is None else np.where(keep, self._weights, 0.0)
        found = fit_softmax(
            self._subspace,
            self._rows,
            self._targets,
            weights,
            alpha * self._scale,
            norm=self._scale**0.5,
            tolerance=self._settings.tolerance,
            max_iter=self._settings.max_iter,
        )
        self._logits = found.logits
        return Fitted(
            found.weights,
            found.intercept,
            vectors=found.vectors if self._is_phi else None,
            alpha=alpha,
            n_iter=found.iterations,
            loss=found.loss,
            converged=found.logit_error <= self._settings.tolerance,
            reason=found.reason,
            logit_error=found.logit_error,
        )

    def held_out(self, fitted: Fitted, keep: np.ndarray) -> np.ndarray:
        """See `Solver`; the fit has already computed them."""
        return self._logits[~keep]


class OneVsRestSolver:
    """One logistic model a class on the rows of the Gram matrix, divided by the mean of its diagonal."""

    def __init__(self, gram: TrainingGram, data: TrainingData, settings: Settings) -> None:
        self._gram, self._settings = gram, settings
        self._scale = 1.0 if data.phi is not None and data.phi.kernel.normalised else gram.mean_diagonal()
        self._labels = hard_labels(data, settings)
        self._class_weights = class_weights(data, settings)

    def fit(self, alpha: float, keep: np.ndarray | None) -> Fitted:
        """See `Solver`; rows left out are no columns either."""
        settings = self._settings
        found = fit_one_vs_rest(
            self._gram.part(keep, self._scale),
            self._labels if keep is None else self._labels[keep],
            len(self._class_weights),
            self._class_weights,
            alpha,
            tolerance=settings.tolerance,
            max_iter=settings.max_iter,
            seed=settings.seed,
            shuffle=settings.shuffle,
        )
        return Fitted(
            found.weights / self._scale,
            found.intercept,
            vectors=None,
            alpha=alpha,
            n_iter=len(found.losses),
            loss=found.losses[-1],
            converged=found.converged or settings.tolerance <= 0,
            reason="the loss stopped falling" if found.converged else "all epochs were used",
            logit_error=float("nan"),
        )

    def held_out(self, fitted: Fitted, keep: np.ndarray) -> np.ndarray:
        """See `Solver`."""
        values = [block[~keep[span]][:, keep] @ fitted.coef.T for span, block in self._gram.blocks()]
        return log_expit(np.concatenate(values) + fitted.intercept)


@contextmanager
def _multinomial(data: TrainingData, settings: Settings) -> Iterator[Solver]:
    """On features, unless a factor of the Gram matrix is smaller and fits the memory."""
    n = data.n
    factor_bytes = 8 * n * (FACTOR_COPIES * n + 2 * PAIRS * len(data.classes))
    fits = factor_bytes <= settings.memory
    if data.rows is not None and not (fits and n < data.rows.length):
        yield MultinomialSolver(data.rows, settings.memory // 2, data, settings)
        return
    if not fits:
        _refuse_memory("too little memory to factor the Gram matrix", factor_bytes, settings.memory)
    rows = factored(data.gram_in_memory(settings.memory - 16 * n * n))
    yield MultinomialSolver(rows, settings.memory - 16 * n * n, data, settings)


def _capacity(rows: PhiRows, classes: int, memory: int, settings: Settings) -> int:
    """Directions that fit the memory."""
    value = rows.bytes // (rows.n * rows.length)
    found, need = capacity_within(memory, rows.n, rows.length, classes, value, 2 * PAIRS + 8)
    if found < min(LEAST, rows.length):
        _refuse_memory("too little memory for a fit on the features", settings.memory - memory + need, settings.memory)
    return found


@contextmanager
def _one_vs_rest(data: TrainingData, settings: Settings) -> Iterator[Solver]:
    with data.gram(settings.memory, settings.scratch) as matrix:
        yield OneVsRestSolver(TrainingGram(matrix, settings.memory // 2), data, settings)


def _refuse_memory(what: str, need: int, given: int) -> None:
    raise UsageError(
        what,
        where="--memory",
        expected=f"at least {format_bytes(need)}",
        got=format_bytes(given),
        hint="The backend sgd reads the Gram matrix a few rows at a time",
    )
