"""App. H: why Kendall's τ and not Pearson's correlation measures faithfulness (Figs 5 and 6).

A model answers near 0 or near 1: with the class Y, drawn evenly, where it is right, with 1 - Y where it is wrong, plus
N(0, σ). Two pairs of models:

- independent: each is right at a rate of its own, and their noise is their own;
- dependent: F_B = F_A + N(0, σ).

The two clusters hold Pearson's correlation near 1 in both. τ is 1/2 of the first, for half of all pairs lie in
different clusters and the other half in one, where order is chance; of the second it is 1/2 + arcsin(1/√(1 + r²))/π,
with r the ratio of the added noise to the model's own: 3/4 where they are equal, and 1 only as r vanishes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gradstore.explain.faithfulness import kendall, pearson, spearman

SIGMA = 0.05
RATE = 0.995
MEASURES = {"Pearson": pearson, "Spearman": spearman, "Kendall": kendall}
ADDED = tuple(SIGMA * 2.0**power for power in range(3, -7, -1))
"""Noise that is added to F_A in Fig. 6, large to small."""


@dataclass(frozen=True)
class Pair:
    """Answers of two models to the same questions.

    Attributes:
        name: "independent" or "dependent".
        a: of the first, float64 [n].
        b: of the second, float64 [n].
    """

    name: str
    a: np.ndarray
    b: np.ndarray

    def measures(self) -> dict[str, float]:
        """Each correlation by name."""
        return {name: float(measure(self.a, self.b).value or 0) for name, measure in MEASURES.items()}


def pairs(n: int = 4000, sigma: float = SIGMA, rate: float = RATE, seed: int = 0) -> tuple[Pair, Pair]:
    """Both pairs, whose first model is the same.

    Args:
        n: questions.
        sigma: standard deviation of every noise.
        rate: at which a model is right.
        seed: of all that is drawn.
    """
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 2, n)

    def model() -> np.ndarray:
        right = rng.random(n) < rate
        return np.where(right, classes, 1 - classes) + sigma * rng.standard_normal(n)

    a, b = model(), model()
    return Pair("independent", a, b), Pair("dependent", a, a + sigma * rng.standard_normal(n))


def convergence(added: Sequence[float] = ADDED, n: int = 4000, seed: int = 0) -> Iterator[dict[str, float]]:
    """Fig. 6: each correlation of F_A with F_A + N(0, σ), by σ."""
    a = pairs(n, seed=seed)[0].a
    noise = np.random.default_rng(seed + 1).standard_normal(n)
    for sigma in added:
        yield {"sigma": sigma, **Pair("dependent", a, a + sigma * noise).measures()}
