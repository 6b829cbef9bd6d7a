"""Import: projected gradients that another tool left in a memory map, as a store of their own kind."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.errors import UsageError
from gradstore.indices import class_indices
from gradstore.store.array_file import ArrayFile, open_array, open_raw_array
from gradstore.store.background_writer import in_background
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.disk import Disk
from gradstore.store.files.manifest import Manifest
from gradstore.store.identity import fingerprint_of
from gradstore.store.schema import DTYPES, MEANING, Schema, raw
from gradstore.store.store_writer import open_writer
from gradstore.tensors import is_tensor

_SHARD_BYTES = 64 << 20
_GROUP = 16
_TOGETHER = 1 << 20  # bytes of whole groups that are read and written together: of small rows, thousands


@dataclass(frozen=True)
class Provenance:
    """What only the user knows about imported features; stores agree only where all of it does.

    Attributes:
        tool: what computed them, such as "trak" or "projection_ntk".
        model: any text that names the weights; features of other weights must not be compared.
        projection: kind of the projection, as that tool calls it.
        seed: of the projection.
    """

    tool: str
    model: str
    projection: str = "unknown"
    seed: int = 0


def import_features(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    provenance: Provenance,
    *,
    split: str = "train",
    shape: Sequence[int] | None = None,
    source_dtype: str = "float32",
    labels: Any = None,
    logits: Any = None,
    classes: Sequence[str] | None = None,
    dtype: str = "float16",
    lock: str = "auto",
    disk: Disk | None = None,
) -> FeatureStore:
    """Copy features [n, K] or [n, c, K] into a store (`gradstore.store.import_features`).

    [n, K] becomes layout "sum". What the source does not hold stays unknown: squared norms, and logits if not given,
    are NaN. The identity says that the store is imported, so it is never compared or continued with a native one.

    Args:
        source: an `.npy` file, as TRAK's `grads.mmap` is too, or a raw memory map, for which `shape` is needed.
        out: directory of the store.
        provenance: where the features come from.
        split: name of the split.
        shape: of a raw memory map.
        source_dtype: of a raw memory map: "float16" or "float32".
        labels: classes [n], -1 where there is none, which is the default.
        logits: [n, classes] of any real dtype, all NaN in a row where they are not known; default NaN.
        classes: names of the classes; default "0", "1", …, as many as there are logits or rows of features an example,
            or in [n, K] as the labels need.
        dtype: of the stored features.
        lock: how other writers are kept out: "auto", "flock", "file" or "none"; see `gradstore.store.files.lock.LOCKS`.
        disk: where bytes go.

    Returns:
        the finished store, opened. Holds some megabytes, or some tens of rows where those are more.

    Raises:
        UsageError: shapes do not fit, labels or logits are none (names the row), the source is no array of floats, or
            it changes while it is read.
        NonFiniteError: a row is NaN, infinite or zero; names it.
    """
    features = _opened(Path(source), shape, source_dtype)
    n, c, K = features.shape
    if dtype not in DTYPES:
        raise UsageError("unknown dtype", where="--dtype", expected=f"one of {', '.join(DTYPES)}", got=repr(dtype))
    truth = np.full(n, -1, np.int64) if labels is None else class_indices(labels, where=source)
    outputs = None if logits is None else _logits(logits, source)
    if truth.shape != (n,) or (outputs is not None and (len(outputs) != n or (c > 1 and outputs.shape[1] != c))):
        given = f"{list(truth.shape)} and {None if outputs is None else list(outputs.shape)}"
        raise UsageError("labels or logits do not fit", where=source, expected=f"[{n}] and [{n}, {c}]", got=given)
    width = _class_count(c, truth, outputs, classes)
    outputs = np.full((n, width), np.nan, np.float32) if outputs is None else outputs
    _require_classes(truth, width, source)
    schema = Schema(c, K, width, dtype)
    manifest = _manifest(schema, provenance, features, truth, split, classes)
    step = _whole_groups(_TOGETHER, schema)
    from gradstore.store.imported_columns import imported_columns  # and torch, for which no refusal above waits

    with open_writer(Path(out), manifest, disk, lock=lock) as writer:
        writer.require_space()
        with in_background(writer) as background:
            for index in writer.missing:
                rows = manifest.rows_of(index)
                for start in range(rows.start, rows.stop, step):
                    span = slice(start, min(start + step, rows.stop))
                    made = partial(imported_columns, features.rows, span, truth, outputs, dtype, features.file.path)
                    background.write(made)
    return FeatureStore(out)


class _Features:
    """An array file [n, K] or [n, c, K] as [n, c, K]."""

    def __init__(self, file: ArrayFile) -> None:
        self.file, self.shape = file, (len(file), *(file.shape[1:] if len(file.shape) == 3 else (1, file.shape[1])))

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.file.rows(start, stop).reshape(stop - start, *self.shape[1:])


def _opened(source: Path, shape: Sequence[int] | None, dtype: str) -> _Features:
    """The source, nothing read yet."""
    what = "array of features"
    if shape is None:
        file = open_array(source, what, "For a raw memory map give its shape and dtype")
    else:
        file = open_raw_array(source, shape, dtype, what)
    if len(file.shape) not in (2, 3) or file.dtype.kind != "f" or 0 in file.shape:
        got = f"{file.dtype} {list(file.shape)}"
        raise UsageError(f"this is no {what}", where=source, expected="floats [n, K] or [n, c, K]", got=got)
    return _Features(file)


def _logits(logits: Any, where: object) -> np.ndarray:
    """The network's outputs, float32 [n, classes]: in each row finite, or all NaN, which is unknown."""
    try:
        array = np.asarray(logits.detach().cpu() if is_tensor(logits) else logits)
    except (TypeError, ValueError, RuntimeError):
        array = np.array(None)
    if array.dtype.kind not in "fiu" or array.ndim != 2 or 0 in array.shape or np.ma.isMaskedArray(logits):
        got = f"{'masked ' * np.ma.isMaskedArray(logits)}{array.dtype} {list(array.shape)}"
        raise UsageError("these are no logits", where=where, expected="real numbers [n, classes]", got=got)
    with np.errstate(over="ignore"):
        outputs = np.ascontiguousarray(array, np.float32)
    bad = np.flatnonzero(~(np.isfinite(outputs).all(axis=1) | np.isnan(outputs).all(axis=1)))
    if len(bad):
        raise UsageError(
            f"the logits of row {bad[0]} are not finite",
            where=where,
            expected="float32 numbers, or NaN in the whole row where they are not known",
            got=outputs[bad[0]][:8].tolist(),
        )
    return outputs


def _class_count(c: int, labels: np.ndarray, logits: np.ndarray | None, names: Sequence[str] | None) -> int:
    """How many classes there are: as the logits say, or the class axis, or the names, or at least the labels."""
    if logits is not None:
        return logits.shape[1]
    if c > 1:
        return c
    return len(names) if names is not None else max(1, int(labels.max(initial=0)) + 1)


def _require_classes(labels: np.ndarray, classes: int, where: object) -> None:
    bad = np.flatnonzero((labels < -1) | (labels >= classes))
    if len(bad):
        expected = f"a class below {classes}, or -1 where there is none"
        got = int(labels[bad[0]])
        raise UsageError(f"the label of row {bad[0]} is no class", where=where, expected=expected, got=got)


def _manifest(
    schema: Schema,
    provenance: Provenance,
    features: _Features,
    labels: np.ndarray,
    split: str,
    classes: Sequence[str] | None,
) -> Manifest:
    names = tuple(map(str, classes if classes is not None else range(schema.classes)))
    if len(names) != schema.classes:
        raise UsageError("class names do not fit", where="classes", expected=schema.classes, got=len(names))
    digest = hashlib.sha256()
    n, step = features.shape[0], _whole_groups(_TOGETHER, schema)
    for start in range(0, n, step):
        digest.update(raw(features.rows(start, min(start + step, n))))
    kind = f"{provenance.projection} ({provenance.tool})"
    identity = {
        "format": MEANING,
        "imported": {"tool": provenance.tool, "model": provenance.model, "dtype": str(features.file.dtype)},
        "projection": {"kind": kind, "K": schema.K, "seed": provenance.seed, "version": 1},
        "parameters": {"count": 0, "blocks": []},
        "weights": "not known",
        "precision": "not known",
        "classes": schema.classes,
        "layout": "sum" if schema.c == 1 else "per-class",
        "dtype": schema.dtype,
        "data": {
            "length": n,
            "features": digest.hexdigest(),
        },
    }
    rows = _whole_groups(_SHARD_BYTES, schema)
    return Manifest(identity, fingerprint_of(identity), schema, n, rows, _GROUP, split, names)


def _whole_groups(size: int, schema: Schema) -> int:
    """Rows of as many groups as `size` bytes hold, or of one."""
    return max(1, size // schema.row_bytes // _GROUP) * _GROUP
