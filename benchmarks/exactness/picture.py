"""How often a residual is larger than x, by kind, model and K; drawn by matplotlib: `pip install ".[plots]"`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.exactness.models import CASES
from gradstore.projection.kinds import KINDS

ROWS = (("digits", "resnet18", "bert"), ("few", "bag", "alone"))
STYLES = {"rademacher": ("#1b6ca8", "-", 2.6), "gaussian": ("#8a8a8a", "--", 1.4), "sjlt": ("#d1495b", "-", 1.2)}
K, KERNEL = "10240", "proj-trntk"


def draw(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """A panel a model: above those that were trained, below those that are hard for a sparse P."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(9.6, 5.4), layout="constrained")
    for axis, name in zip(axes.flat, (name for names in ROWS for name in names), strict=True):
        for kind in KINDS:
            key = {"case": name, "kind": kind, "K": K, "kernel": KERNEL}
            found = [row for row in rows if all(row[column] == value for column, value in key.items())]
            found.sort(key=lambda row: -float(row["share"]))
            colour, line, width = STYLES[kind]
            curve = [float(row["residual"]) for row in found], [float(row["share"]) for row in found]
            axis.plot(*curve, color=colour, linestyle=line, linewidth=width, label=kind)
        axis.set_yscale("log")
        axis.set_ylim(1e-4, 1)
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=4)
        axis.set_title(CASES[name].title, fontsize=10)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("share of pairs beyond")
    for axis in axes[1]:
        axis.set_xlabel("|projected − exact| cosine")
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
