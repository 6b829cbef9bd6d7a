"""Annotations from a project: labels, poison marks and names of classes, of rows whose inputs are the stored ones."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from gradstore.errors import MismatchError
from gradstore.featurization.fingerprint import sampled_identity
from gradstore.featurization.row_audit import require_labels
from gradstore.featurization.same_inputs import compare_inputs
from gradstore.model.project import Project
from gradstore.store.annotate import annotate
from gradstore.store.feature_store import FeatureStore
from gradstore.store.schema import UNREADABLE

_TOGETHER = 64


def annotate_from_project(
    project: Project,
    store: str | os.PathLike[str],
    *,
    split: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureStore:
    """Say of a store's rows what a project says of them now (`gradstore.annotate_from_project`).

    Reads every example once: its label is taken, and its input must be the one that was featurized. The model is not
    run.

    Args:
        project: has the data, as they are labelled now.
        store: directory of the store.
        split: of the project; default the store's.
        progress: called with (rows read, rows to read).

    Returns:
        The store as it now reads.

    Raises:
        UsageError: the project has no such split, or the store is unfinished.
        ProjectError: a label is no class, or a row cannot be read.
        MismatchError: a row has other inputs than when it was stored, or there are more or fewer rows.
        LockedError: another process is writing the store.

    Example:
        >>> gs.annotate_from_project(project, "stores/train").labels[:4]
        array([0, 1, 2, 3])
    """
    now = FeatureStore(store).require_complete()
    split = split or now.split
    # A row that could not be read when the store was made need not be readable now.
    examples, n = project.examples(split, skipping=bool((now.absent == UNREADABLE).any())), len(now)
    if len(examples) != n:
        raise MismatchError("the split has other rows than the store", where=now.path, expected=n, got=len(examples))
    if now.schema.has_inputs:
        compare_inputs(examples, now.path, now.manifest, "all", now.disk)
    elif sampled_identity(examples)["sampled rows"] != now.identity["data"].get("sampled rows"):
        raise MismatchError("sampled rows have other inputs than when they were stored", where=now.path)
    labels = np.empty(n, np.int64)
    for start in range(0, n, _TOGETHER):
        rows = range(start, min(start + _TOGETHER, n))
        labels[rows.start : rows.stop] = examples.read(rows)[1]
        if progress is not None:
            progress(rows.stop, n)
    require_labels(labels, now.schema.classes, split)
    names = project.class_names(now.schema.classes)
    return annotate(now.path, labels=labels, poisoned=project.poisoned_mask(split), classes=names, disk=now.disk)
