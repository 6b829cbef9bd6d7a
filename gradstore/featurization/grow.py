"""Growing K: the columns that a store has are the first ones of a store with a larger K.

A store's digits are those of P g, without the factor 1/sqrt(K), which its scale carries. So they stay as they are
when K grows, and only new rows of P are multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import MismatchError, UsageError
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.encoding import exponents
from gradstore.store.files.manifest import Manifest
from gradstore.store.identity import require_same

_SMALLEST_NORMAL = 2.0**-14  # of float16; below it, digits are lost when a row's scale changes


class SmallerStore:
    """A finished store whose features are the first columns of those to be computed.

    Args:
        store: the store with the smaller K.
        planned: what the new store shall be, with the same groups of rows.
        data: what a store of the smaller one's schema says of the same rows.

    Raises:
        MismatchError: they differ in more than K; lists the fields.
        UsageError: K does not grow, rows are missing, or the stored digits cannot be taken over exactly.
    """

    def __init__(self, store: FeatureStore, planned: Manifest, data: Mapping[str, Any]) -> None:
        ours, theirs = _without_k({**planned.identity, "data": data}), _without_k(store.identity)
        require_same(theirs, ours, where=store.path, theirs="the smaller store", ours="this run")
        _require_growable(store.require_complete(), planned)
        self._store = store
        # Rows that annotations exclude have features like any other.
        self._absent = store.column("absent") if store.schema.has_inputs else np.zeros(len(store), np.uint8)
        self.K = store.schema.K

    def require_inputs(self, rows: range, digests: np.ndarray) -> None:
        """Refuse rows whose inputs, by their digests [n, 16], are not those of the smaller store.

        Raises:
            MismatchError: names the first.
        """
        if self._store.input_digests is None:
            return
        theirs = self._store.input_digests[rows.start : rows.stop]
        differ = np.flatnonzero((theirs != digests).any(axis=1) & (self._absent[rows.start : rows.stop] == 0))
        if differ.size:
            raise MismatchError(
                f"row {rows[int(differ[0])]} has other inputs than in the smaller store",
                where=self._store.path,
                expected="the same bytes",
                hint="Featurize again without --grow-from",
            )

    def has(self, rows: range) -> bool:
        """Whether all of these rows are there."""
        return not self._absent[rows.start : rows.stop].any()

    def sums(self, rows: range) -> tuple[Tensor, Tensor, Tensor]:
        """(P g float32 [n, c, K], exponent of each row's scale [n, c], rows [n, c] whose small digits were cut)."""
        stored = self._store.read(rows.start, rows.stop)
        digits = torch.from_numpy(stored["features"]).float()
        exponent = torch.log2(torch.from_numpy(stored["scale"]).double() * self.K**0.5).round().int()
        small = (digits.abs() < _SMALLEST_NORMAL).any(dim=-1) & (self._store.schema.dtype == "float16")
        return torch.ldexp(digits, exponent[..., None]), exponent, small

    def exact(self, sums: Tensor, exponent: Tensor, small: Tensor) -> bool:
        """Whether sums [n, c, K] that begin with those taken over round to the digits that a fresh run stores."""
        moved = exponents(sums, self._store.schema.dtype) != exponent
        return not bool((moved & small).any())


def _require_growable(store: FeatureStore, planned: Manifest) -> None:
    if planned.identity["layout"] == "sketched":
        raise UsageError(
            "features of combinations of classes cannot be grown: a larger K adds columns to each combination's part",
            where=store.path,
            expected="another layout than sketched",
            hint="Featurize again without --grow-from",
        )
    if store.schema.K >= planned.schema.K:
        raise UsageError(
            "K does not grow", where="--proj-dim", expected=f"more than {store.schema.K}", got=planned.schema.K
        )
    if store.schema.dtype == "int8":
        raise UsageError(
            "int8 features cannot be grown: their scale is that of the largest of all K",
            where=store.path,
            expected="float16 or float32",
            hint="Featurize again without --grow-from",
        )


def _without_k(identity: Mapping[str, Any]) -> dict[str, Any]:
    projection = {name: value for name, value in identity["projection"].items() if name != "K"}
    return {**identity, "projection": projection}
