"""One trained network under every kernel: Gram matrices, surrogates, and how faithful they are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning

import gradstore as gs
from gradstore.faithfulness import Faithfulness, faithfulness
from gradstore.linearisation import MAPS, Linearisation, linearise
from gradstore.surrogate.alpha import log_odds
from gradstore.surrogate.training_data import two_logits

KERNELS = ("trntk", "trntk0", "proj-trntk", "proj-pntk", "embedding", "ck")
PROJECTED = ("proj-trntk", "proj-pntk", "proj-trntk0")
BACKENDS: Mapping[str, Mapping[str, object]] = {
    "sgd": {"backend": "sgd", "alpha": 1e-2, "max_iter": 300},
    "multinomial": {"backend": "multinomial", "alpha": 1e-4, "max_iter": 600},
}
"""The paper's fit of its multi-class models, and the softmax of its equations."""


@dataclass(frozen=True)
class Outputs:
    """A split: correct classes int64 [n] and the network's logits float64 [n, classes]."""

    labels: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class Experiment:
    """A project, its splits' outputs, and Gram matrices.

    Attributes:
        outputs: of each split.
        grams: kernel -> split -> κ between the split's rows and the training rows, float64 [m, n].
    """

    project: gs.Project
    outputs: Mapping[str, Outputs]
    grams: Mapping[str, Mapping[str, np.ndarray]]

    @property
    def queries(self) -> list[str]:
        """Splits other than "train"."""
        return [split for split in self.outputs if split != "train"]


def run(
    project: gs.Project,
    folder: Path,
    *,
    kernels: Sequence[str] = KERNELS,
    proj_dim: int = 10240,
    seed: int = 0,
    layers: str | None = None,
) -> Experiment:
    """Compute the kernels of a project whose first split is "train"; stores go to `folder`.

    Args:
        layers: modules of the embedding kernel, a regular expression; default every module without submodules.
    """
    project.prepare()
    outputs = {split: split_outputs(project, split) for split in project.splits}
    grams: dict[str, dict[str, np.ndarray]] = {}
    if any(kernel in PROJECTED for kernel in kernels):
        stores = {
            split: gs.featurize(project, split=split, out=folder / split, proj_dim=proj_dim, seed=seed)
            for split in project.splits
        }
        for kernel in (k for k in kernels if k in PROJECTED):
            grams[kernel] = {split: dense(store, stores["train"], kernel) for split, store in stores.items()}
    for kernel in (k for k in kernels if k not in PROJECTED):
        grams[kernel] = {
            split: gs.exact_gram(
                project,
                split,
                None if split == "train" else "train",
                kernel,
                layers=layers if kernel == "embedding" else None,
            )
            for split in project.splits
        }
    return Experiment(project, outputs, {kernel: grams[kernel] for kernel in kernels})


def split_outputs(project: gs.Project, split: str) -> Outputs:
    """Labels and logits of a split; reads it whole."""
    examples = project.examples(split)
    logits = []
    for start in range(0, len(examples), 256):
        inputs, _ = examples.read(range(start, min(start + 256, len(examples))))
        logits.append(project.logits(inputs).double().numpy())
    return Outputs(examples.labels, two_logits(np.concatenate(logits)))


def dense(a: gs.FeatureStore, b: gs.FeatureStore, kernel: str) -> np.ndarray:
    """The whole matrix between two stores, float64."""
    found = np.empty((len(a), len(b)))
    for tile in gs.gram(a, b, kernel):
        rows, columns = tile.rows, tile.columns
        found[rows.start : rows.stop, columns.start : columns.stop] = tile.values
        if a.path == b.path:
            found[columns.start : columns.stop, rows.start : rows.stop] = tile.values.T
    return found


def surrogate(found: Experiment, kernel: str, backend: str, **changes: object) -> gs.KernelGLM:
    """Fit on the Gram matrix of the training split; how far it came is in its attributes."""
    train = found.outputs["train"]
    model = gs.KernelGLM("precomputed", **{**BACKENDS[backend], **changes})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(found.grams[kernel]["train"], train.labels, outputs=train.logits)


@dataclass(frozen=True)
class Judged:
    """A surrogate on one split."""

    measures: Faithfulness
    curves: tuple[Linearisation, ...]
    ours: np.ndarray
    theirs: np.ndarray


def judge(
    found: Experiment, model: gs.KernelGLM, kernel: str, split: str = "test", labels: np.ndarray | None = None
) -> Judged:
    """Compare a surrogate with the network on a split; errors come from seeds, so there is no bootstrap.

    Args:
        labels: the correct classes; default those of the split.
    """
    outputs = found.outputs[split]
    labels = outputs.labels if labels is None else labels
    basis = model.log_odds_basis(found.grams[kernel][split])
    ours, theirs = log_odds(basis, labels), log_odds(outputs.logits, labels)
    curves = tuple(linearise(theirs, ours, name, bootstrap=0) for name in MAPS)
    return Judged(faithfulness(labels, outputs.logits, basis, bootstrap=0), curves, ours, theirs)
