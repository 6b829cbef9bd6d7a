"""What a project knows of poisoned rows, as annotations of its stores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gradstore.featurization.plan import Plan
from gradstore.store.annotations import read_annotations, write_annotations
from gradstore.store.store_writer import StoreWriter


def mark_poisoned(plan: Plan, writer: StoreWriter, note: Callable[[str], None] | None) -> None:
    """Mark the rows of a new store, and those that are appended to one; marks that are there already stay.

    Args:
        plan: knows which rows the project says are poisoned.
        writer: of the store.
        note: told where the store says otherwise.

    Raises:
        CorruptError: the annotations are damaged.
    """
    mask = plan.project.poisoned_mask(plan.split)
    if mask is None or writer.manifest.schema.truth:
        return
    mask = mask & ~writer.manifest.removed_of(range(len(mask)))
    said = read_annotations(writer.path, writer.manifest, writer.disk)
    known = np.zeros(0, bool) if said.poisoned is None else said.poisoned
    begun = said.poisoned is not None or not writer.manifest.shards
    if note is not None and (not begun or not np.array_equal(known, mask[: len(known)])):
        note(
            "the project marks other rows as poisoned than the store; `gradstore annotate STORE --from PROJECT.PY` "
            "takes its marks over"
        )
    if begun and len(known) < len(mask):
        marked = np.concatenate([known, mask[len(known) :]])
        what = f"{int(mask[len(known) :].sum())} poison marks of the project"
        write_annotations(writer.path, writer.manifest, said.changed(what, poisoned=marked), writer.disk)
