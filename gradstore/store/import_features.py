"""Import: projected gradients that another tool left in a memory map, as a store of their own kind."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradstore.errors import NonFiniteError, UsageError
from gradstore.indices import class_indices
from gradstore.store.background_writer import in_background
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.disk import Disk
from gradstore.store.files.encoding import encode
from gradstore.store.files.manifest import Manifest
from gradstore.store.identity import fingerprint_of
from gradstore.store.schema import DTYPES, MEANING, Schema
from gradstore.store.store_writer import open_writer

_SHARD_BYTES = 64 << 20
_GROUP = 16


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
        labels: int [n]; default -1.
        logits: float [n, classes]; default NaN.
        classes: names of the classes; default "0", "1", ….
        dtype: of the stored features.
        disk: where bytes go.

    Returns:
        the finished store, opened. Holds some tens of rows at a time.

    Raises:
        UsageError: shapes do not fit, labels are no whole numbers, or the source is no array of floats.
        NonFiniteError: a row is NaN, infinite or zero; names it.
    """
    features = _mapped(Path(source), shape, source_dtype)
    n, c, K = features.shape
    if dtype not in DTYPES:
        raise UsageError("unknown dtype", where="--dtype", expected=f"one of {', '.join(DTYPES)}", got=repr(dtype))
    outputs = np.full((n, c), np.nan, np.float32) if logits is None else np.asarray(logits, np.float32)
    truth = np.full(n, -1, np.int64) if labels is None else class_indices(labels, where=source)
    width = outputs.shape[1] if outputs.ndim == 2 else 0
    if outputs.shape != (n, width) or truth.shape != (n,) or (c > 1 and width != c):
        given = f"{list(truth.shape)} and {list(outputs.shape)}"
        raise UsageError("labels or logits do not fit", where=source, expected=f"[{n}] and [{n}, {c}]", got=given)
    schema = Schema(c, K, width, dtype)
    manifest = _manifest(schema, provenance, features, truth, split, classes)
    with open_writer(Path(out), manifest, disk) as writer:
        writer.require_space()
        with in_background(writer) as background:
            for index in writer.missing:
                rows = manifest.rows_of(index)
                for start in range(rows.start, rows.stop, _GROUP):
                    span = slice(start, min(start + _GROUP, rows.stop))
                    background.write(partial(_columns, features[span], span, truth, outputs, dtype, Path(source)))
    return FeatureStore(out)


def read_array(path: Path) -> np.ndarray:
    """Read an `.npy` file.

    Returns:
        Its array; no objects.

    Raises:
        UsageError: there is none.
    """
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise UsageError("this is no .npy array", where=path, got=str(error)[:120]) from error


def _mapped(source: Path, shape: Sequence[int] | None, dtype: str) -> np.ndarray:
    """The source as [n, c, K], nothing read yet."""
    try:
        if shape is None:
            array = np.load(source, mmap_mode="r", allow_pickle=False)
        else:
            if dtype not in ("float16", "float32"):
                raise ValueError(f"dtype {dtype!r}")
            size, item = source.stat().st_size, np.dtype(dtype).itemsize
            if min(shape, default=0) < 1 or size != item * math.prod(shape):
                raise ValueError(f"{size} bytes for shape {list(shape)} of {dtype}")
            array = np.memmap(source, dtype, mode="r", shape=tuple(shape))
    except (OSError, ValueError, EOFError) as error:
        hint = "For a raw memory map give its shape and dtype" if shape is None else None
        raise UsageError("this is no array of features", where=source, got=str(error)[:120], hint=hint) from error
    if array.ndim not in (2, 3) or array.dtype.kind != "f" or 0 in array.shape:
        got = f"{array.dtype} {list(array.shape)}"
        raise UsageError("this is no array of features", where=source, expected="floats [n, K] or [n, c, K]", got=got)
    return array[:, None] if array.ndim == 2 else array


def _manifest(
    schema: Schema,
    provenance: Provenance,
    features: np.ndarray,
    labels: np.ndarray,
    split: str,
    classes: Sequence[str] | None,
) -> Manifest:
    names = tuple(map(str, classes if classes is not None else range(schema.classes)))
    if len(names) != schema.classes:
        raise UsageError("class names do not fit", where="classes", expected=schema.classes, got=len(names))
    digest = hashlib.sha256()
    for start in range(0, len(features), _GROUP):
        digest.update(np.ascontiguousarray(features[start : start + _GROUP]).data)
    kind = f"{provenance.projection} ({provenance.tool})"
    identity = {
        "format": MEANING,
        "imported": {"tool": provenance.tool, "model": provenance.model, "dtype": str(features.dtype)},
        "projection": {"kind": kind, "K": schema.K, "seed": provenance.seed, "version": 1},
        "parameters": {"count": 0, "blocks": []},
        "weights": "not known",
        "precision": "not known",
        "classes": schema.classes,
        "layout": "sum" if schema.c == 1 else "per-class",
        "dtype": schema.dtype,
        "data": {
            "length": len(features),
            "labels": hashlib.sha256(labels.tobytes()).hexdigest(),
            "features": digest.hexdigest(),
        },
    }
    rows = max(1, _SHARD_BYTES // schema.row_bytes // _GROUP) * _GROUP
    return Manifest(identity, fingerprint_of(identity), schema, len(features), rows, _GROUP, split, names)


def _columns(
    part: np.ndarray, span: slice, labels: np.ndarray, logits: np.ndarray, dtype: str, source: Path
) -> dict[str, np.ndarray]:
    values = torch.from_numpy(np.array(part, np.float32))
    peak = values.abs().amax(dim=-1)
    bad = torch.nonzero(~(torch.isfinite(peak) & (peak > 0)))
    if len(bad):
        i, c = bad[0].tolist()
        raise NonFiniteError(
            f"the features of row {span.start + i}, class {c} are zero or not finite",
            where=source,
            expected="finite values, not all zero",
            hint="The tool that wrote them failed at this row, or did not finish",
        )
    encoded = encode(values, dtype)
    rows, c = values.shape[:2]
    return {
        "features": encoded.features,
        "scale": encoded.scale,
        "sq_norm": np.full((rows, c), np.nan),
        "logits": logits[span],
        "label": labels[span],
        "row": np.arange(span.start, span.stop, dtype=np.int64),
        "norm": encoded.norm,
    }
