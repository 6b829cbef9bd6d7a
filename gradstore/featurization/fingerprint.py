"""What makes the identity of a store: a project's model and data, and the settings it is featurized with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradstore.featurization.settings import Given, Settings, takes_settings
from gradstore.model.examples import Examples, input_bytes, sample_rows
from gradstore.model.parameters import ParameterBlock, parameter_blocks
from gradstore.model.project import Project
from gradstore.model.weights import weights_digest
from gradstore.projection import Projection
from gradstore.store.identity import fingerprint_of
from gradstore.store.schema import MEANING

if TYPE_CHECKING:
    from typing_extensions import Unpack


def model_identity(
    project: Project, blocks: Sequence[ParameterBlock], settings: Settings, *, classes: int
) -> dict[str, Any]:
    """Name everything that decides what the rows of a store are, but for the data; its digest is the fingerprint.

    Returns:
        Nested plain values. Not among them: the text of the project file, batch size, device index, workers, paths and
        clocks.
    """
    chosen = settings.identity()
    return {
        "format": MEANING,
        **chosen,
        "projection": {**chosen["projection"], "version": Projection.VERSION},
        "parameters": {
            "count": sum(block.size for block in blocks),
            "blocks": [[block.name, list(block.shape)] for block in blocks],
        },
        "weights": weights_digest(project.model),
        "precision": str(next(project.model.parameters()).dtype).removeprefix("torch."),
        "classes": classes,
    }


def sampled_identity(examples: Examples, poisoned: np.ndarray | None = None, n: int | None = None) -> dict[str, Any]:
    """Name what a split's data are as stores before version 3 have it, whose rows have no digests of their inputs.

    Args:
        examples: the split.
        poisoned: which rows are poisoned, bool [rows], where that is known.
        n: look at the first n rows only, as if the split ended there.

    Returns:
        Length, and digests of labels, of known poison and of the bytes of these rows.

    Raises:
        ProjectError: a row read twice differs.
    """
    n = len(examples) if n is None else n
    rows = sample_rows(n)
    examples.require_repeatable(rows)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(input_bytes(examples.read([int(row)])[0]))
    return {
        "length": n,
        "labels": hashlib.sha256(examples.labels[:n].tobytes()).hexdigest(),
        "poisoned": "not known" if poisoned is None else hashlib.sha256(poisoned[:n].tobytes()).hexdigest(),
        "sampled rows": digest.hexdigest(),
    }


@takes_settings
def fingerprint(project: Project, **settings: Unpack[Given]) -> str:
    """Tell the fingerprint of a store of `project` with these settings (`gradstore.featurization.fingerprint`).

    Runs the model on one example of the first split, to count its logits.

    Args:
        project: model, weights and splits.
        **settings: those of `gradstore.featurization.settings.Settings`.

    Returns:
        32 hexadecimal digits.

    Raises:
        UsageError: a setting is unusable.
        ProjectError: the project is wrong.
    """
    return fingerprint_of(identity_of_model(project, Settings(**settings)))


def identity_of_model(project: Project, settings: Settings) -> dict[str, Any]:
    """Name what decides the rows of a store of `project`, but for its data.

    Runs the model on one example of the first split, to count its logits.

    Returns:
        Nested plain values.

    Raises:
        UsageError: a setting is unusable.
        ProjectError: the project is wrong.
    """
    settings.make_projection()  # which refuses what is out of range
    project.prepare()
    inputs, _ = project.examples(next(iter(project.splits))).read([0])
    with torch.no_grad():
        classes = project.logits(inputs).shape[1]
    blocks = parameter_blocks(project.model, project.parameters)
    return model_identity(project, blocks, settings, classes=classes)
