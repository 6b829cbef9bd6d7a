"""What a search is asked for, checked before anything is read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradstore.errors import UsageError
from gradstore.kernels import Kernel, require_comparable, require_served
from gradstore.search.class_weights import Classes, query_weights
from gradstore.search.phi import Phi
from gradstore.store import FeatureStore


def check_request(
    train: FeatureStore,
    queries: FeatureStore,
    k: int,
    kernel: Kernel,
    rows: Sequence[int] | np.ndarray | None,
    *,
    by_class: bool,
) -> np.ndarray:
    """The wanted query rows int64 [m], once everything asked for is known to be possible.

    Raises:
        UsageError, MismatchError: as `topk`.
    """
    require_comparable(train, queries)
    if not by_class:
        require_served(kernel, train)
    if not 1 <= k <= len(train):
        raise UsageError("k does not fit the training store", where="-k", expected=f"1 to {len(train)}", got=k)
    wanted = np.arange(len(queries)) if rows is None else np.asarray(rows, dtype=np.int64).reshape(-1)
    bad = wanted[(wanted < 0) | (wanted >= len(queries))]
    if bad.size:
        raise UsageError("no such query row", where="--rows", expected=f"0 to {len(queries) - 1}", got=int(bad[0]))
    return wanted


def query_phis(
    train: FeatureStore, queries: FeatureStore, kernel: Kernel, rows: np.ndarray, classes: Classes
) -> list[Phi]:
    """The feature map of each query."""
    weights = query_weights(classes, kernel, train, queries, rows)
    return [Phi(kernel, train.schema.c, train.schema.K, w) for w in weights]
