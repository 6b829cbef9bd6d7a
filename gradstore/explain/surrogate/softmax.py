"""Multinomial kernel logistic regression: L-BFGS on the softmax cross-entropy, in feature space.

With θ_c = Σ_i W_ci Φ(x_i), one vector per class, the logits W κ(x, X) + b (eq. 1) are ⟨θ_c, Φ(x)⟩ + b_c, and
    min  1/n Σ_i s_i H(y_i, softmax(logits_i)) + α/2 Σ_c ‖θ_c‖²
is an ordinary multinomial logistic regression that needs one pass over Φ an evaluation. Where its gradient vanishes,
W_ci = s_i (y_ic − p_ic) / (α n) exactly, so W comes from the residuals, and no Gram matrix is needed (Zhu and Hastie,
"Kernel logistic regression and the import vector machine", 2005). A Gram matrix K serves as well: the rows of a factor
L with L Lᵀ = K are features of length n.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import cholesky
from scipy.optimize import OptimizeResult, minimize
from scipy.special import log_softmax
from threadpoolctl import threadpool_limits

from gradstore.errors import NonFiniteError
from gradstore.explain.surrogate.map_rows import ArrayRows, PhiRows, doubled

PAIRS = 20
"""Steps that L-BFGS remembers, two vectors each."""


@dataclass(frozen=True)
class SoftmaxFit:
    """A fitted softmax.

    Attributes:
        weights: W, float64 [classes, n].
        intercept: b, float64 [classes].
        logits: ⟨θ_c, Φ(x_i)⟩ + b_c of the rows, float64 [n, classes].
        loss: value of the objective.
        iterations: of L-BFGS.
        logit_error: how far W κ + b may be from these logits at most, ‖gradient‖ ‖Φ(x)‖ / α.
        reason: why it stopped.
    """

    weights: np.ndarray
    intercept: np.ndarray
    logits: np.ndarray
    loss: float
    iterations: int
    logit_error: float
    reason: str


class SoftmaxObjective:
    """Value and gradient of the regularised cross-entropy; remembers what it saw last.

    Args:
        rows: Φ [n, D].
        targets: distributions over classes, float64 [n, classes].
        sample_weights: s, float64 [n].
        alpha: α.
    """

    def __init__(self, rows: PhiRows, targets: np.ndarray, sample_weights: np.ndarray, alpha: float) -> None:
        self.rows, self.targets, self.sample_weights, self.alpha = rows, targets, sample_weights, alpha
        self.logits = np.empty(targets.shape)
        self.slope = np.inf

    def __call__(self, parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """(value, gradient) at parameters = (θ, b) flattened; one pass over the rows."""
        theta, intercept = self.split(parameters)
        c, n = len(intercept), self.rows.n
        slope_theta, slope_b = torch.zeros(theta.shape, dtype=torch.float64), np.zeros(c)
        value = 0.0
        for span, phi in doubled(self.rows):
            logits = (phi @ torch.from_numpy(theta).T).numpy() + intercept
            self.logits[span] = logits
            log_p = log_softmax(logits, axis=1)
            s = self.sample_weights[span, None]
            value -= float((s * self.targets[span] * log_p).sum())
            residual = s * (np.exp(log_p) - self.targets[span])
            slope_theta += torch.from_numpy(residual).T @ phi
            slope_b += residual.sum(axis=0)
        gradient = np.concatenate([(slope_theta.numpy() / n + self.alpha * theta).ravel(), slope_b / n])
        self.slope = float(np.linalg.norm(gradient))
        return value / n + self.alpha / 2 * float((theta**2).sum()), gradient

    def split(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(θ [classes, D], b [classes])."""
        c = self.targets.shape[1]
        return parameters[:-c].reshape(c, -1), parameters[-c:]

    def residuals(self) -> np.ndarray:
        """s_i (y_ic − p_ic) at the parameters seen last, [classes, n]."""
        p = np.exp(log_softmax(self.logits, axis=1))
        return ((self.targets - p) * self.sample_weights[:, None]).T


def fit_softmax(
    rows: PhiRows,
    targets: np.ndarray,
    sample_weights: np.ndarray,
    alpha: float,
    *,
    norm: float,
    tolerance: float,
    max_iter: int,
) -> SoftmaxFit:
    """Minimise `SoftmaxObjective` from θ = 0.

    Holds 2 · 20 vectors of classes · D float64 values beside one block of rows.

    Args:
        rows: Φ.
        targets: [n, classes]; one-hot labels or probabilities.
        sample_weights: [n]; 0 leaves a row out.
        alpha: α.
        norm: ‖Φ(x)‖, or its root mean square.
        tolerance: stop where the surrogate's logits are certain to this.
        max_iter: iterations at most.

    Returns:
        W, b and how the fit went.

    Raises:
        NonFiniteError: the objective is not finite.
    """
    objective = SoftmaxObjective(rows, targets, sample_weights, alpha)
    classes = targets.shape[1]
    prior = (sample_weights[:, None] * targets).sum(axis=0) + 1e-3
    start = np.concatenate([np.zeros(classes * rows.length), np.log(prior / prior.sum())])
    done = False

    def stop(intermediate_result: OptimizeResult) -> None:
        nonlocal done
        if objective.slope * norm <= tolerance * alpha:
            done = True
            raise StopIteration

    # The callback decides; L-BFGS's own tests on single components are set out of reach.
    options = {"maxiter": max_iter, "maxfun": 2 * max_iter, "maxcor": PAIRS, "ftol": 0.0, "gtol": 0.0}
    # The products are torch's; L-BFGS's own are short, and BLAS threads would only wait for one another.
    with threadpool_limits(1, user_api="blas"):
        found = minimize(objective, start, jac=True, method="L-BFGS-B", callback=stop, options=options)
    value, gradient = objective(found.x)
    if not np.isfinite(value):
        raise NonFiniteError("the surrogate's loss is not finite", expected="a finite loss", got=value)
    return SoftmaxFit(
        weights=objective.residuals() / (alpha * rows.n),
        intercept=objective.split(found.x)[1].copy(),
        logits=objective.logits,
        loss=value,
        iterations=int(found.nit),
        logit_error=float(np.linalg.norm(gradient)) * norm / alpha,
        reason="the logits are certain to the tolerance" if done else str(found.message),
    )


def factored(gram: np.ndarray) -> ArrayRows:
    """Rows whose inner products are a Gram matrix, up to the rounding of its entries.

    Args:
        gram: float64 [n, n], symmetric, positive semidefinite up to rounding; overwritten.

    Returns:
        The rows of its Cholesky factor. A multiple of the identity is added first, 1e-9 to 1e-3 of the mean of the
        diagonal, as much as it takes.

    Raises:
        NonFiniteError: it has a negative eigenvalue far beyond rounding.
    """
    n = len(gram)
    mean = float(np.trace(gram)) / n
    added = 0.0
    for jitter in (1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        gram.flat[:: n + 1] += jitter * mean - added
        added = jitter * mean
        try:
            return ArrayRows(cholesky(gram, lower=True), normalised=False)
        except np.linalg.LinAlgError:
            continue
    raise NonFiniteError(
        "the Gram matrix is not positive semidefinite",
        expected="no eigenvalue below -1e-3 of the mean of the diagonal",
        hint="Check that its rows and columns are the same examples",
    )
