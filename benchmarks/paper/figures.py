"""The figures, drawn from what was measured, by matplotlib: `pip install ".[plots]"`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from benchmarks.paper.experiment import Experiment, Judged
from benchmarks.paper.thought_experiment import MEASURES, SIGMA, Pair

NAMES = {
    "trntk": "trNTK",
    "trntk0": "trNTK⁰",
    "proj-trntk": "proj-trNTK",
    "proj-pntk": "proj-pNTK",
    "embedding": "embedding",
    "ck": "CK",
}
"""Kernels as the paper writes them."""


def most_similar(found: Experiment, path: Path, kernel: str = "proj-trntk", queries: int = 5, k: int = 5) -> None:
    """A query of each of the first classes beside the training examples most similar to it (as App. M.2)."""
    splits, gram, outputs = found.project.splits, found.grams[kernel]["test"], found.outputs["test"]
    figure, axes = plt.subplots(queries, k + 1, figsize=(1.35 * (k + 1), 1.65 * queries), layout="constrained")
    for c in range(queries):
        q = int(np.flatnonzero(outputs.labels == c)[0])
        nearest = np.argsort(-gram[q], kind="stable")[:k]
        _picture(axes[c, 0], splits["test"][q][0], f"query {q}: a {c}, read as {outputs.logits[q].argmax()}")
        for axis, i in zip(axes[c, 1:], nearest, strict=True):
            _picture(axis, splits["train"][int(i)][0], f"a {found.outputs['train'].labels[i]}, κ = {gram[q, i]:.3f}")
    _finish(figure, path, f"Test digits (left) and the training digits most similar to them by {NAMES[kernel]}")


def realisation(judged: Mapping[str, Judged], path: Path) -> None:
    """The network's logits against the surrogate's after Φ¹, every class of every query (as Fig. 1 and App. L.1)."""
    figure, axes = plt.subplots(1, len(judged), figsize=(3.6 * len(judged), 3.7), squeeze=False, layout="constrained")
    for axis, (name, found) in zip(axes[0], judged.items(), strict=True):
        _against(axis, found, name)
    _finish(figure, path, "Logits of every class: network against surrogate")


def residuals(found: Experiment, path: Path, proj_dim: int) -> dict[str, float]:
    """Fig. 4: how far projected similarities are from exact ones, and the exponential of the same mean.

    Returns:
        Mean, median, 99th percentile and largest |residual|.
    """
    error = np.abs(found.grams["proj-trntk"]["test"] - found.grams["trntk"]["test"]).ravel()
    x = np.linspace(0, np.quantile(error, 0.999), 400)
    figure, axis = plt.subplots(figsize=(4.6, 3.4), layout="constrained")
    axis.plot(x, np.searchsorted(np.sort(error), x) / len(error), label="measured")
    axis.plot(x, 1 - np.exp(-x / error.mean()), "--", label=f"1 − exp(−x / {error.mean():.4f})")
    axis.set(xlabel="|proj-trNTK − trNTK|", ylabel="share of pairs", ylim=(0, 1.02))
    axis.locator_params(axis="x", nbins=5)
    axis.legend()
    _finish(figure, path, f"Residuals of the projected kernel at K = {proj_dim:,}")
    return {
        "mean": float(error.mean()),
        "p50": float(np.median(error)),
        "p99": float(np.quantile(error, 0.99)),
        "max": float(error.max()),
    }


def made_up(found: Sequence[Pair], path: Path) -> None:
    """Fig. 5: answers of two models that are independent, and of two that are not."""
    figure, axes = plt.subplots(1, len(found), figsize=(3.8 * len(found), 3.7), layout="constrained")
    for axis, pair in zip(axes, found, strict=True):
        axis.scatter(pair.a, pair.b, s=4, alpha=0.3)
        axis.set(xlabel="answer of F_A", ylabel="answer of F_B")
        said = pair.measures()
        axis.set_title(f"{pair.name}: Pearson {said['Pearson']:.2f}, τ {said['Kendall']:.2f}", fontsize=9)
    _finish(figure, path, "Made-up models: clusters hold Pearson's correlation near 1")


def converging(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Fig. 6: how each correlation nears 1 as the noise between two models vanishes."""
    figure, axis = plt.subplots(figsize=(4.6, 3.4), layout="constrained")
    for name in MEASURES:
        axis.plot([row["sigma"] / SIGMA for row in rows], [row[name] for row in rows], "o-", ms=3, label=name)
    axis.set_xscale("log", base=2)
    axis.invert_xaxis()
    axis.set(xlabel="added noise, in units of the model's own", ylabel="correlation")
    axis.legend()
    _finish(figure, path, "Correlation of F_A with F_A + noise: τ nears 1 slowest")


def attacks(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Fig. 7: error against the radius of the attack, a panel a victim; bands are standard errors over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.8), sharey=True, layout="constrained")
    for axis, victim, other in zip(axes, ("network", "SVM"), ("SVM", "network"), strict=True):
        styles = {
            f"white box: {victim}": ("made on itself (white box)", "o-", 3.5),
            f"transfer: {other} to {victim}": (f"made on the {other} (transfer)", "s--", 1.5),
            f"black box: {victim}": ("made on another network (black box)", "^:", 1.5),
        }
        for attack, (label, style, width) in styles.items():
            radii, mean, spread = _over_seeds([row for row in rows if row["attack"] == attack])
            (line,) = axis.plot(radii, mean, style, ms=4, lw=width, label=label)
            axis.fill_between(radii, mean - spread, mean + spread, color=line.get_color(), alpha=0.15)
        axis.locator_params(axis="x", nbins=5)
        axis.set(xlabel="radius of the attack (ℓ∞, pixels from 0 to 1)", ylim=(0, 1.02))
        axis.set_title({"network": "the network", "SVM": "the SVM on its tangent kernel"}[victim], fontsize=9)
        axis.legend(fontsize=8, title="attack", title_fontsize=8)
    axes[0].set_ylabel("error rate")
    _finish(figure, path, "PGD-7: who is fooled by which attack")


def _over_seeds(rows: Sequence[Mapping[str, object]]) -> tuple[list[float], np.ndarray, np.ndarray]:
    """(radii, mean error, its standard error)."""
    radii = sorted({float(str(row["radius"])) for row in rows})
    errors = [np.array([r["error"] for r in rows if float(str(r["radius"])) == radius], float) for radius in radii]
    spread = [e.std(ddof=1) / np.sqrt(len(e)) if len(e) > 1 else 0.0 for e in errors]
    return radii, np.array([e.mean() for e in errors]), np.array(spread)


def by_seed(name: str, judged: Sequence[Judged], path: Path) -> None:
    """Figs 8-11: the realisation of one small network, a panel a seed."""
    columns = min(5, len(judged))
    rows = -(-len(judged) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.9 * columns, 3 * rows + 0.3), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(judged) :]:
        axis.axis("off")
    for seed, found in enumerate(judged):
        _against(axes.flat[seed], found, f"seed {seed}")
    _finish(figure, path, f"{name}: logits of the second class, network against trNTK surrogate")


def _against(axis: plt.Axes, found: Judged, name: str) -> None:
    curve = found.curves[0]
    if curve.r2.value is None:
        axis.set_title(f"{name}: {curve.r2.note}", fontsize=8)
        return
    x = curve(found.ours)
    ends = [min(x.min(), found.theirs.min()), max(x.max(), found.theirs.max())]
    if found.theirs.shape[1] == 1:
        axis.scatter(x, found.theirs, s=5, alpha=0.35)
    else:
        for chosen, label in ((found.correct, "correct class"), (~found.correct, "other classes")):
            axis.scatter(x[chosen], found.theirs[chosen], s=5, alpha=0.35, label=label)
        axis.legend(fontsize=8)
    axis.plot(ends, ends, "k--", lw=0.8)
    axis.set(xlabel="surrogate, after Φ¹", ylabel="network")
    axis.set_title(f"{name}: R² {curve.r2.value:.2f}, τ {found.measures.tau.value or 0:.2f}", fontsize=9)


def _picture(axis: plt.Axes, image: torch.Tensor, title: str) -> None:
    axis.imshow(image[0].numpy(), cmap="gray")
    axis.set_title(title, fontsize=7)
    axis.axis("off")


def _finish(figure: plt.Figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
