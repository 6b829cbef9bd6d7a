"""What a search is asked for, checked before anything is read."""

from __future__ import annotations

import numpy as np

from gradstore.errors import UsageError
from gradstore.indices import Choice, chosen_rows
from gradstore.kernels.definitions import Kernel, require_served
from gradstore.search.class_weights import Classes, query_weights
from gradstore.search.phi import Phi
from gradstore.store.rows import Rows, require_comparable


def check_request(
    train: Rows,
    queries: Rows,
    k: int,
    kernel: Kernel,
    rows: Choice | None,
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
    return chosen_rows(rows, len(queries), where="--rows", what="query row")


def query_phis(train: Rows, queries: Rows, kernel: Kernel, rows: np.ndarray, classes: Classes) -> list[Phi]:
    """The feature map of each query."""
    weights = query_weights(classes, kernel, train, queries, rows)
    return [Phi(kernel, train.schema.c, train.schema.K, w) for w in weights]
