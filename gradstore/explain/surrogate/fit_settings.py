"""Settings of a fit, what they ask to be learnt, and what a fit gives."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from scipy.special import softmax

from gradstore.errors import UsageError
from gradstore.explain.surrogate.training_data import TrainingData

BACKENDS = ("multinomial", "sgd")
TARGETS = ("labels", "predictions", "probabilities")
SELECTIONS = ("tau", "likelihood")


@dataclass(frozen=True)
class Settings:
    """Settings of a fit, as `KernelGLM` documents them; memory in bytes."""

    backend: str
    alpha: float | str
    select: str
    target: str
    class_weight: str | Mapping[Any, float] | None
    tolerance: float
    max_iter: int
    memory: int
    scratch: str | os.PathLike[str] | None
    shuffle: bool
    seed: int


@dataclass(frozen=True)
class Fitted:
    """What a fit gives; `KernelGLM` documents each under the same name with an underscore."""

    coef: np.ndarray
    intercept: np.ndarray
    vectors: np.ndarray | None
    alpha: float
    n_iter: int
    loss: float
    converged: bool
    reason: str
    logit_error: float
    alpha_scores: dict[float, float] = field(default_factory=dict)


def targets(data: TrainingData, settings: Settings) -> np.ndarray:
    """Distributions over classes to learn, float64 [n, classes]."""
    if settings.target == "probabilities":
        return softmax(data.outputs, axis=1)
    return np.eye(len(data.classes))[hard_labels(data, settings)]


def hard_labels(data: TrainingData, settings: Settings) -> np.ndarray:
    """Class of each row: its label, or the one that the network finds most likely; int64 [n]."""
    return data.labels if settings.target == "labels" else np.argmax(data.outputs, axis=1)  # type: ignore[arg-type]


def class_weights(data: TrainingData, settings: Settings) -> np.ndarray:
    """Weight of a row by its class, float64 [classes]; a class without rows weighs as one with a single row."""
    labels, chosen = hard_labels(data, settings), settings.class_weight
    if chosen is None:
        return np.ones(len(data.classes))
    if isinstance(chosen, Mapping):
        return np.array([chosen.get(value, 1.0) for value in data.classes.tolist()])
    counts = np.bincount(labels, minlength=len(data.classes))
    return len(labels) / ((counts > 0).sum() * np.maximum(counts, 1))


def require_usable(data: TrainingData, settings: Settings) -> None:
    """Refuse settings that mean nothing, or that need what the data do not say.

    Raises:
        UsageError: names the setting.
    """
    named = isinstance(settings.class_weight, Mapping)
    for name, value, choices in (
        ("backend", settings.backend, BACKENDS),
        ("target", settings.target, TARGETS),
        ("select", settings.select, SELECTIONS),
        ("class_weight", None if named else settings.class_weight, ("balanced", None)),
    ):
        if value not in choices:
            listed = ", ".join(map(str, choices))
            raise UsageError(f"unknown {name}", where=f"--{name}", expected=f"one of {listed}", got=repr(value))
    alpha = settings.alpha
    if alpha != "auto" and not (isinstance(alpha, (int, float)) and 0 < alpha < float("inf")):
        raise UsageError("alpha is unusable", where="--alpha", expected="a number above 0, or auto", got=repr(alpha))
    if settings.target != "labels" and data.outputs is None:
        raise UsageError("the network's outputs are not known", where=data.name, hint="Give fit(…, outputs=logits)")
    if settings.backend == "sgd" and settings.target == "probabilities":
        raise UsageError("sgd learns classes", where="--target", expected="labels or predictions", got="probabilities")


class Solver(Protocol):
    """One way to fit, for any strength of the penalty and any selection of rows."""

    def fit(self, alpha: float, keep: np.ndarray | None) -> Fitted:
        """Fit on the rows in `keep` (bool [n]); None for all."""

    def held_out(self, fitted: Fitted, keep: np.ndarray) -> np.ndarray:
        """Numbers whose softmax is the probabilities of the other rows, after `fit(…, keep)`."""
