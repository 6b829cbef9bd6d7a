"""`KernelGLM`: fit, ask, save and load a kernel generalised linear model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_expit, log_softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from gradstore.errors import CorruptError
from gradstore.explain.surrogate.fit_settings import Settings
from gradstore.explain.surrogate.fitting import fit
from gradstore.explain.surrogate.map_rows import ArrayRows, StoreRows, scores
from gradstore.explain.surrogate.saved import load_fitted, save_fitted
from gradstore.explain.surrogate.training_data import TrainingData, kernel_on, new_array, training_data
from gradstore.explain.surrogate.training_gram import finite_rows
from gradstore.kernels.feature_map import FeatureMap
from gradstore.kernels.gram_matrix import Gram
from gradstore.machine.byte_counts import parse_bytes
from gradstore.store.present_rows import require_present
from gradstore.store.rows import Rows

Data = Rows | Gram | np.ndarray


class KernelGLM(ClassifierMixin, BaseEstimator):
    """A surrogate of a network: logits W κ(x, X) + b over the n training examples X (Engel et al., ICLR 2024, eq. 1).

    It learns what the network learnt; its aim is the network's softmax (eq. 2), and `evaluate` says how near it comes.
    Two ways to fit it (`backend`):

    - "multinomial": cross-entropy of the softmax with a penalty alpha/2 Σ_c ‖Σ_i W_ci Φ(x_i)‖² in the space
      of the kernel. Reads the features some 5 to 20 times (`gradstore.explain.surrogate.softmax`); where n < D and n²
      values fit the memory, it works on a factor of the Gram matrix instead, with the same result.
    - "sgd": the paper's: scikit-learn's `SGDClassifier(loss="log_loss", penalty="l2")` on rows of the Gram matrix, with
      the penalty alpha/2 ‖W‖² (the paper takes 1e-2 for many classes and 1e-4 for two). It is one-vs-rest: each class
      has a logistic model of its own, and probabilities are their sigmoids divided by their sum.

    A fitted surrogate holds W, and for kernels on features the one vector Σ_i W_ci Φ(x_i) of each class, so that
    answering queries takes one pass over the queries and not the training store. It is bound to the training store's
    fingerprint. An un-normalised kernel is divided by the mean of κ(x_i, x_i) while fitting.

    Args:
        kernel: on stores a name in `gradstore.kernels.definitions.PROJECTED`; "linear" or "cosine" on arrays [n, D];
            "precomputed", or the name of an exact kernel, on Gram matrices: files or arrays, [n, n] to fit and [m, n]
            to ask.
        backend: "multinomial" or "sgd".
        alpha: strength of the penalty, or "auto": chosen by what a fit on four fifths of the rows says of the rest.
        select: what "auto" goes by: "tau" (Kendall's τ with the network, where its outputs are known) or "likelihood".
        target: what is learnt: "labels"; or the network's own outputs, as "predictions" (its classes) or
            "probabilities" (multinomial only; Table 5).
        class_weight: "balanced" weights a row by n / (classes · rows of its class), as in the paper; a mapping gives
            weights by class; None does not weight.
        tolerance: multinomial: of the logits; sgd: of the loss, see `fit_one_vs_rest`.
        max_iter: iterations or epochs at most.
        memory: bytes, or text like "2GB", that features, Gram values and the optimiser may take.
        scratch: directory for the Gram matrix where "sgd" cannot hold it in memory (4 n² bytes).
        shuffle: "sgd" learns rows in a random order.
        random_state: seed of that order, of the rows held out, and of the sketch that "multinomial" begins with.

    Attributes:
        coef_: W, float64 [classes, n].
        intercept_: b, float64 [classes].
        classes_: labels [classes].
        vectors_: Σ_i W_ci Φ(x_i), float64 [classes, D]; None for Gram matrices.
        alpha_: strength that was used; with "auto", `alpha_scores_` says how each did.
        n_iter_: iterations, of two passes over the rows each, or epochs.
        converged_: whether the tolerance was met; `reason_` says why it stopped, `loss_` where.
        logit_error_: multinomial: bound on the error of a logit from stopping early.
        state_: what the kernel's feature map was fitted to, arrays by name; None of a kernel that fits nothing.
        n_features_in_: columns that queries must have: D, or n for a Gram matrix.

    Example:
        >>> model = gs.KernelGLM().fit(train)
        >>> model.predict(test).shape, model.coef_.shape
        ((8,), (10, 24))
    """

    def __init__(
        self,
        kernel: str = "proj-trntk",
        backend: str = "multinomial",
        *,
        alpha: float | str = 1e-4,
        select: str = "tau",
        target: str = "labels",
        class_weight: str | Mapping[Any, float] | None = "balanced",
        tolerance: float = 1e-3,
        max_iter: int = 2000,
        memory: int | str = "2GB",
        scratch: str | os.PathLike[str] | None = None,
        shuffle: bool = True,
        random_state: int = 0,
    ) -> None:
        self.kernel = kernel
        self.backend = backend
        self.alpha = alpha
        self.select = select
        self.target = target
        self.class_weight = class_weight
        self.tolerance = tolerance
        self.max_iter = max_iter
        self.memory = memory
        self.scratch = scratch
        self.shuffle = shuffle
        self.random_state = random_state

    def fit(self, X: Data, y: np.ndarray | None = None, *, outputs: np.ndarray | None = None) -> KernelGLM:
        """Fit W and b.

        Args:
            X: training store or any `Rows`, of which absent ones weigh nothing; Gram matrix [n, n] or array [n, D].
            y: labels [n]; default those of the store. Any values scikit-learn takes as classes.
            outputs: logits of the network [n, classes]; default those of the store. Needed where `target` is not
                "labels", and to select alpha by τ.

        Returns:
            Itself.

        Raises:
            UsageError: labels are missing or all the same, or a setting is unusable.
            NonFiniteError: a row's cosine is undefined, or the Gram matrix is not positive semidefinite.
            Others: as reading the store.
        """
        settings = self._settings()
        data = training_data(X, y, outputs, self.kernel, settings.target, settings.memory)
        fitted = fit(data, settings)
        fitted = replace(fitted, coef=data.in_places(fitted.coef))
        self.classes_, self.n_features_in_, self.binding_ = data.classes, data.columns, data.binding
        self.state_ = None if data.phi is None else data.phi.state
        for name, value in vars(fitted).items():
            setattr(self, f"{name}_", value)
        self._warn(data)
        return self

    def logits(self, X: Data) -> np.ndarray:
        """W κ(x, X) + b of each query, float64 [m, classes]; one pass over the queries.

        Of two classes fitted by "sgd", the first is the mirror of the second.

        Returns:
            float64 [m, classes].

        Raises:
            MismatchError: the queries are not of the same weights and settings, or of other training examples.
            UsageError: they are of another kind than what the surrogate was fitted on, or a row is absent: give
                `present_rows(X)`.
            NonFiniteError: the cosine of a query is undefined; names the row.
        """
        check_is_fitted(self)
        if isinstance(X, Rows):
            self.binding_.require_queries(X)
            require_present(X, np.arange(len(X)), where=X.where)
            rows = StoreRows(X, self.phi_on(X), parse_bytes(self.memory))
            self._require_columns(rows.length, X.where)
            return scores(rows, self.vectors_) + self.intercept_
        if isinstance(X, Gram):
            self.binding_.require_query_gram(X)
            return self._of_gram(X)
        self.binding_.require_kind("array", X)
        values = new_array(X, self)
        if self.vectors_ is None:
            return values @ self.coef_.T + self.intercept_
        return scores(ArrayRows(values, normalised=self.kernel == "cosine"), self.vectors_) + self.intercept_

    def phi_on(self, store: Rows) -> FeatureMap:
        """The feature map of a surrogate fitted on a store, for rows like its own."""
        return FeatureMap(kernel_on(self.kernel), store.schema.c, store.schema.K, state=self.state_)

    def decision_function(self, X: Data) -> np.ndarray:
        """Logits [m, classes]; for an array and two classes one number a row, above 0 for the second class.

        The exception is scikit-learn's convention.

        Returns:
            float64 [m, classes], or [m].
        """
        logits = self.logits(X)
        if isinstance(X, (Rows, Gram)) or len(self.classes_) > 2:
            return logits
        return logits[:, 1] if self.backend == "sgd" else logits[:, 1] - logits[:, 0]

    def log_odds_basis(self, X: Data) -> np.ndarray:
        """Numbers whose softmax is the surrogate's probabilities, float64 [m, classes].

        The logits themselves, or for "sgd" the logarithms of the sigmoids. What compares probabilities compares these,
        for they do not saturate.

        Returns:
            float64 [m, classes].
        """
        logits = self.logits(X)
        return log_expit(logits) if self.backend == "sgd" else logits

    def predict_proba(self, X: Data) -> np.ndarray:
        """Probabilities, float64 [m, classes]."""
        return np.exp(log_softmax(self.log_odds_basis(X), axis=1))

    def predict(self, X: Data) -> np.ndarray:
        """The class of the largest logit, [m]."""
        found = self.logits(X).argmax(axis=1)
        return self.classes_[found]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file whose header holds the settings and what the surrogate is bound to, as JSON.

        Returns:
            The path.

        Raises:
            NoSpaceError: the disk is full.
            UsageError: nothing can be written there.
        """
        check_is_fitted(self)
        return save_fitted(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KernelGLM:
        """Read what `save` wrote; it cannot name code.

        Returns:
            The surrogate.

        Raises:
            UsageError: there is no such file.
            CorruptError: it is damaged, or something else.
        """
        return load_fitted(cls, Path(path))

    def _settings(self) -> Settings:
        names = ("alpha", "select", "target", "class_weight", "tolerance", "max_iter", "scratch", "shuffle")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        return Settings(backend=self.backend, memory=parse_bytes(self.memory), seed=self.random_state, **given)

    def _require_columns(self, found: int, where: object) -> None:
        """A file may say that it is bound to these rows, and not be."""
        if found != self.n_features_in_:
            raise CorruptError(
                "the surrogate is not of such rows", where=where, expected=f"{self.n_features_in_} columns", got=found
            )

    def _of_gram(self, gram: Gram) -> np.ndarray:
        m, n = gram.shape
        self._require_columns(n, gram.path)
        step = max(1, parse_bytes(self.memory) // (16 * n))
        parts = [finite_rows(gram, at, min(at + step, m)) @ self.coef_.T for at in range(0, m, step)]
        return np.concatenate(parts) + self.intercept_

    def _warn(self, data: TrainingData) -> None:
        if not self.converged_:
            warnings.warn(
                f"the surrogate of {data.name} has not converged after {self.n_iter_} iterations ({self.reason_}); "
                "raise max_iter or alpha",
                ConvergenceWarning,
                stacklevel=3,
            )
