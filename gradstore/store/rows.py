"""`Rows`: what everything downstream needs of rows of features, wherever they are.

`FeatureStore` has them on the disk, `FreshRows` in memory, and `Concatenated` are those of several one after another.
Whatever takes `Rows` takes any of these; what is kept beside a store asks for one by `Rows.require_stored`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from gradstore.errors import UsageError
from gradstore.indices import spans
from gradstore.machine.byte_counts import format_bytes
from gradstore.store.features import Features
from gradstore.store.identity import require_same
from gradstore.store.schema import NAMES, REASONS, REMOVED, Schema

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from gradstore.store.feature_store import FeatureStore


class Rows(ABC):
    """n rows of features [c, K] and what belongs to each; reads by position, and can be pickled.

    `rows.features[i:j]` reads float32 features [j - i, c, K]; the small columns (`labels`, `logits`, `norms`,
    `sq_norms`, `rows`, `poisoned`) are read whole on first use and hold some tens of bytes a row and class. Two are
    equal where they are the same rows of the same store.

    Attributes:
        where: what errors and reports call them; of a store its path.
        split: name of the split that they are of.
        schema: shape of a row.
        classes: names of the classes.
        identity: what must agree, but for its "data", before they may be compared with others; annotations are no part
            of it.
        fingerprint: digest of the identity without the data: equal for a training store and its query stores.

    Example:
        >>> train.shape, train.features[:2, 0].dtype, train.labels.shape
        ((24, 10, 10240), dtype('float32'), (24,))
    """

    where: str
    split: str
    schema: Schema
    classes: tuple[str, ...]
    identity: Mapping[str, Any]
    fingerprint: str
    _kind = "are in memory"  # why they are no store

    # -- what each kind says for itself --------------------------------------------------------------------------

    @abstractmethod
    def __len__(self) -> int:
        """Rows that can be read."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that all of them take where they are kept."""

    @abstractmethod
    def read(
        self, start: int, stop: int, *, out: Mapping[str, np.ndarray] | None = None, check: bool = True
    ) -> dict[str, np.ndarray]:
        """Every column of rows start:stop as stored.

        Args:
            start: first row.
            stop: one past the last row.
            out: arrays of at least stop - start rows to read into, such as `schema.empty` makes; default new ones.
            check: compare stored rows with their digests; False is for who has read them once.

        Returns:
            name of the dataset -> array [stop - start, ...] in its stored dtype. Holds just these arrays.

        Raises:
            UsageError: there are no such rows.
            CorruptError: a row does not match its digest, or a shard its manifest; names the rows.
        """

    @abstractmethod
    def gather(self, rows: np.ndarray, out: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every column of scattered rows as stored, digests checked, by the calling thread.

        Args:
            rows: int64 [r], distinct, ascending.
            out: arrays of at least r rows to read into, such as `schema.empty` makes.

        Returns:
            name of the dataset -> the first r rows of its array. A quarter of a megabyte more is held meanwhile.

        Raises:
            UsageError: there are no such rows.
            CorruptError: a row does not match its digest, or a shard its manifest; names the row.
        """

    @abstractmethod
    def stream(
        self, start: int, stop: int, columns: Mapping[str, np.ndarray], room: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Features of rows start:stop as stored, a few rows at a time, digests checked, by the calling thread.

        For whoever is done with some rows before the next are read: these are still in the processor's cache, and a
        block of many rows is never held.

        Args:
            start: first row.
            stop: one past the last row.
            columns: arrays of at least stop - start rows for every dataset but the features, such as `schema.empty`
                makes; those of a row are filled before its features are given.
            room: array [r, c, K] in the stored dtype, overwritten by up to r rows after others.

        Yields:
            (first row, features [≤ r, c, K], a view of `room`).

        Raises:
            UsageError: there are no such rows.
            CorruptError: a row does not match its digest, or a shard its manifest; names the row.
        """

    @abstractmethod
    def column(self, name: str) -> np.ndarray:
        """One small dataset of all rows, in its stored dtype."""

    @property
    def complete(self) -> bool:
        """Whether no row is missing; so of all but an unfinished store."""
        return True

    def require_complete(self) -> Self:
        """Refuse rows of which some are missing.

        Returns:
            These rows.

        Raises:
            UsageError: rows are missing; names them and how to get them.
        """
        return self

    def require_stored(self, what: str) -> FeatureStore:
        """The store on the disk that these rows are, which keeps `what` ("an index") beside its shards.

        Raises:
            UsageError: they are no store.
        """
        raise UsageError(
            f"{what} is kept beside a store, and these rows {self._kind}",
            where=self.where,
            expected="a store that `gradstore featurize` wrote",
            got=f"{len(self)} rows",
            hint="Search in mode exact, which needs none",
        )

    @property
    def source(self) -> str | list[str]:
        """Path of the store, or of the stores one after another, by which to open them again; "" where none is."""
        return ""

    # -- which rows they are made of -----------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[Rows, ...]:
        """What they are one after another: themselves, but for `Concatenated`."""
        return (self,)

    def part(self, row: int) -> tuple[Rows, int]:
        """The part that a row is from, and its position there.

        Returns:
            Both.

        Raises:
            UsageError: there is no such row.
        """
        self._require_range(row, row + 1)
        return self, row

    @cached_property
    def data(self) -> Mapping[str, Any]:
        """What the rows are made of: their number, a digest of all their inputs, and which were removed.

        Reads 16 bytes a row. Of stores of versions before 3, whose rows have no digests of inputs, what their identity
        says.
        """
        removed = np.flatnonzero(self.absent == REMOVED)
        gone = {"removed": spans(removed, len(removed))} if len(removed) else {}
        if not self.schema.has_inputs or "imported" in self.identity:
            return {**self.identity["data"], **gone}
        digest = blake3(np.ascontiguousarray(self.input_digests).data).hexdigest()[:32]
        return {"length": len(self), "inputs": digest, **gone}

    # -- derived -------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int]:
        """[n, c, K]."""
        return len(self), self.schema.c, self.schema.K

    @property
    def features(self) -> Features:
        """Features float32 [n, c, K] as an array that is read when it is indexed; see `Features`."""
        return Features(self)

    @cached_property
    def labels(self) -> np.ndarray:
        """True classes, int64 [n]; -1 where there is none. Annotations decide, else what was read with the rows."""
        return self.column("label")

    @cached_property
    def logits(self) -> np.ndarray:
        """Outputs of the network, float32 [n, classes]; NaN where they are not known."""
        return self.column("logits")

    @cached_property
    def predicted(self) -> np.ndarray:
        """Predicted classes, int64 [n]; of a single logit 0 or 1; -1 where the logits are not known."""
        logits = self.logits
        found = (logits[:, 0] > 0).astype(np.int64) if logits.shape[1] == 1 else logits.argmax(axis=1)
        return np.where(np.isnan(logits).any(axis=1), -1, found)

    @cached_property
    def sq_norms(self) -> np.ndarray:
        """Exact ‖g^c‖² before projection, float64 [n, c]."""
        return self.column("sq_norm")

    @cached_property
    def norms(self) -> np.ndarray:
        """Norms of the features as stored, float64 [n, c]."""
        return self.column("norm")

    @cached_property
    def rows(self) -> np.ndarray:
        """Index of each row in the split, int64 [n]; 0 … n - 1 where they are of several stores."""
        return self.column("row")

    @cached_property
    def poisoned(self) -> np.ndarray | None:
        """Which rows are poisoned, bool [n], or None where that is not known. Annotations decide."""
        return self.column("poisoned").astype(bool) if self.schema.truth else None

    @property
    def note(self) -> str:
        """What people noted of them; see annotations."""
        return ""

    @cached_property
    def input_digests(self) -> np.ndarray | None:
        """First 16 bytes of BLAKE3 over each row's inputs, uint8 [n, 16], zeros where they are not known; or None."""
        return self.column("input_digest") if self.schema.has_inputs else None

    @cached_property
    def absent(self) -> np.ndarray:
        """Why a row is not there, uint8 [n]: 0 where it is, else a key of `gradstore.store.schema.REASONS`.

        An absent row keeps its place, and nothing counts it; its features, scale and norms are NaN, unless it is there
        and annotations exclude it.
        """
        return self.column("absent") if self.schema.has_inputs else np.zeros(len(self), np.uint8)

    @cached_property
    def present_at(self) -> np.ndarray:
        """Where the rows are that are there, int64, ascending; see `present_rows`."""
        return np.flatnonzero(self.absent == 0)

    def preview(self, row: int) -> np.ndarray | str | None:
        """The picture (uint8 [H, W] or [H, W, 3]) or text that shows one row, if there is any."""
        if not self.schema.preview:
            return None
        value = self.read(row, row + 1)["preview"][0]
        return value.tobytes().rstrip(b"\0").decode(errors="replace") if value.ndim == 1 else value

    def blocks(self, rows: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Read all rows, `rows` at a time; holds one block.

        Each block is read into the arrays of the one before it: fresh memory would cost half as much as reading.

        Yields:
            (first row, columns).
        """
        block = self.schema.empty(min(rows, len(self)))
        for start in range(0, len(self), rows):
            yield start, self.read(start, min(start + rows, len(self)), out=block)

    def dataset(self) -> torch.utils.data.Dataset:
        """A torch Dataset of (features float32 [c, K], label) of the rows that are there."""
        from gradstore.store.feature_dataset import FeatureDataset

        return FeatureDataset(self)

    def card(self) -> dict[str, str]:
        """What they are, for people."""
        projection, parameters = self.identity["projection"], self.identity["parameters"]
        n, c, K = self.shape
        return {
            "split": f"{self.split}, {n} rows",
            "features": f"[{n}, {c}, {K}] {self.schema.dtype}",
            "size": format_bytes(self.nbytes),
            "projection": "{kind}, K = {K}, seed {seed}, version {version}".format(**projection),
            "parameters": f"{parameters['count']:,} in {len(parameters['blocks'])} tensors",
            "layout": str(self.identity["layout"]),
            "format": f"version {self.schema.version}, rows under {NAMES[self.schema.version]}",
            "classes": ", ".join(self.classes[:10]) + (" …" if len(self.classes) > 10 else ""),
            **({"absent": self._absent_card()} if self.absent.any() else {}),
            "inputs": self._inputs_card(),
            "poisoned": "not known" if self.poisoned is None else f"{int(self.poisoned.sum())} rows",
            **({"note": self.note} if self.note else {}),
            "fingerprint": self.fingerprint,
        }

    def _inputs_card(self) -> str:
        known = None if self.input_digests is None else self.input_digests[self.input_digests.any(axis=1)]
        if known is None or not len(known):
            return "not known"
        halves = np.ascontiguousarray(known).view("<u8").reshape(len(known), 2)
        distinct = len(np.unique(halves, axis=0))
        return "no two the same" if distinct == len(known) else f"{distinct} different ones of {len(known)}"

    def _absent_card(self) -> str:
        """How many rows are absent, and which, by reason."""
        lines = []
        for reason in np.unique(self.absent[self.absent > 0]):
            places = np.flatnonzero(self.absent == reason)
            lines.append(f"{len(places)} since {REASONS.get(int(reason), 'it was so')}: {spans(places)}")
        return "; ".join(lines)

    def __repr__(self) -> str:
        """Place, shape and projection on one line."""
        n, c, K = self.shape
        shape = f"[{n}, {c}, {K}] {self.schema.dtype}"
        return f"{type(self).__name__}({self.where!r}, {shape}, fingerprint {self.fingerprint[:8]}…)"

    def _repr_html_(self) -> str:
        """The card as a table for notebooks."""
        from html import escape

        rows = "".join(
            f"<tr><th style='text-align:left'>{k}</th><td>{escape(v)}</td></tr>" for k, v in self.card().items()
        )
        return f"<table><caption>{escape(self.where)}</caption>{rows}</table>"

    def _require_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise UsageError(
                "rows out of range", where=self.where, expected=f"within 0:{len(self)}", got=f"{start}:{stop}"
            )


def require_comparable(a: Rows, b: Rows) -> None:
    """Refuse rows whose features are not of one model and one projection, or of which some are missing.

    Raises:
        MismatchError: lists every field that differs.
        UsageError: one is an unfinished store.
    """
    require_same(a.identity, b.identity, where=b.where, theirs=a.where, ours=b.where, data=False)
    a.require_complete()
    b.require_complete()
