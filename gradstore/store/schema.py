"""What a feature file contains: every dataset with its shape, dtype and meaning, and what it is hashed with.

Version 3 keeps a digest of each row's inputs, by which rows are known again, says which rows are absent and why, and
leaves poison marks to annotations;
version 2 hashes rows with BLAKE3, which took a third of SHA-256's time where both were measured; version 1 with
SHA-256. All mean the same features, so stores of either may be compared, and an old store is continued as it began.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from blake3 import blake3

FORMAT = "gradstore"
MEANING = 1  # version of what rows mean, part of a store's identity; how their bytes are kept is `Schema.version`
DTYPES = ("float16", "float32", "int8")
LAYOUTS = ("per-class", "sum", "mixed", "sketched")
ONE_ROW = ("sum", "mixed", "sketched")  # layouts of one row of features an example, whatever the number of classes
CLASS_DRAWS = 32  # combinations of classes in the layout "sketched", of identities that do not say how many
BULK = ("features", "preview")  # datasets too large to be held for all rows at once

VERSIONS = (1, 2, 3)
NEWEST = 3
"""The format version that new stores are written in."""
NAMES = {1: "SHA-256", 2: "BLAKE3", 3: "BLAKE3"}
WITH_INPUTS = 3
"""The format version from which on each row has a digest of its inputs."""
INPUT_DIGEST = 16  # bytes; zeros where the inputs are not known

NOT_FINITE, ZERO, REMOVED, UNREADABLE, EXCLUDED = 1, 2, 3, 4, 5
REASONS = {
    NOT_FINITE: "its logits or its gradient are not finite",
    ZERO: "its gradient is zero",
    REMOVED: "it was removed",
    UNREADABLE: "it could not be read",
    EXCLUDED: "it is excluded by annotation",
}
"""Why a row may be absent: it keeps its place, with features that are zero times a scale that is NaN. An excluded one
has its features, and is absent for as long as the annotation says so."""


@dataclass(frozen=True)
class Column:
    """One dataset of a shard: `shape` is that of a single row, so the dataset has shape [n, *shape]."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: str
    meaning: str

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Schema:
    """The shape of a store's rows.

    Attributes:
        c: class axis of the features: the number of logits, or 1 in the layouts of `ONE_ROW`.
        K: projected dimension.
        classes: number of logits.
        dtype: dtype of the stored features.
        preview: shape of one row's picture or text in uint8, () for none.
        truth: whether rows say if they are poisoned, in versions before 3; now annotations do.
        version: of the format, which says which datasets there are, and how rows are hashed.
    """

    c: int
    K: int
    classes: int
    dtype: str = "float16"
    preview: tuple[int, ...] = ()
    truth: bool = False
    version: int = NEWEST

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """Every dataset in the order of the file; `digest` covers the bytes of all the others."""
        rows = [
            ("features", (self.c, self.K), self.dtype, "n c K", "P g^c / sqrt(K), divided by scale"),
            ("scale", (self.c,), "float32", "n c", "factor that restores the features"),
            ("sq_norm", (self.c,), "float64", "n c", "exact squared norm of g^c before projection"),
            ("logits", (self.classes,), "float32", "n classes", "outputs of the network"),
            ("label", (), "int64", "n", "true class, -1 where there is none"),
            ("row", (), "int64", "n", "index in the split"),
            ("norm", (self.c,), "float64", "n c", "norm of the features as stored, scale included"),
        ]
        if self.has_inputs:
            rows += [
                ("input_digest", (INPUT_DIGEST,), "uint8", "n 16", "first 16 bytes of BLAKE3 over the row's inputs"),
                ("absent", (), "uint8", "n", "0 where the row is there, else the reason why not"),
            ]
        if self.truth:
            rows.append(("poisoned", (), "uint8", "n", "1 where the example is poisoned"))
        if self.preview:
            rows.append(("preview", self.preview, "uint8", "n ...", "picture, or UTF-8 text padded with zeros"))
        meaning = f"first 16 bytes of {NAMES[self.version]} over the row in the datasets above"
        rows.append(("digest", (16,), "uint8", "n 16", meaning))
        return tuple(Column(name, shape, np.dtype(dtype), axes, meaning) for name, shape, dtype, axes, meaning in rows)

    @property
    def has_inputs(self) -> bool:
        """Whether each row has a digest of its inputs."""
        return self.version >= WITH_INPUTS

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row in all datasets."""
        return sum(column.row_bytes for column in self.columns)

    def column(self, name: str) -> Column:
        """The dataset of a name."""
        return next(column for column in self.columns if column.name == name)

    def completed(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The datasets of some rows, with zeros for what says that inputs are not known and that no row is absent."""
        if not self.has_inputs:
            return dict(columns)
        n = len(columns["row"])
        unknown = np.zeros((n, INPUT_DIGEST), np.uint8)
        return {"input_digest": unknown, "absent": np.zeros(n, np.uint8), **columns}

    def empty(self, rows: int, *, features: bool = True) -> dict[str, np.ndarray]:
        """Uninitialised arrays for every dataset of some rows, or for all but the features."""
        wanted = [column for column in self.columns if features or column.name != "features"]
        return {c.name: np.empty((rows, *c.shape), c.dtype) for c in wanted}


def draws_of(identity: Mapping[str, Any]) -> int:
    """Combinations of classes that the rows of an identity are made of; 0 in layouts that have none."""
    return int(identity.get("class_draws", CLASS_DRAWS)) if identity["layout"] == "sketched" else 0


def raw(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, not copied."""
    return array.data.cast("B")


class Hash(Protocol):
    """What the hash objects of hashlib and of blake3 have in common."""

    def update(self, data: Any, /) -> Any:
        """Hash more bytes."""

    def digest(self) -> bytes:
        """The digest so far, 32 bytes."""

    def hexdigest(self) -> str:
        """The same as 64 hexadecimal digits."""


def hash_of(version: int) -> Callable[..., Hash]:
    """Makes hash objects, of the bytes given, for rows and columns of a format version."""
    return hashlib.sha256 if version == 1 else blake3
