"""Rows of a store as a report shows them."""

from __future__ import annotations

from gradstore.report import Example
from gradstore.store import FeatureStore


def shown_example(store: FeatureStore, row: int) -> Example:
    """One row with its label, prediction, truth and picture; reads that row."""
    truth = store.poisoned
    return Example(
        split=store.manifest.split,
        row=int(store.rows[row]),
        label=class_name(store, int(store.labels[row])),
        predicted=predicted_class(store, row),
        poisoned=None if truth is None else bool(truth[row]),
        shown=store.preview(row),
    )


def class_name(store: FeatureStore, label: int) -> str | None:
    """Name of a class; a single logit has the classes 0 and 1; None for the label -1."""
    if label < 0:
        return None
    return store.classes[label] if len(store.classes) > 1 else str(label)


def predicted_class(store: FeatureStore, row: int) -> str | None:
    """Name of the class that the network predicts for a row; None where its logits are not known."""
    return class_name(store, int(store.predicted[row]))


def provenance(train: FeatureStore, *queries: FeatureStore) -> tuple[tuple[str, str], ...]:
    """Where a report's numbers come from: the stores and their projection."""
    card = train.card()
    listed = [("training store", f"{train.path} · {card['split']}")]
    listed += [("query store", f"{store.path} · {store.card()['split']}") for store in queries]
    return (*listed, *((name, card[name]) for name in ("projection", "parameters", "layout", "fingerprint")))
