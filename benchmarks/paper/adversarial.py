"""App. J: does what fools a network fool the support vector machine on its tangent kernel, and the other way?

A network f with one logit and sigmoid activations has the tangent kernel κ(x, x') = ⟨∇_θ f(x), ∇_θ f(x')⟩. A support
vector machine on it decides by Σ_i a_i κ(x, x_i) + b = ⟨∇_θ f(x), v⟩ + b with v = Σ_i a_i ∇_θ f(x_i): the derivative of
f(x; θ) along v. Its gradient with respect to x is a second derivative of f, which automatic differentiation gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from benchmarks.paper.digits_data import images
from benchmarks.paper.training import binary_cross_entropy, train

Decision = Callable[[Tensor], Tensor]
"""[n, ...] inputs -> [n] numbers, above 0 for the second class."""

ATTACKS = {
    "white box: network": ("network", "network"),
    "white box: SVM": ("svm", "svm"),
    "transfer: network to SVM": ("network", "svm"),
    "transfer: SVM to network": ("svm", "network"),
    "black box: network": ("stranger", "network"),
    "black box: SVM": ("stranger", "svm"),
}
"""Who the attack is made on, and who has to stand it. The stranger is a network of another seed and other data."""


def sigmoid_mlp(width: int = 64) -> nn.Sequential:
    """Two hidden layers of sigmoids and one logit, on 8 × 8 images."""
    layers = (nn.Linear(64, width), nn.Sigmoid(), nn.Linear(width, width), nn.Sigmoid(), nn.Linear(width, 1))
    return nn.Sequential(nn.Flatten(), *layers)


def network_decision(model: nn.Module) -> Decision:
    """The logit."""
    return lambda x: model(x)[:, 0]


def tangent_svm(model: nn.Module, x: Tensor, labels: Tensor, C: float = 100.0) -> Decision:
    """The decision function of `SVC(kernel="precomputed")` on the exact tangent kernel of x, differentiable in x."""
    theta = {name: p.detach() for name, p in model.named_parameters()}

    def logit(parameters: Mapping[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, parameters, (one[None],))[0, 0]

    rows = vmap(grad(logit), (None, 0))(theta, x)
    flat = torch.cat([g.flatten(1) for g in rows.values()], dim=1).double()
    scale = float(flat.square().sum(1).mean())
    gram = (flat @ flat.T / scale).numpy()
    svm = SVC(C=C, kernel="precomputed").fit(gram, labels.numpy())
    weights = torch.zeros(len(x), dtype=torch.float64)
    weights[torch.from_numpy(svm.support_).long()] = torch.from_numpy(svm.dual_coef_[0])
    v = {name: torch.einsum("n,n...->...", weights.float(), g) / scale for name, g in rows.items()}
    bias = float(svm.intercept_[0])

    def decide(queries: Tensor) -> Tensor:
        along = jvp(lambda p: functional_call(model, p, (queries,))[:, 0], (theta,), (v,))[1]
        return along + bias

    return decide


def pgd(decide: Decision, x: Tensor, signs: Tensor, radius: float, *, steps: int = 7, seed: int = 0) -> Tensor:
    """Projected gradient descent on the margin within an ℓ∞ ball and within the pixels' range [0, 1].

    Args:
        signs: +1 for the second class, -1 for the first.
        radius: of the ball.
        steps: of 2.5 radius / steps each, from a random start.
    """
    if radius == 0:
        return x
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    low, high = (x - radius).clamp(0, 1), (x + radius).clamp(0, 1)
    found = (x + radius * noise).clamp(0, 1)
    for _ in range(steps):
        found = found.detach().requires_grad_()
        (slope,) = torch.autograd.grad((signs * decide(found)).sum(), found)
        found = torch.minimum(torch.maximum(found - 2.5 * radius / steps * slope.sign(), low), high)
    return found.detach()


@dataclass(frozen=True)
class Players:
    """Those who decide, and the queries."""

    decisions: Mapping[str, Decision]
    x: Tensor
    labels: Tensor


def players(seed: int, pair: tuple[int, int] = (3, 8)) -> Players:
    """Train a network, the support vector machine on its kernel, and a stranger on the other half of the data."""
    pixels, digits = images()
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(np.isin(digits.numpy(), pair)))
    x, labels = (pixels[rows] + 1) / 2, (digits[rows] == pair[1]).long()
    third = len(rows) // 3
    own, other, queries = slice(0, third), slice(third, 2 * third), slice(2 * third, None)

    def trained(part: slice, own_seed: int) -> nn.Module:
        adam = lambda p: torch.optim.Adam(p, 1e-2)  # noqa: E731
        return train(
            sigmoid_mlp, x[part], labels[part], own_seed, loss=binary_cross_entropy, optimizer=adam, epochs=60, batch=32
        )

    model = trained(own, seed)
    decisions = {
        "network": network_decision(model),
        "svm": tangent_svm(model, x[own], labels[own]),
        "stranger": network_decision(trained(other, seed + 100)),
    }
    return Players(decisions, x[queries], labels[queries])


def error_rates(seed: int, radii: Sequence[float]) -> Iterator[dict[str, object]]:
    """One row for each attack and radius: the share of queries that the victim gets wrong."""
    found = players(seed)
    signs = 2.0 * found.labels - 1
    for radius in radii:
        attacked = {name: pgd(d, found.x, signs, radius, seed=seed) for name, d in found.decisions.items()}
        for attack, (source, victim) in ATTACKS.items():
            with torch.no_grad():
                wrong = (signs * found.decisions[victim](attacked[source]) <= 0).double().mean()
            yield {"attack": attack, "seed": seed, "radius": radius, "error": float(wrong), "queries": len(found.x)}
