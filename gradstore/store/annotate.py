"""`annotate`: say of stored rows what their labels are, which are poisoned, what classes are called."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.errors import UsageError
from gradstore.indices import RowChoice, class_indices, row_mask
from gradstore.store.annotations import read_annotations, write_annotations
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.disk import Disk
from gradstore.store.files.manifest_file import require_storable
from gradstore.store.schema import EXCLUDED
from gradstore.store.store_writer import open_for_repair


def annotate(
    store: str | os.PathLike[str],
    *,
    labels: Sequence[int] | np.ndarray | None = None,
    poisoned: RowChoice | None = None,
    excluded: RowChoice | None = None,
    classes: Sequence[str] | None = None,
    note: str | None = None,
    disk: Disk | None = None,
) -> FeatureStore:
    """Change what is said of the rows of a store (`gradstore.annotate`); features are not computed again.

    Labels, poison marks and names are no part of what a store is: it stays comparable with its query stores, and goes
    on as it began. What is not given stays as it is. The change is atomic, and a line of its history is kept.

    Args:
        store: directory of the store.
        labels: classes of all rows, int [n]; -1 for none, as removed rows have, whatever is given.
        poisoned: which rows are poisoned, as a bool mask [n] or indices.
        excluded: which rows are to count nowhere, as a bool mask [n] or indices: they are never neighbours, queries or
            part of a fit, until this is changed again. Their features stay; `gradstore.remove` takes them out.
        classes: names of the classes.
        note: for people; shown by `gradstore info`.
        disk: where bytes go; for tests.

    Returns:
        The store as it now reads.

    Raises:
        UsageError: nothing is given, or it does not fit the store; names the first row.
        LockedError: another process is writing the store.
        CorruptError: the manifest or the old annotations are damaged.

    Example:
        >>> gs.annotate("stores/train", poisoned=[3, 5]).poisoned.nonzero()[0]
        array([3, 5])
    """
    path = Path(store)
    if all(given is None for given in (labels, poisoned, excluded, classes, note)):
        expected = "labels, poisoned, excluded, classes or note"
        raise UsageError("nothing to annotate", where="annotate", expected=expected)
    disk = disk or Disk()
    with open_for_repair(path, disk) as writer:
        now = FeatureStore(path, disk=disk)
        gone = now.manifest.removed_of(range(len(now)))  # of which nothing is known, and nothing said
        values: dict[str, Any] = {}
        changes = []
        if labels is not None:
            values["labels"] = np.where(gone, -1, _labels(labels, now))
            changes.append(f"{int((values['labels'] != now.labels).sum())} labels")
        if poisoned is not None:
            values["poisoned"] = row_mask(poisoned, len(now), where="poisoned") & ~gone
            before = np.zeros(len(now), bool) if now.poisoned is None else now.poisoned
            changes.append(f"{int((values['poisoned'] != before).sum())} poison marks")
        if excluded is not None:
            values["excluded"] = row_mask(excluded, len(now), where="excluded")
            changes.append(f"{int((values['excluded'] != (now.absent == EXCLUDED)).sum())} exclusions")
        if classes is not None:
            values["classes"] = _names(classes, now)
            changes += ["names of classes"] if values["classes"] != now.classes else []
        if note is not None:
            values["note"] = note
            changes.append("note")
        what = ", ".join(changes) or "nothing"
        said = read_annotations(path, writer.manifest, disk).changed(what, **values)
        writer.require_lock()
        write_annotations(path, writer.manifest, said, disk)
    return FeatureStore(path, disk=disk)


def _labels(given: Sequence[int] | np.ndarray, store: FeatureStore) -> np.ndarray:
    labels, top = class_indices(given, where="labels"), max(store.schema.classes, 2)
    if labels.shape != (len(store),):
        raise UsageError("labels of other rows", where="labels", expected=f"[{len(store)}]", got=list(labels.shape))
    bad = np.flatnonzero((labels < -1) | (labels >= top))
    if bad.size:
        expected, got = f"0 to {top - 1}, or -1 for none", int(labels[bad[0]])
        raise UsageError(f"the label of row {bad[0]} is no class", where="labels", expected=expected, got=got)
    return labels


def _names(given: Sequence[str], store: FeatureStore) -> tuple[str, ...]:
    names = tuple(map(str, given))
    if len(names) != store.schema.classes:
        expected = f"{store.schema.classes} names"
        raise UsageError("class names do not match the logits", where="classes", expected=expected, got=len(names))
    require_storable(names, where="classes")
    return names
