"""One-vs-rest kernel logistic regression by stochastic gradient descent, as in the paper: scikit-learn's SGDClassifier.

Each row of the Gram matrix is one example whose features are its similarities to all n training examples; the penalty
is on W itself. `partial_fit` over blocks of rows is scikit-learn's own `fit` in the order in which the rows pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import log_expit
from sklearn.linear_model import SGDClassifier

from gradstore.explain.surrogate.training_gram import TrainingGram

_PATIENCE = 5  # epochs without progress, as scikit-learn's n_iter_no_change


@dataclass(frozen=True)
class OneVsRestFit:
    """Fitted one-vs-rest models.

    Attributes:
        weights: W, float64 [classes, n]; of two classes the first is the mirror of the second.
        intercept: b, float64 [classes].
        losses: mean logistic loss of each epoch, every row scored just before its block was learnt.
        converged: whether the loss had stopped falling before the last epoch allowed.
    """

    weights: np.ndarray
    intercept: np.ndarray
    losses: tuple[float, ...]
    converged: bool


def epoch_orders(n: int, block: int, seed: int, *, shuffle: bool) -> Iterator[list[np.ndarray]]:
    """For every epoch the rows of each block in the order in which they are learnt.

    Blocks of consecutive rows come in random order, and so do the rows of a block, so that a block is one read.

    Yields:
        For each block int64 [rows]; without end.
    """
    rng = np.random.default_rng(seed)
    spans = [np.arange(at, min(at + block, n)) for at in range(0, n, block)]
    while True:
        if not shuffle:
            yield spans
            continue
        order = rng.permutation(len(spans))
        yield [spans[i][rng.permutation(len(spans[i]))] for i in order]


def fit_one_vs_rest(
    gram: TrainingGram,
    labels: np.ndarray,
    classes: int,
    class_weights: np.ndarray,
    alpha: float,
    *,
    tolerance: float,
    max_iter: int,
    seed: int,
    shuffle: bool = True,
) -> OneVsRestFit:
    """Fit `SGDClassifier(loss="log_loss", penalty="l2")` over blocks of Gram rows until the loss stops falling.

    It stops as scikit-learn does, once the loss has not come `tolerance` below its best for five epochs; scikit-learn
    counts the loss of every row as it is learnt, here a block at a time.

    Args:
        gram: rows of the training Gram matrix.
        labels: int64 [n], below `classes`.
        classes: number of classes.
        class_weights: float64 [classes].
        alpha: of the penalty alpha/2 ‖W‖².
        tolerance: of the loss; 0 or less runs all epochs.
        max_iter: epochs at most.
        seed: of the order.
        shuffle: False learns rows in their own order.

    Returns:
        W, b and how the fit went.
    """
    model = SGDClassifier(
        loss="log_loss",
        penalty="l2",
        alpha=alpha,
        class_weight=dict(enumerate(class_weights)),
        shuffle=False,
        random_state=seed,
    )
    losses: list[float] = []
    best, stale = np.inf, 0
    for orders in epoch_orders(gram.n, gram.block_rows, seed, shuffle=shuffle):
        if len(losses) == max_iter or (tolerance > 0 and stale >= _PATIENCE):
            break
        loss = 0.0
        for rows in orders:
            values = gram.rows(rows)
            loss += _loss(model, values, labels[rows], classes)
            model.partial_fit(values, labels[rows], classes=np.arange(classes))
        losses.append(loss / gram.n)
        stale = stale + 1 if losses[-1] > best - tolerance else 0
        best = min(best, losses[-1])
    mirrored = classes == 2
    weights, intercept = (np.concatenate([-v, v]) if mirrored else v for v in (model.coef_, model.intercept_))
    return OneVsRestFit(weights, intercept, tuple(losses), stale >= _PATIENCE)


def _loss(model: SGDClassifier, values: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Sum over rows of the logistic loss, averaged over classes."""
    if not hasattr(model, "coef_"):
        return len(values) * float(np.log(2))
    decision = model.decision_function(values)
    if decision.ndim == 1:
        return -float(log_expit(np.where(labels == 1, decision, -decision)).sum())
    signs = np.where(np.arange(classes) == labels[:, None], 1, -1)
    return -float(log_expit(signs * decision).mean(axis=1).sum())
