"""What a surrogate learns from: examples, labels and network outputs, checked before anything is computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_X_y

from gradstore.errors import UsageError
from gradstore.explain.surrogate.binding import Binding
from gradstore.explain.surrogate.map_rows import ArrayRows, PhiRows, StoreRows
from gradstore.explain.surrogate.training_gram import assembled, finite_rows, store_gram
from gradstore.indices import class_indices
from gradstore.kernels.definitions import PROJECTED, Kernel
from gradstore.kernels.feature_map import FeatureMap, require_served
from gradstore.kernels.gram_matrix import Gram
from gradstore.store.present_rows import present_rows
from gradstore.store.rows import Rows

ON_ARRAYS = ("linear", "cosine")


class OneClassError(UsageError, ValueError):
    """Labels of one class only; a ValueError too, as scikit-learn's callers expect."""


@dataclass
class TrainingData:
    """Training examples.

    Attributes:
        source: `Rows`, an array [n, D] of features, or a Gram matrix [n, n].
        phi: the feature map on stores; None otherwise.
        rows: Φ of the examples; None for Gram matrices.
        labels: indices into `classes`, int64 [n].
        classes: the labels' values.
        outputs: logits of the network, float64 [n, classes], where known.
        binding: what the surrogate will be bound to.
        columns: that queries must have.
        name: for messages.
        places: int64 [n], which rows of the store the examples are; None where they are all of it.
        size: rows of the store.
    """

    source: Rows | Gram | np.ndarray
    phi: FeatureMap | None
    rows: PhiRows | None
    labels: np.ndarray
    classes: np.ndarray
    outputs: np.ndarray | None
    binding: Binding
    columns: int
    name: str
    places: np.ndarray | None = None
    size: int = 0

    def in_places(self, weights: np.ndarray) -> np.ndarray:
        """Weights [classes, n] of the examples as weights of all rows of the store: absent ones weigh nothing."""
        if self.places is None:
            return weights
        out = np.zeros((len(weights), self.size))
        out[:, self.places] = weights
        return out

    @property
    def n(self) -> int:
        """Examples."""
        return len(self.labels)

    def gram(self, memory: int, scratch: Any) -> AbstractContextManager[np.ndarray | Gram]:
        """The Gram matrix while the context lasts, in memory or in a file."""
        if isinstance(self.source, Rows):
            assert self.phi is not None
            return store_gram(self.source, self.phi.kernel, memory, scratch)
        return nullcontext(self._given_gram())

    def gram_in_memory(self, memory: int) -> np.ndarray:
        """The Gram matrix, float64 [n, n], the caller's own."""
        if isinstance(self.source, Rows):
            assert self.phi is not None
            return assembled(self.source, self.phi.kernel, memory, np.float64)
        given = self._given_gram()
        return finite_rows(given, 0, self.n) if isinstance(given, Gram) else np.array(given, np.float64)

    def _given_gram(self) -> np.ndarray | Gram:
        if self.rows is None:
            assert not isinstance(self.source, Rows)
            return self.source
        phi = np.concatenate([block.numpy() for _, block in self.rows.blocks()])
        return phi @ phi.T


def kernel_on(name: str) -> Kernel:
    """The kernel on stores of a name.

    Returns:
        The kernel.

    Raises:
        UsageError: it is none.
    """
    if name not in PROJECTED:
        raise UsageError(
            "this kernel cannot be computed from a store",
            where="--kernel",
            expected=f"one of {', '.join(PROJECTED)}",
            got=repr(name),
            hint="Give the Gram matrix that gradstore.exact_gram computes",
        )
    return PROJECTED[name]


def training_data(X: Any, y: Any, outputs: Any, kernel: str, target: str, memory: int) -> TrainingData:
    """Check and gather what a fit needs; see `KernelGLM.fit` for the arguments.

    Returns:
        Everything that a fit needs.

    Raises:
        UsageError: labels are missing or all the same, or the kernel does not fit the data.
    """
    if isinstance(X, Rows):
        return _from_store(X, y, outputs, kernel_on(kernel), target, memory)
    if isinstance(X, Gram):
        return _from_gram(X, y, outputs, kernel)
    return _from_array(X, y, outputs, kernel)


def _from_store(whole: Rows, y: Any, outputs: Any, kernel: Kernel, target: str, memory: int) -> TrainingData:
    store = present_rows(whole.require_complete())
    require_served(kernel, store)
    if store is not whole:  # what is given is of all rows
        y, outputs = (of_present(given, whole) for given in (y, outputs))
    classes = max(store.schema.classes, 2)
    logits = known_logits(store.logits if outputs is None else outputs)
    if y is None and target != "labels" and logits is not None and (store.labels < 0).any():
        y = logits.argmax(axis=1)  # nothing but the network's outputs is learnt
    labels = _stored_labels(store, y, classes)
    phi = FeatureMap.of(kernel, store, memory)
    return TrainingData(
        source=store,
        phi=phi,
        rows=StoreRows(store, phi, memory, share=2),
        labels=labels,
        classes=np.arange(classes),
        outputs=logits,
        binding=Binding.of_store(whole),
        columns=phi.length,
        name=store.where,
        places=None if store is whole else whole.present_at,
        size=len(whole),
    )


def of_present(given: Any, whole: Rows) -> Any:
    """Labels or outputs of the rows that are there, of those of all rows."""
    if given is None:
        return None
    values = np.asarray(given)
    if len(values) != len(whole):
        raise UsageError(
            "the labels or outputs are not one a row", where=whole.where, expected=len(whole), got=len(values)
        )
    return values[whole.present_at]


def _from_gram(gram: Gram, y: Any, outputs: Any, kernel: str) -> TrainingData:
    if not gram.symmetric:
        raise UsageError(
            "a surrogate is fitted on the Gram matrix of the training examples with themselves",
            where=gram.path,
            expected="a symmetric matrix",
            got=f"{list(gram.shape)}, {gram.attributes['split_a']} with {gram.attributes['split_b']}",
        )
    if kernel not in (gram.kernel, "precomputed"):
        raise UsageError(
            "the Gram matrix is of another kernel", where=gram.path, expected=repr(kernel), got=repr(gram.kernel)
        )
    if y is None:
        raise UsageError("a Gram matrix has no labels", where=gram.path, hint="Give them: fit(gram, labels)")
    labels, classes = _encoded(np.asarray(y), str(gram.path), gram.shape[0])
    logits = known_logits(outputs)
    return TrainingData(gram, None, None, labels, classes, logits, Binding.of_gram(gram), gram.shape[0], str(gram.path))


def _from_array(X: Any, y: Any, outputs: Any, kernel: str) -> TrainingData:
    X, y = check_X_y(X, y, dtype=np.float64)
    check_classification_targets(y)
    labels, classes = _encoded(y, "y", len(X))
    rows = ArrayRows(X, normalised=kernel == "cosine") if kernel in ON_ARRAYS else None
    if rows is None and X.shape[0] != X.shape[1]:
        raise UsageError(
            "a Gram matrix of the training examples is square",
            where="X",
            expected="[n, n]",
            got=list(X.shape),
            hint="For features, choose the kernel linear or cosine",
        )
    logits = known_logits(outputs)
    return TrainingData(X, None, rows, labels, classes, logits, Binding("array"), X.shape[1], "X")


def new_array(X: Any, model: Any) -> np.ndarray:
    """Queries float64 [m, columns], checked as scikit-learn does."""
    values = check_array(X, dtype=np.float64)
    if values.shape[1] != model.n_features_in_:
        raise ValueError(
            f"X has {values.shape[1]} features, but {type(model).__name__} is expecting "
            f"{model.n_features_in_} features as input"
        )
    return values


def known_logits(outputs: Any) -> np.ndarray | None:
    """Logits float64 [n, classes] of a network, of two classes at least; None where they are not known: one is NaN."""
    if outputs is None or np.isnan(logits := two_logits(np.asarray(outputs))).any():
        return None
    return logits


def two_logits(logits: np.ndarray) -> np.ndarray:
    """Logits float64 [n, classes]; a single logit z stands for (0, z)."""
    logits = np.asarray(logits, np.float64)
    return np.concatenate([np.zeros_like(logits), logits], axis=1) if logits.shape[1] == 1 else logits


def _stored_labels(store: Rows, y: Any, classes: int) -> np.ndarray:
    labels = store.labels if y is None else class_indices(y, where="y")
    if labels.shape != (len(store),):
        raise UsageError("the labels are not one a row", where=store.where, expected=len(store), got=list(labels.shape))
    missing = np.flatnonzero((labels < 0) | (labels >= classes))
    if missing.size:
        raise UsageError(
            "labels are missing",
            where=store.where,
            expected=f"a class below {classes} for each of {len(store)} rows",
            got=f"{missing.size} without, the first in row {store.rows[missing[0]]}",
            hint="Give labels, or learn the network's own outputs: --target predictions",
        )
    _require_two(labels, store.where)
    return labels


def _encoded(y: np.ndarray, where: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices, classes) of labels of any kind."""
    if y.shape != (n,):
        raise UsageError("the labels are not one a row", where=where, expected=n, got=list(y.shape))
    _require_two(y, where)
    classes, labels = np.unique(y, return_inverse=True)
    return labels.astype(np.int64), classes


def _require_two(labels: np.ndarray, where: str) -> None:
    found = np.unique(labels)
    if len(found) < 2:
        raise OneClassError(
            "there is nothing to tell apart",
            where=where,
            expected="labels of at least two classes",
            got=f"one class, {found[0]}" if len(found) else "no rows",
        )
