"""What people say of rows and may change their minds about: labels, marks, rows to leave out, names of classes, a note.

Features depend on none of it, so it is kept beside the shards in one small file, `annotations.safetensors`: whole,
under a digest, replaced atomically, with a line of history a change. What it does not say stays as it was when the rows
were computed. It makes no two stores incomparable.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.errors import CorruptError
from gradstore.machine.clock import now_utc
from gradstore.store.files.disk import Disk, MissingFileError
from gradstore.store.files.manifest import Manifest
from gradstore.store.files.tensor_file import TensorFile, plain_json, read_tensors, under_digest
from gradstore.store.files.tensor_header import tensor_pieces

ANNOTATIONS = "annotations.safetensors"
_NAME, _VERSION = "annotations", 1
_TEXT_BYTES = 16 << 20  # of names, note and history
_LATEST = 1000  # lines of history that are kept


@dataclass(frozen=True)
class Annotations:
    """What is said of the rows of a store.

    Attributes:
        classes: names of the classes; None where the manifest's hold.
        labels: int64 [≤ n], of the first rows; None where those read with the rows hold.
        poisoned: bool [≤ n], of the first rows; None where it is not known.
        excluded: bool [≤ n], of the first rows: those that count nowhere; None for none.
        note: for people.
        history: (when, what) of every change, the latest last.
    """

    classes: tuple[str, ...] | None = None
    labels: np.ndarray | None = None
    poisoned: np.ndarray | None = None
    excluded: np.ndarray | None = None
    note: str = ""
    history: tuple[tuple[str, str], ...] = ()

    def changed(self, what: str, **values: Any) -> Annotations:
        """The same with other values, and a line of history that says `what`."""
        history = (*self.history, (now_utc(), what))[-_LATEST:]
        return replace(self, history=history, **values)


def read_annotations(path: Path, manifest: Manifest, disk: Disk) -> Annotations:
    """Read what is said of the rows of the store at `path`.

    Args:
        path: the store.
        manifest: of the store.
        disk: where bytes come from.

    Returns:
        The annotations; empty where there is no such file. Holds up to 10 bytes a row.

    Raises:
        CorruptError: the file is damaged, of another version, or of another store.
        UnsafeError: a link, pipe or device stands in its place.
    """
    file = path / ANNOTATIONS
    try:
        return _checked(read_tensors(file, _NAME, 10 * manifest.n + _TEXT_BYTES, disk), manifest)
    except MissingFileError:
        return Annotations()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(
            "the annotations are damaged",
            where=file,
            got=str(error)[:200],
            hint="Remove the file, and annotate the store again; features are not affected",
        ) from error


def write_annotations(path: Path, manifest: Manifest, said: Annotations, disk: Disk) -> None:
    """Replace the annotations of the store at `path`, in one atomic step; the writer's lock is held."""
    arrays = {"labels": said.labels, "poisoned": said.poisoned, "excluded": said.excluded}
    kept = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
    text = json.dumps(
        {
            "version": _VERSION,
            "fingerprint": manifest.fingerprint,
            "split": manifest.split,
            "classes": said.classes,
            "note": said.note,
            "history": said.history,
        }
    )
    disk.replace_file(path / ANNOTATIONS, b"".join(tensor_pieces(kept, under_digest(_NAME, text, kept))))


def _checked(found: TensorFile, manifest: Manifest) -> Annotations:
    said, arrays = plain_json(found.text), dict(found.arrays)
    if not found.sealed or said["version"] != _VERSION:
        raise ValueError("no digest, or another version")
    if (said["fingerprint"], said["split"]) != (manifest.fingerprint, manifest.split):
        raise ValueError("annotations of another store")
    labels, poisoned, excluded = (arrays.pop(name, None) for name in ("labels", "poisoned", "excluded"))
    classes = said["classes"]
    for array, dtype in ((labels, np.int64), (poisoned, np.bool_), (excluded, np.bool_)):
        if array is not None and (array.dtype != dtype or array.ndim != 1 or len(array) > manifest.n):
            raise ValueError(f"an array {array.dtype} {list(array.shape)}")
    if arrays:
        raise ValueError("other arrays")
    top = max(manifest.schema.classes, 2)
    if labels is not None and len(labels) and not (labels.min() >= -1 and labels.max() < top):
        raise ValueError("labels of classes that are none")
    if classes is not None and not _are_names(classes, manifest.schema.classes):
        raise ValueError("other names of classes than there are classes")
    history = said["history"]
    if not isinstance(said["note"], str) or not all(_are_names(line, 2) for line in history):
        raise ValueError("a note or history that is no text")
    lines = tuple((at, what) for at, what in history)
    return Annotations(None if classes is None else tuple(classes), labels, poisoned, excluded, said["note"], lines)


def _are_names(value: Any, count: int) -> bool:
    return isinstance(value, Sequence) and len(value) == count and all(isinstance(text, str) for text in value)
