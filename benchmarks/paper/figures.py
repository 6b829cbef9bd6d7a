"""The figures, drawn from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from benchmarks.paper.experiment import Experiment, Judged
from benchmarks.paper.thought_experiment import MadeUp


def most_similar(found: Experiment, path: Path, kernel: str = "proj-trntk", queries: int = 5, k: int = 5) -> None:
    """Fig. 1: queries beside the training examples that a kernel finds most similar."""
    splits, gram = found.project.splits, found.grams[kernel]["test"]
    figure, axes = plt.subplots(queries, k + 1, figsize=(1.4 * (k + 1), 1.6 * queries))
    for q in range(queries):
        nearest = np.argsort(-gram[q], kind="stable")[:k]
        logits = found.outputs["test"].logits[q]
        _picture(axes[q, 0], splits["test"][q][0], f"query {q}\nsays {logits.argmax()}")
        for axis, i in zip(axes[q, 1:], nearest, strict=True):
            _picture(axis, splits["train"][int(i)][0], f"{found.outputs['train'].labels[i]}: {gram[q, i]:.3f}")
    _finish(figure, path, f"Most similar training digits by {kernel}")


def realisation(judged: Mapping[str, Judged], path: Path) -> None:
    """Fig. 2: the network's log-odds against the surrogate's after Φ¹; the dashed line is equality."""
    figure, axes = plt.subplots(1, len(judged), figsize=(3.4 * len(judged), 3.4), squeeze=False)
    for axis, (name, found) in zip(axes[0], judged.items(), strict=True):
        _against(axis, found, name)
    _finish(figure, path, "Linear realisation of the network")


def residuals(found: Experiment, path: Path, proj_dim: int) -> dict[str, float]:
    """Fig. 4: how far projected similarities are from exact ones, and the exponential of the same mean.

    Returns:
        Mean, median, 99th percentile and largest |residual|.
    """
    error = np.abs(found.grams["proj-trntk"]["test"] - found.grams["trntk"]["test"]).ravel()
    x = np.linspace(0, np.quantile(error, 0.999), 400)
    figure, axis = plt.subplots(figsize=(4.6, 3.6))
    axis.plot(x, np.searchsorted(np.sort(error), x) / len(error), label="measured")
    axis.plot(x, 1 - np.exp(-x / error.mean()), "--", label=f"1 - exp(-x / {error.mean():.4f})")
    axis.set(xlabel="|proj-trNTK - trNTK|", ylabel="share of pairs", ylim=(0, 1.02))
    axis.legend()
    _finish(figure, path, f"Residuals at K = {proj_dim:,}")
    return {
        "mean": float(error.mean()),
        "p50": float(np.median(error)),
        "p99": float(np.quantile(error, 0.99)),
        "max": float(error.max()),
    }


def made_up(found: MadeUp, path: Path) -> None:
    """Figs 5 and 6: a made-up surrogate's probabilities, and what each correlation says of them."""
    figure, axis = plt.subplots(figsize=(4, 3.8))
    axis.scatter(found.surrogate, found.network, s=4, alpha=0.4)
    axis.set(xlabel="surrogate's probability", ylabel="network's probability")
    _finish(
        figure, path, f"{found.name}: Pearson {found.pearson:.3f}, Spearman {found.spearman:.3f}, τ {found.tau:.3f}"
    )


def attacks(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Fig. 7: error against the radius of the attack; bands are standard errors over seeds."""
    figure, axis = plt.subplots(figsize=(6, 4.2))
    for attack in dict.fromkeys(row["attack"] for row in rows):
        mine = [row for row in rows if row["attack"] == attack]
        radii = sorted({float(row["radius"]) for row in mine})  # type: ignore[arg-type]
        errors = [np.array([r["error"] for r in mine if r["radius"] == radius], float) for radius in radii]
        mean, spread = np.array([e.mean() for e in errors]), np.array([e.std() / np.sqrt(len(e)) for e in errors])
        (line,) = axis.plot(radii, mean, marker="o", ms=3, ls="-" if "white" in str(attack) else "--", label=attack)
        axis.fill_between(radii, mean - spread, mean + spread, color=line.get_color(), alpha=0.15)
    axis.set(xlabel="radius of the attack (ℓ∞, pixels from 0 to 1)", ylabel="error rate", ylim=(0, 1.02))
    axis.legend(fontsize=8)
    _finish(figure, path, "PGD-7 on networks and on support vector machines of their tangent kernels")


def by_seed(name: str, judged: Sequence[Judged], path: Path) -> None:
    """Figs 8-11: the realisation of one small network, a panel a seed."""
    figure, axes = plt.subplots(1, len(judged), figsize=(3.2 * len(judged), 3.2), squeeze=False)
    for seed, (axis, found) in enumerate(zip(axes[0], judged, strict=True)):
        _against(axis, found, f"seed {seed}")
    _finish(figure, path, name)


def _against(axis: plt.Axes, found: Judged, name: str) -> None:
    curve = found.curves[0]
    if curve.r2.value is None:
        axis.set_title(f"{name}: {curve.r2.note}", fontsize=8)
        return
    x = curve(found.ours)
    ends = [min(x.min(), found.theirs.min()), max(x.max(), found.theirs.max())]
    axis.scatter(x, found.theirs, s=5, alpha=0.35)
    axis.plot(ends, ends, "k--", lw=0.8)
    axis.set(xlabel="surrogate, after Φ¹ (log-odds)", ylabel="network (log-odds)")
    axis.set_title(f"{name}: R² {curve.r2.value:.2f}, τ {found.measures.tau.value or 0:.2f}", fontsize=9)


def _picture(axis: plt.Axes, image: torch.Tensor, title: str) -> None:
    axis.imshow(image[0].numpy(), cmap="gray")
    axis.set_title(title, fontsize=7)
    axis.axis("off")


def _finish(figure: plt.Figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
