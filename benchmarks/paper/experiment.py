"""One trained network under every kernel: Gram matrices, surrogates, and how faithful they are."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning

import gradstore as gs
from gradstore.errors import UsageError
from gradstore.explain.faithfulness import Faithfulness, faithfulness
from gradstore.explain.linearisation import MAPS, Linearisation, class_logits, linearise
from gradstore.explain.surrogate.training_data import two_logits
from gradstore.kernels.definitions import PROJECTED
from gradstore.kernels.gram_matrix import Gram

KERNELS = ("trntk", "trntk0", "proj-trntk", "proj-pntk", "embedding", "ck")
BACKENDS: Mapping[str, Mapping[str, object]] = {
    "sgd": {"backend": "sgd", "alpha": 1e-2, "max_iter": 300},
    "multinomial": {"backend": "multinomial", "alpha": 1e-4, "max_iter": 600},
}
"""The fit that the paper's scripts make of their multi-class models, and the softmax that its text describes."""
SGD_ALPHA_OF_TWO = 1e-4
"""The paper fits models of two classes with a weaker penalty."""

Similarities = np.ndarray | Gram | gs.Rows
"""κ between a split's rows and the training rows: a matrix in memory, one in a file, or the store it follows from."""


@dataclass(frozen=True)
class Outputs:
    """A split: correct classes int64 [n] and the network's logits float64 [n, classes]."""

    labels: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class Experiment:
    """A project, its splits' outputs, and kernels.

    Attributes:
        outputs: of each split.
        grams: kernel -> split -> κ between the split's rows and the training rows, [m, n].
    """

    project: gs.Project
    outputs: Mapping[str, Outputs]
    grams: Mapping[str, Mapping[str, Similarities]]

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
    stored: bool = False,
    memory: str = "2GB",
) -> Experiment:
    """Compute the kernels of a project whose first split is "train"; stores go to `folder`.

    Args:
        project: model, weights and splits.
        folder: of the stores; what is there already is continued.
        kernels: names.
        proj_dim: K.
        seed: of the projection.
        layers: modules of the embedding kernel, a regular expression; default every module without submodules.
        stored: leave projected kernels in their stores and exact ones in files in `folder`, so that no matrix need fit
            the memory. Otherwise all matrices are float64 in memory.
        memory: for exact kernels.
    """
    project.prepare()
    folder.mkdir(parents=True, exist_ok=True)
    outputs = {split: split_outputs(project, split) for split in project.splits}
    grams: dict[str, dict[str, Similarities]] = {}
    if any(kernel in PROJECTED for kernel in kernels):
        stores = {
            split: gs.featurize(project, split=split, out=folder / split, proj_dim=proj_dim, seed=seed)
            for split in project.splits
        }
        for kernel in (k for k in kernels if k in PROJECTED):
            grams[kernel] = {
                split: store if stored else dense(store, stores["train"], kernel) for split, store in stores.items()
            }
    for kernel in (k for k in kernels if k not in PROJECTED):
        grams[kernel] = {
            split: gs.exact_gram(
                project,
                split,
                None if split == "train" else "train",
                kernel,
                layers=layers if kernel == "embedding" else None,
                out=folder / f"{kernel}-{split}.h5" if stored else None,  # type: ignore[arg-type]
                memory=memory,
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


def dense(a: gs.Rows, b: gs.Rows, kernel: str) -> np.ndarray:
    """The whole matrix between two stores, float64."""
    found = np.empty((len(a), len(b)))
    for tile in gs.gram(a, b, kernel):
        rows, columns = tile.rows, tile.columns
        found[rows.start : rows.stop, columns.start : columns.stop] = tile.values
        if a == b:
            found[columns.start : columns.stop, rows.start : rows.stop] = tile.values.T
    return found


def surrogate(found: Experiment, kernel: str, backend: str, **changes: object) -> gs.KernelGLM:
    """Fit on the training split; how far it came is in its attributes."""
    train, source = found.outputs["train"], found.grams[kernel]["train"]
    settings = dict(BACKENDS[backend])
    if backend == "sgd" and train.logits.shape[1] == 2:
        settings["alpha"] = SGD_ALPHA_OF_TWO
    name = kernel if isinstance(source, gs.Rows) else "precomputed"
    model = gs.KernelGLM(name, **{**settings, **changes})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(source, train.labels, outputs=train.logits)


def affordable(found: Experiment, kernel: str, backend: str, memory: str) -> gs.KernelGLM | None:
    """A surrogate, or None and a line on the terminal where it needs more memory than it may take."""
    try:
        return surrogate(found, kernel, backend, memory=memory)
    except UsageError as error:
        if not error.what.startswith("too little memory"):
            raise
        print(f"no {backend} surrogate of {kernel}: {error}", file=sys.stderr)
        return None


@dataclass(frozen=True)
class Judged:
    """A surrogate on one split.

    Attributes:
        measures: how faithful it is.
        curves: the maps of App. L.
        ours: the surrogate's logits, of the second of two classes or of all, float64 [m, 1 or classes].
        theirs: the network's.
        correct: bool, of the same shape: of the correct class.
    """

    measures: Faithfulness
    curves: tuple[Linearisation, ...]
    ours: np.ndarray
    theirs: np.ndarray
    correct: np.ndarray


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
    ours, theirs = class_logits(basis), class_logits(outputs.logits)
    curves = tuple(linearise(labels, outputs.logits, basis, name, bootstrap=0) for name in MAPS)
    correct = labels[:, None] == (np.ones((1, 1)) if ours.shape[1] == 1 else np.arange(ours.shape[1]))
    return Judged(faithfulness(labels, outputs.logits, basis, bootstrap=0), curves, ours, theirs, correct)
