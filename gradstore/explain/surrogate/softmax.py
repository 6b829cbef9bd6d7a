"""Multinomial kernel logistic regression: the minimum of the softmax cross-entropy, in feature space.

With θ_c = Σ_i W_ci Φ(x_i), one vector per class, the logits W κ(x, X) + b (eq. 1) are ⟨θ_c, Φ(x)⟩ + b_c, and
    min  1/n Σ_i s_i H(y_i, softmax(logits_i)) + α/2 Σ_c ‖θ_c‖²
is an ordinary multinomial logistic regression that needs one pass over Φ an evaluation. Where its gradient vanishes,
W_ci = s_i (y_ic − p_ic) / (α n) exactly, so W comes from the residuals, and no Gram matrix is needed (Zhu and Hastie,
"Kernel logistic regression and the import vector machine", 2005). A Gram matrix K serves as well: the rows of a factor
L with L Lᵀ = K are features of length n.

A pass is what costs, so that few are made. θ moves within a subspace, along which all rows have coordinates in memory:
there L-BFGS finds the minimum. One pass then gives the gradient over all of Φ, which says how near the minimum of all
this is, and with a second pass becomes the next directions of the subspace. Beside steps of L-BFGS on all of Φ, which
take a pass each, this minimises over the span of every gradient so far, from a start that a sketch makes good: it
takes 5 to 20 passes where these took 90 to 200.
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
from gradstore.explain.surrogate.map_rows import ArrayRows, PhiRows, doubled, scores
from gradstore.explain.surrogate.subspace import Subspace

PAIRS = 20
"""Steps that L-BFGS remembers, two vectors each."""
_STEPS = 500  # of L-BFGS within one subspace
# Within a subspace the slope is brought below this part of what it was, or of what is asked for of all of Φ.
_FALL, _MARGIN = 1e-3, 0.3
_STALE = 20  # iterations in which the slope falls no more


@dataclass(frozen=True)
class SoftmaxFit:
    """A fitted softmax.

    Attributes:
        weights: W, float64 [classes, n].
        intercept: b, float64 [classes].
        vectors: Σ_i W_ci Φ(x_i), float64 [classes, D].
        logits: ⟨θ_c, Φ(x_i)⟩ + b_c of the rows, float64 [n, classes].
        loss: value of the objective.
        iterations: minima within a subspace.
        logit_error: how far W κ + b may be from these logits at most, ‖gradient‖ ‖Φ(x)‖ / α.
        reason: why it stopped.
    """

    weights: np.ndarray
    intercept: np.ndarray
    vectors: np.ndarray
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
        offset: float64 [n, classes], added to the logits; default nothing.

    Attributes:
        logits: float64 [n, classes], those seen last.
    """

    def __init__(
        self,
        rows: PhiRows,
        targets: np.ndarray,
        sample_weights: np.ndarray,
        alpha: float,
        offset: np.ndarray | None = None,
    ) -> None:
        self.rows, self.targets, self.sample_weights, self.alpha = rows, targets, sample_weights, alpha
        self.logits = np.empty(targets.shape)
        self._offset = offset

    def __call__(self, theta: np.ndarray, intercept: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """(value, its slopes along θ [classes, D] and along b [classes]); one pass over the rows."""
        slope_theta, slope_b = torch.zeros(theta.shape, dtype=torch.float64), np.zeros(len(intercept))
        value, n, v = 0.0, self.rows.n, torch.from_numpy(theta).T
        for span, phi in doubled(self.rows):
            logits = (phi @ v).numpy() + intercept
            if self._offset is not None:
                logits += self._offset[span]
            self.logits[span] = logits
            log_p = log_softmax(logits, axis=1)
            s = self.sample_weights[span, None]
            value -= float((s * self.targets[span] * log_p).sum())
            residual = s * (np.exp(log_p) - self.targets[span])
            slope_theta += torch.from_numpy(residual).T @ phi
            slope_b += residual.sum(axis=0)
        value = value / n + self.alpha / 2 * float((theta**2).sum())
        return value, slope_theta.numpy() / n + self.alpha * theta, slope_b / n

    def residuals(self) -> np.ndarray:
        """s_i (y_ic − p_ic) at the parameters seen last, [classes, n]."""
        p = np.exp(log_softmax(self.logits, axis=1))
        return ((self.targets - p) * self.sample_weights[:, None]).T


@dataclass
class _Point:
    """Where the search is, and the slopes there; None before the first pass, when nothing is known of them."""

    theta: np.ndarray
    intercept: np.ndarray
    logits: np.ndarray
    slope: np.ndarray | None = None


def fit_softmax(
    subspace: Subspace,
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

    Holds some vectors of classes · D and of classes · n float64 values beside one block of rows and the subspace.

    Args:
        subspace: of the rows; it is extended.
        rows: Φ.
        targets: [n, classes]; one-hot labels or probabilities.
        sample_weights: [n]; 0 leaves a row out.
        alpha: α.
        norm: ‖Φ(x)‖, or its root mean square.
        tolerance: stop where the surrogate's logits are certain to this.
        max_iter: iterations at most, of two passes over the rows each.

    Returns:
        W, b and how the fit went.

    Raises:
        NonFiniteError: the objective is not finite.
    """
    objective = SoftmaxObjective(rows, targets, sample_weights, alpha)
    limit = tolerance * alpha / norm
    prior = (sample_weights[:, None] * targets).sum(axis=0) + 1e-3
    intercept = np.log(prior / prior.sum())
    point = _Point(np.zeros((len(prior), rows.length)), intercept, np.tile(intercept, (rows.n, 1)))
    subspace.reset()
    reason, best, stale = "all iterations were used", np.inf, 0
    for iteration in range(1, max_iter + 1):
        theta, intercept = _minimum_within(subspace, point, objective, limit)
        value, slope, slope_b = objective(theta, intercept)
        if not np.isfinite(value):
            raise NonFiniteError("the surrogate's loss is not finite", expected="a finite loss", got=value)
        error = float(np.hypot(np.linalg.norm(slope), np.linalg.norm(slope_b)))
        stale, best = 0 if error < best else stale + 1, min(error, best)
        if error <= limit or stale == _STALE:
            reason = "the logits are certain to the tolerance" if error <= limit else "rounding allows no further step"
            break
        if iteration < max_iter:
            point = _Point(theta, intercept, objective.logits, slope)
            subspace.extend(slope)
    return SoftmaxFit(
        weights=objective.residuals() / (alpha * rows.n),
        intercept=intercept,
        vectors=theta - slope / alpha,
        logits=objective.logits,
        loss=value,
        iterations=iteration,
        logit_error=error * norm / alpha,
        reason=reason,
    )


def _minimum_within(
    subspace: Subspace, point: _Point, whole: SoftmaxObjective, limit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise the objective over the subspace, from a point, by L-BFGS on the coordinates; no pass over the rows.

    The coordinates are rounded. So logits are those of the point and a change, and the slope at the point is what a
    pass found, by a linear term: what rounding makes wrong shrinks with the way to the minimum.

    Returns:
        (θ [classes, D], b [classes]).
    """
    rows, start = subspace.coordinates, subspace.components(point.theta)
    offset = point.logits - scores(rows, start) - point.intercept
    inner = SoftmaxObjective(rows, whole.targets, whole.sample_weights, whole.alpha, offset)
    _, slope, slope_b = inner(start, point.intercept)
    linear = np.zeros(start.shape) if point.slope is None else subspace.components(point.slope) - slope
    goal = max(_MARGIN * limit, _FALL * float(np.hypot(np.linalg.norm(slope + linear), np.linalg.norm(slope_b))))
    theta, intercept = _descended(inner, linear, start, point.intercept, goal)
    return point.theta + subspace.combined(theta - start), intercept


def _descended(
    objective: SoftmaxObjective, linear: np.ndarray, theta: np.ndarray, intercept: np.ndarray, goal: float
) -> tuple[np.ndarray, np.ndarray]:
    """Descend the objective and ⟨linear, θ⟩ by L-BFGS until the slope is below the goal, or all steps are used.

    Each component of θ is in units of what the loss's curvature at the beginning makes of it.

    Returns:
        (θ, b).
    """
    steps, classes, steepness = 1 / np.sqrt(_curvature(objective) + objective.alpha), len(theta), np.inf

    def scaled(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal steepness
        at = x[:-classes].reshape(theta.shape) * steps
        value, slope, slope_b = objective(at, x[-classes:])
        slope = slope + linear
        steepness = float(np.hypot(np.linalg.norm(slope), np.linalg.norm(slope_b)))
        return value + float((linear * at).sum()), np.concatenate([(slope * steps).ravel(), slope_b])

    def stop(intermediate_result: OptimizeResult) -> None:
        if steepness <= goal:
            raise StopIteration

    # The callback decides; L-BFGS's own tests on single components are set out of reach.
    options = {"maxiter": _STEPS, "maxfun": 2 * _STEPS, "maxcor": PAIRS, "ftol": 0.0, "gtol": 0.0}
    x = np.concatenate([(theta / steps).ravel(), intercept])
    # The products are torch's; L-BFGS's own are short, and BLAS threads would only wait for one another.
    with threadpool_limits(1, user_api="blas"):
        x = minimize(scaled, x, jac=True, method="L-BFGS-B", callback=stop, options=options).x
    return x[:-classes].reshape(theta.shape) * steps, x[-classes:].copy()


def _curvature(objective: SoftmaxObjective) -> np.ndarray:
    """Mean over classes of the loss's second derivatives along each column of the rows, where it was last; [D]."""
    p = np.exp(log_softmax(objective.logits, axis=1))
    weights = torch.from_numpy(objective.sample_weights * (p * (1 - p)).mean(axis=1) / objective.rows.n)
    total = torch.zeros(objective.rows.length, dtype=torch.float64)
    for span, phi in doubled(objective.rows):
        total += weights[span] @ phi.square()
    return total.numpy()


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
