"""Inputs that occur twice, in a split or in two of a project: duplicates, and test data that was seen in training."""

from __future__ import annotations

import time

import numpy as np

from gradstore.errors import GradstoreError
from gradstore.model.examples import Examples, input_digests
from gradstore.model.project import Project

SECONDS = 3.0  # of reading, for all splits together
_TOGETHER = 64
_UNREAD = np.void(bytes(16))


def repeated_inputs(project: Project, split: str, seconds: float = SECONDS) -> str:
    """Compare the inputs of a split with one another, and with those of the project's other splits.

    Reads rows in order for as long as it may; holds 16 bytes of each.

    Args:
        project: has the data.
        split: the one that is asked about.
        seconds: that reading may take; at least 64 rows of every split are read.

    Returns:
        What was found, for people: how many rows were read, which are the same, and which splits share some.
    """
    names = [split, *(name for name in project.splits if name != split)]
    own, n = _digests(project.examples(split, skipping=True), seconds / len(names))
    rows = np.flatnonzero(own != _UNREAD)
    read = f"all {n} inputs" if len(rows) == n else f"{len(rows)} of {n} inputs read"
    _, first, counts = np.unique(own[rows], return_index=True, return_counts=True)
    again = len(rows) - len(first)
    parts = [f"{read}: no two the same" if not again else f"{read}: {again} the same as an earlier one"]
    if again:
        row = int(rows[first[counts > 1].min()])
        parts.append(f"such as rows {row} and {int(np.flatnonzero(own == own[row])[1])}")
    for name in names[1:]:
        try:
            other, _ = _digests(project.examples(name, skipping=True), seconds / len(names))
        except GradstoreError:
            continue  # whoever featurizes it is told
        shared = np.flatnonzero(np.isin(other, own[rows]))
        if len(shared):
            parts.append(f"{len(shared)} of {len(other)} of split {name!r} are among them, row {shared[0]} first")
    return "; ".join(parts)


def _digests(examples: Examples, seconds: float) -> tuple[np.ndarray, int]:
    """Digests of the first rows, 16 opaque bytes each, zeros where one cannot be read; and how many rows there are."""
    found, began, n = [np.empty(0, "V16")], time.perf_counter(), len(examples)
    for start in range(0, n, _TOGETHER):
        rows = range(start, min(start + _TOGETHER, n))
        digests = np.ascontiguousarray(input_digests(examples.read(rows)[0])).view("V16")[:, 0]
        digests[[row - start for row in rows if row in examples.unreadable]] = _UNREAD
        found.append(digests)
        if time.perf_counter() - began > seconds:
            break
    return np.concatenate(found), n
