"""Rows as a report shows them."""

from __future__ import annotations

from gradstore.report.views import Example
from gradstore.store.rows import Rows


def shown_example(store: Rows, row: int) -> Example:
    """One row with its label, prediction, truth and picture, as its own store has it; reads that row."""
    part, own = store.part(row)
    truth = part.poisoned
    return Example(
        split=_split_name(store, part),
        row=int(part.rows[own]),
        label=class_name(part, int(part.labels[own])),
        predicted=predicted_class(part, own),
        poisoned=None if truth is None else bool(truth[own]),
        shown=part.preview(own),
    )


def _split_name(store: Rows, part: Rows) -> str:
    """The split that a part is of; with its store, where another store has a split of that name."""
    alike = {other.where for other in store.parts if other.split == part.split}
    return part.split if len(alike) == 1 else f"{part.split} of {part.where}"


def class_name(store: Rows, label: int) -> str | None:
    """Name of a class; a single logit has the classes 0 and 1; None for the label -1."""
    if label < 0:
        return None
    return store.classes[label] if len(store.classes) > 1 else str(label)


def predicted_class(store: Rows, row: int) -> str | None:
    """Name of the class that the network predicts for a row; None where its logits are not known."""
    return class_name(store, int(store.predicted[row]))


def provenance(train: Rows, *queries: Rows) -> tuple[tuple[str, str], ...]:
    """Where a report's numbers come from: the stores and their projection."""
    card = train.card()
    sides = [("training store", train), *(("query store", rows) for rows in queries)]
    listed = [(name, f"{part.where} · {part.card()['split']}") for name, rows in sides for part in rows.parts]
    return (*listed, *((name, card[name]) for name in ("projection", "parameters", "layout", "fingerprint")))
