"""What kinds of projection do to explanations: neighbours, surrogates and forensics beside those of exact kernels."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset

import gradstore as gs
from benchmarks.exactness.gradients import KERNELS
from benchmarks.paper.experiment import Experiment, Outputs, dense, split_outputs, surrogate
from benchmarks.paper.forensic import nearest
from gradstore.explain.faithfulness import faithfulness
from gradstore.explain.forensics import wilson
from gradstore.kernels.definitions import projected_kernel

NEIGHBOURS, VOTES = 5, 3

Grams = Mapping[str, np.ndarray]
"""Split -> κ between its examples and those of "train", float64 [m, n]."""


def shortened(project: gs.Project, rows: Mapping[str, int]) -> gs.Project:
    """The first so many examples of each split."""
    return gs.Project(
        model=project.model,
        splits={split: Subset(project.splits[split], range(count)) for split, count in rows.items()},
    )


def compare(project: gs.Project, settings: Iterable[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    """What each (kind, K, seed) explains, and what the exact kernels do: two rows each, one a kernel."""
    project.prepare()
    outputs = {split: split_outputs(project, split) for split in project.splits}
    truth = {kernel: exact_grams(project, kernel) for kernel in KERNELS}
    best = {kernel: nearest(grams["test"], grams["train"], NEIGHBOURS, kernel) for kernel, grams in truth.items()}
    for kernel, grams in truth.items():
        yield {"kind": "exact", "kernel": kernel, **explained(project, outputs, kernel, grams, best[kernel])}
    for kind, K, seed in settings:
        for kernel, grams in projected_grams(project, kind, K, seed).items():
            found = explained(project, outputs, kernel, grams, best[kernel])
            yield {"kind": kind, "K": K, "projection_seed": seed, "kernel": kernel, **found}


def exact_grams(project: gs.Project, kernel: str) -> Grams:
    """Of the exact kernel that a projected one estimates."""
    name = projected_kernel(kernel).exact
    return {
        split: gs.exact_gram(project, split, None if split == "train" else "train", name) for split in project.splits
    }


def projected_grams(project: gs.Project, kind: str, K: int, seed: int) -> dict[str, Grams]:
    """Of each kernel, from stores."""
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            split: gs.featurize(project, split=split, out=Path(folder) / split, proj_dim=K, projection=kind, seed=seed)
            for split in project.splits
        }
        return {
            kernel: {split: dense(store, stores["train"], kernel) for split, store in stores.items()}
            for kernel in KERNELS
        }


def explained(
    project: gs.Project, outputs: Mapping[str, Outputs], kernel: str, grams: Grams, best: np.ndarray
) -> dict[str, Any]:
    """Agreement with the exact neighbours `best` [m, 5], τ of the surrogate, and forensics where some are poisoned."""
    found = nearest(grams["test"], grams["train"], NEIGHBOURS, kernel)
    model = surrogate(Experiment(project, outputs, {kernel: grams}), kernel, "multinomial")
    test = outputs["test"]
    tau = faithfulness(test.labels, test.logits, model.log_odds_basis(grams["test"]), bootstrap=0).tau.value
    shared = (found[:, :, None] == best[:, None, :]).any(2).mean()
    return {"top5": shared, "tau": tau, **_forensics(project, kernel, grams)}


def _forensics(project: gs.Project, kernel: str, grams: Grams) -> dict[str, Any]:
    poisoned = project.poisoned_mask("train")
    if poisoned is None:
        return {}
    queries = [split for split in grams if split != "train"]
    flagged, truth = [], []
    for split in queries:
        votes = poisoned[nearest(grams[split], grams["train"], NEIGHBOURS, kernel)].sum(1)
        flagged.append(votes >= VOTES)
        truth.append(project.poisoned_mask(split))
    said, true = np.concatenate(flagged), np.concatenate(truth)
    tp, fp, fn = int((said & true).sum()), int((said & ~true).sum()), int((~said & true).sum())
    precision, recall = wilson(tp, tp + fp), wilson(tp, tp + fn)
    shares = {"precision": precision, "recall": recall}
    return {name: "" if share is None else share.value for name, share in shares.items()} | {"fp": fp, "fn": fn}
