"""What a search is asked for: checked once, before anything is searched, and then passed on as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gradstore.errors import UsageError
from gradstore.indices import RowChoice, chosen_rows
from gradstore.kernels.definitions import Kernel
from gradstore.kernels.feature_map import FeatureMap, require_served
from gradstore.search.class_weights import Classes, query_weights
from gradstore.store.present_rows import present_rows, require_present
from gradstore.store.rows import Rows, require_comparable


@dataclass(frozen=True)
class Request:
    """The k training rows that are most similar to each of m queries.

    Attributes:
        train: the training rows that are there; what is found are places among these.
        queries: hold the queries.
        rows: int64 [m], which of them, in any order, repeated or not.
        phis: the feature map of each.
        kernel: on stored features.
        k: neighbours a query.
        within: the training rows with the absent ones, of whose places a result speaks.
    """

    train: Rows
    queries: Rows
    rows: np.ndarray
    phis: tuple[FeatureMap, ...]
    kernel: Kernel
    k: int
    within: Rows

    @classmethod
    def checked(
        cls,
        train: Rows,
        queries: Rows,
        k: int,
        kernel: Kernel,
        rows: RowChoice | None = None,
        classes: Classes = None,
        memory: int = 1 << 30,
    ) -> Request:
        """A request, once everything asked for is known to be possible.

        Args:
            train: the training rows.
            queries: hold the queries.
            k: neighbours a query.
            kernel: on stored features.
            rows: which queries; default all that are there.
            classes: class weights instead of the kernel's own.
            memory: bytes that fitting the kernel may take, where it is fitted.

        Returns:
            The request; its maps are fitted where the kernel is.

        Raises:
            UsageError: k does not fit the training rows that are there, or a query is absent.
            Others: as `topk`.
        """
        require_comparable(train, queries)
        within, train = train, present_rows(train)
        if classes is None:
            require_served(kernel, train)
        if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or not 1 <= k <= len(train):
            raise UsageError("k does not fit the training store", where="-k", expected=f"1 to {len(train)}", got=k)
        wanted = chosen_rows(rows, len(queries), where="--rows", what="query row")
        wanted = queries.present_at if rows is None else wanted
        require_present(queries, wanted, where="--rows")
        asked = [None] * len(wanted) if classes is None else query_weights(classes, train, queries, wanted)
        phis = {weights: FeatureMap.of(kernel, train, memory, weights) for weights in dict.fromkeys(asked)}
        return cls(train, queries, wanted, tuple(phis[weights] for weights in asked), kernel, k, within)

    def part(self, places: Sequence[int]) -> Request:
        """The same of some queries, at least one."""
        return replace(self, rows=self.rows[places], phis=tuple(self.phis[place] for place in places))
