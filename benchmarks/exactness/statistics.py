"""How far cosines of projected gradients are from exact ones, over pairs of examples and over many P."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

FEWEST_BATCHES, MOST_BATCHES = 5, 20
REGROUPINGS, DEALT = 40, 2000  # at most so often, and until there are about so many P
FAR = 5  # times a pair's root mean square under signs
TAILS = np.concatenate([np.arange(0.95, 0.1, -0.05), 10 ** -np.arange(1, 6.01, 0.05)])
"""Shares of pairs whose residual is larger: where the curves of the picture are drawn."""


@dataclass(frozen=True)
class Sample:
    """Residuals of one kernel, kind and K; NaN where an example's features are all zero, so that it has no cosine.

    Attributes:
        batches: of independent P, float64 [draws, pairs] each.
        plain: those of P of which no two share a block, float64 [draws, pairs].
    """

    batches: tuple[np.ndarray, ...]
    plain: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """Mean |residual| of each batch; independent, so their scatter says how sure the mean of them is."""
        return np.array([np.nanmean(np.abs(batch)) for batch in self.batches])


def sample(blocks: np.ndarray, exact: np.ndarray, m: int) -> Sample:
    """Residuals where P is any m of the blocks of a batch.

    Args:
        blocks: float64 [N, n, n], Gram matrices of independent blocks of P.
        exact: float64 [n, n].
        m: blocks of a P.

    Returns:
        Up to 20 batches of at least two P. Within a batch its blocks are dealt again and again to P: the mean over all
        choices is surer than that over one, and no less right.
    """
    count = int(np.clip(len(blocks) // (2 * m), 1, MOST_BATCHES))
    rng = np.random.default_rng(0)
    again = int(np.clip(DEALT * m // len(blocks), 1, REGROUPINGS)) if m > 1 else 1
    parts = np.array_split(blocks, count)
    dealt = tuple(np.concatenate([_residuals(rng.permutation(part), exact, m) for _ in range(again)]) for part in parts)
    return Sample(dealt, _residuals(blocks, exact, m))


def spread(found: Sample) -> np.ndarray:
    """Root mean square of each pair's residuals, float64 [pairs]."""
    return np.sqrt(np.nanmean(np.square(np.concatenate(found.batches)), axis=0))


def summary(found: Sample, unit: np.ndarray, most: int) -> dict[str, float]:
    """Mean, percentiles, and how heavy the tails are.

    Args:
        found: residuals.
        unit: spread of each pair under signs. All kinds are measured by it: theirs is the same but for Gaussian, and
            where few P move a pair at all, its own would be known badly.
        most: P that the largest residual is sought in, so that kinds with more of them do not seem worse.
    """
    every = np.concatenate(found.batches)
    size = np.abs(every)
    moved = unit > 1e-10  # parallel gradients have the cosine 1 under every P
    scaled = every[:, moved] / unit[moved]
    return {
        "mean": np.nanmean(size),
        "mean_se": standard_error(found.means),
        "rms": np.sqrt(np.nanmean(np.square(every))),
        **dict(zip(("p50", "p99", "p999"), np.nanquantile(size, (0.5, 0.99, 0.999)), strict=True)),
        "max": np.nanmax(np.abs(found.plain[:most])),
        "max_of": most,
        "kurtosis": np.nanmean(scaled**4) / np.nanmean(scaled**2) ** 2,
        "lost_share": np.isnan(every).mean(),
        "far_share": (np.abs(scaled) > FAR).mean(),
    }


def ratio(found: Sample, base: Sample) -> tuple[float, float]:
    """Ratio of mean residuals to those of a base, and its standard error by the delta method."""
    a, b = found.means, base.means
    value = a.mean() / b.mean()
    return value, value * np.hypot(standard_error(a) / a.mean(), standard_error(b) / b.mean())


def standard_error(values: np.ndarray) -> float:
    """Of a mean of independent values; NaN for so few that their scatter is not known."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) >= FEWEST_BATCHES else float("nan")


def tail(found: Sample) -> Iterator[tuple[float, float]]:
    """(share of pairs, |residual| that it exceeds), as far as ten residuals are beyond."""
    size = np.abs(np.concatenate(found.batches)).ravel()
    shares = TAILS[10 / found.plain.size <= TAILS]
    yield from zip(shares.tolist(), np.nanquantile(size, 1 - shares).tolist(), strict=True)


def samples(blocks: Mapping[str, np.ndarray], exact: np.ndarray, m: int) -> dict[str, Sample]:
    """Of every kind of which there are two such P at least."""
    return {kind: sample(grams, exact, m) for kind, grams in blocks.items() if len(grams) >= 2 * m}


def _residuals(blocks: np.ndarray, exact: np.ndarray, m: int) -> np.ndarray:
    """Of consecutive m blocks each, float64 [len(blocks) // m, pairs]."""
    whole = len(blocks) // m
    projected = blocks[: whole * m].reshape(whole, m, *exact.shape).sum(1)
    i, j = np.triu_indices(len(exact), 1)
    return _cosines(projected)[:, i, j] - _cosines(exact)[i, j]


def _cosines(gram: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    products = norms[..., :, None] * norms[..., None, :]
    return np.divide(gram, products, out=np.full_like(gram, np.nan), where=products > 0)
