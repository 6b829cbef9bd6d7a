"""App. H: why Kendall's τ and not Pearson's correlation measures faithfulness (Figs 5 and 6).

Two made-up surrogates of one network whose probabilities lie near 0 and near 1:

- "cluster" only knows on which side a query lies; within a side its probabilities are random.
- "monotone" orders every query as the network does, but bends the scale.

Pearson's correlation prefers the first, although it says nothing about any two queries of one class. τ prefers the
second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from gradstore.faithfulness import kendall, pearson, spearman


@dataclass(frozen=True)
class MadeUp:
    """A surrogate's probabilities against the network's.

    Attributes:
        name: "cluster" or "monotone".
        network: probabilities, float64 [n].
        surrogate: probabilities, float64 [n].
        pearson: correlation of the probabilities.
        spearman: of their ranks.
        tau: Kendall's.
    """

    name: str
    network: np.ndarray
    surrogate: np.ndarray
    pearson: float
    spearman: float
    tau: float


def thought_experiment(n: int = 1000, seed: int = 0) -> tuple[MadeUp, MadeUp]:
    """The two surrogates; float64 [n] probabilities from a seed."""
    rng = np.random.default_rng(seed)
    side = np.where(rng.random(n) < 0.5, -1, 1)
    log_odds = side * 4 + rng.standard_normal(n)
    network = expit(log_odds)
    cluster = expit(side * 4 + rng.standard_normal(n))
    monotone = expit(np.sign(log_odds) * np.abs(log_odds / 4) ** 5 - 3)
    return _measured("cluster", network, cluster), _measured("monotone", network, monotone)


def _measured(name: str, network: np.ndarray, surrogate: np.ndarray) -> MadeUp:
    found = [float(measure(network, surrogate).value or 0) for measure in (pearson, spearman, kendall)]
    return MadeUp(name, network, surrogate, *found)
