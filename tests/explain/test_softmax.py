"""The multinomial fit against the minimum of its objective, found densely in float64; how many passes it takes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax

from gradstore.explain.surrogate.softmax import SoftmaxFit, fit_softmax
from gradstore.explain.surrogate.subspace import Subspace, capacity_within

CLASSES = 4


class Counted:
    """Rows of an array in blocks of some dtype, and how often all of them were read."""

    def __init__(self, values: np.ndarray, dtype: torch.dtype, block: int = 60) -> None:
        self.n, self.length = values.shape
        self._values, self._block, self.passes = torch.from_numpy(values).to(dtype), block, 0
        self.bytes = self._values.nbytes

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        self.passes += 1
        for at in range(0, self.n, self._block):
            yield slice(at, min(at + self._block, self.n)), self._values[at : at + self._block]


def rows_with_spectrum(n: int, D: int, power: float) -> tuple[np.ndarray, np.ndarray]:
    """(unit rows [n, D], labels that follow them) whose i-th variance is i^-power."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, D + 1) ** (-power / 2)
    values = (rng.standard_normal((n, D)) * spectrum) @ np.linalg.qr(rng.standard_normal((D, D)))[0]
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32).astype(np.float64)
    scores = values @ rng.standard_normal((D, CLASSES))
    return values, (scores + 0.5 * scores.std() * rng.standard_normal(scores.shape)).argmax(axis=1)


def dense_minimum(values: np.ndarray, targets: np.ndarray, weights: np.ndarray, alpha: float) -> tuple:
    """(θ, b, value, evaluations) by BFGS's limited form on all parameters in float64, far beyond the tolerance."""
    n, D = values.shape

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        theta, b = x[: CLASSES * D].reshape(CLASSES, D), x[CLASSES * D :]
        log_p = log_softmax(values @ theta.T + b, axis=1)
        residual = weights[:, None] * (np.exp(log_p) - targets) / n
        value = -(weights[:, None] * targets * log_p).sum() / n + alpha / 2 * (theta**2).sum()
        return value, np.concatenate([(residual.T @ values + alpha * theta).ravel(), residual.sum(axis=0)])

    options = {"maxiter": 20_000, "maxfun": 40_000, "maxcor": 50, "ftol": 0.0, "gtol": alpha * 1e-6}
    found = minimize(objective, np.zeros(CLASSES * (D + 1)), jac=True, method="L-BFGS-B", options=options)
    return found.x[: CLASSES * D].reshape(CLASSES, D), found.x[CLASSES * D :], found.fun


def fitted(rows: Counted, targets: np.ndarray, weights: np.ndarray, alpha: float, capacity: int = 768) -> SoftmaxFit:
    subspace = Subspace(rows, capacity, seed=0)
    return fit_softmax(subspace, rows, targets, weights, alpha, norm=1.0, tolerance=1e-3, max_iter=400)


@pytest.mark.numerical
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("power", "alpha", "capacity"),
    [(1.5, 1e-2, 768), (1.5, 1e-4, 40), (1.0, 1e-4, 24), (0.5, 1e-5, 60)],
    ids=["all that there is", "few", "so few that the oldest go", "hardly a spectrum that falls"],
)
def test_it_is_the_minimum_to_the_tolerance(dtype: torch.dtype, power: float, alpha: float, capacity: int) -> None:
    values, labels = rows_with_spectrum(400, 150, power)
    targets, weights = np.eye(CLASSES)[labels], np.random.default_rng(1).uniform(0.2, 3, 400)
    weights[::7] = 0.0  # left out
    found = fitted(Counted(values, dtype), targets, weights, alpha, capacity)
    theta, b, value = dense_minimum(values, targets, weights, alpha)
    expected = values @ theta.T + b
    assert found.reason == "the logits are certain to the tolerance"
    assert found.logit_error <= 1e-3
    # θ is certain to the tolerance, b beside it to what moves no logit's probability.
    assert np.linalg.norm(found.vectors - theta) <= 2e-3
    np.testing.assert_allclose(log_softmax(found.logits, axis=1), log_softmax(expected, axis=1), atol=4e-3)
    assert value - 1e-12 <= found.loss <= value + 1e-6 * alpha
    np.testing.assert_allclose(found.weights @ values, found.vectors, atol=1e-9 * np.abs(found.weights).sum())
    assert not found.weights[:, ::7].any()


def test_a_falling_spectrum_takes_few_passes() -> None:
    """Two make the subspace, one each iteration, and one more for all but the last."""
    values, labels = rows_with_spectrum(1500, 600, 1.5)
    rows, targets = Counted(values, torch.float32), np.eye(CLASSES)[labels]
    found = fitted(rows, targets, np.ones(1500), 1e-4)
    assert found.logit_error <= 1e-3
    assert rows.passes == 2 + 2 * found.iterations - 1
    assert rows.passes <= 15  # of L-BFGS on all parameters it is some 150


def test_a_tolerance_below_rounding_ends() -> None:
    values, labels = rows_with_spectrum(80, 20, 1.0)
    rows = Counted(values, torch.float32)
    subspace, targets = Subspace(rows, 40, seed=0), np.eye(CLASSES)[labels]
    found = fit_softmax(subspace, rows, targets, np.ones(80), 1e-3, norm=1.0, tolerance=0, max_iter=400)
    assert found.reason == "rounding allows no further step"
    assert found.logit_error < 1e-7
    assert found.iterations < 400


def test_coordinates_are_those_of_orthonormal_directions() -> None:
    values, _ = rows_with_spectrum(300, 90, 1.0)
    subspace = Subspace(Counted(values, torch.float64), 40, seed=3)
    extra = np.random.default_rng(2).standard_normal((3, 90))
    subspace.extend(extra)
    k = subspace.coordinates.length
    assert k == 20 + 3
    directions = subspace.combined(np.eye(k))
    np.testing.assert_allclose(directions @ directions.T, np.eye(k), atol=1e-10)
    coordinates = torch.cat([part for _, part in subspace.coordinates.blocks()])
    np.testing.assert_allclose(coordinates.numpy(), values @ directions.T, atol=1e-12)
    np.testing.assert_allclose(subspace.combined(subspace.components(extra)), extra, atol=1e-10)
    square = coordinates.numpy()[:, :20]
    np.testing.assert_allclose(square.T @ square, np.diag(np.diag(square.T @ square)), atol=1e-9)
    subspace.extend(extra)  # which do not leave it
    assert subspace.coordinates.length == k
    assert subspace.mean_square == pytest.approx(1)
    subspace.reset()
    assert subspace.coordinates.length == 20


def test_how_many_directions_fit() -> None:
    found, least = capacity_within(10**9, 20_000, 20_480, 10, 4, 48)
    assert found == 768
    some, same = capacity_within(least, 20_000, 20_480, 10, 4, 48)
    assert (some, same) == (16, least)
    assert capacity_within(10**6, 20_000, 20_480, 10, 4, 48)[0] < 1
