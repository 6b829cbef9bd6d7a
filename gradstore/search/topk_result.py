"""What a search returns: the neighbours of each query, and how to show them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.report.csv_table import write_csv
from gradstore.report.shown_rows import class_name, predicted_class, provenance, shown_example
from gradstore.report.views import Explanation, Neighbour, TopKPage
from gradstore.search.request import Request
from gradstore.store.rows import Rows

SHOWN = 50
"""Queries of a page, and neighbours of a query there, at most: each is a picture."""

_TRANSLATED = 64  # queries at a time

RESULT_BYTES = 24
"""Bytes of a result's arrays, a query and neighbour: row, similarity and standard error."""


@dataclass(frozen=True)
class Search:
    """How a result was found.

    Attributes:
        mode: "exact" (every row was scored), "certified" (the rest is proved to be less similar) or "approx".
        rows_read: rows of the training store that were read, a row read twice counted twice.
        engine: what multiplied, or the name of the index.
        recall: of "approx", measured on held-out rows when the index was built; 1 where the result is exact.
        note: what a person should know, such as why an index was not used; empty for nothing.
    """

    mode: str
    rows_read: int
    engine: str = ""
    recall: float = 1.0
    note: str = ""


Pairs = tuple[np.ndarray, np.ndarray]
"""Rows of the training store int64 [m, k] and their similarities float64 [m, k], best first."""


@dataclass(frozen=True)
class Answer:
    """What a mode finds.

    Attributes:
        indices: int64 [m, k], rows of the training store, best first.
        similarity: float64 [m, k].
        search: how they were found.
    """

    indices: np.ndarray
    similarity: np.ndarray
    search: Search


class Gathered:
    """The answers to m queries, batch after batch; holds 16·m·k bytes.

    Args:
        m: queries.
        k: neighbours a query.
    """

    def __init__(self, m: int, k: int) -> None:
        self._indices, self._similarity, self._count = np.empty((m, k), np.int64), np.empty((m, k)), 0

    def add(self, pairs: Pairs) -> None:
        """Take in the next batch of queries."""
        span = slice(self._count, self._count + len(pairs[0]))
        self._indices[span], self._similarity[span] = pairs
        self._count = span.stop

    def answer(self, search: Search) -> Answer:
        """All of it, once every query has been answered."""
        return Answer(self._indices, self._similarity, search)


@dataclass(frozen=True)
class TopK:
    """The k most similar training rows of each query, best first; equal similarities by ascending row.

    Attributes:
        indices: int64 [m, k], rows of the training store.
        similarity: float64 [m, k].
        rows: int64 [m], positions in the query store; of a store, its rows.
        kernel: name of the kernel.
        train: the training rows.
        queries: the query rows.
        search: how it was found.
        standard_error: float64 [m, k], of each similarity, due to the random projection; None where not asked for.
    """

    indices: np.ndarray
    similarity: np.ndarray
    rows: np.ndarray
    kernel: str
    train: Rows
    queries: Rows
    search: Search = Search("exact", 0)
    standard_error: np.ndarray | None = None

    @classmethod
    def of(cls, request: Request, answer: Answer) -> TopK:
        """What was found for a request."""
        if request.train is not request.within:
            at = request.within.present_at
            for start in range(0, len(answer.indices), _TRANSLATED):  # in place, since the result may be all of memory
                some = answer.indices[start : start + _TRANSLATED]
                some[:] = at[some]
        found = (answer.indices, answer.similarity, request.rows, request.kernel.name)
        return cls(*found, request.within, request.queries, answer.search)

    @property
    def k(self) -> int:
        """Neighbours a query."""
        return int(self.indices.shape[1])

    @property
    def split_rows(self) -> np.ndarray:
        """Rows of the queries in their split, int64 [m]; of several stores, in all of them."""
        return self.queries.rows[self.rows]

    def records(self) -> list[dict[str, Any]]:
        """One plain record a query, for JSON: hundreds of bytes a neighbour; `record` is of one query."""
        return list(map(self.record, range(len(self.rows))))

    def record(self, q: int) -> dict[str, Any]:
        """Query number q and its neighbours, as plain values."""
        row = int(self.rows[q])
        return {
            "row": int(self.queries.rows[row]),
            "label": class_name(self.queries, int(self.queries.labels[row])),
            "predicted": predicted_class(self.queries, row),
            "neighbours": [
                {
                    "row": int(i),
                    "similarity": float(s),
                    "label": class_name(self.train, int(self.train.labels[i])),
                    **({} if error is None else {"standard_error": error}),
                }
                for i, s, error in zip(self.indices[q], self.similarity[q], self._errors(q), strict=True)
            ],
        }

    def _errors(self, q: int) -> list[float] | list[None]:
        return [None] * self.k if self.standard_error is None else self.standard_error[q].tolist()

    def explanation(self, q: int, votes: int | None = None) -> Explanation:
        """Query number q beside its neighbours, the first `SHOWN` of them, with pictures; reads as many rows."""
        found = zip(self.indices[q], self.similarity[q], self._errors(q), strict=True)
        neighbours = tuple(
            Neighbour(shown_example(self.train, int(i)), float(s), error) for i, s, error in islice(found, SHOWN)
        )
        return Explanation(shown_example(self.queries, int(self.rows[q])), neighbours, votes)

    def page(self, limit: int = SHOWN) -> TopKPage:
        """The first `limit` queries as a page."""
        return TopKPage(
            kernel=self.kernel,
            train=self.train.split,
            train_size=len(self.train.present_at),
            queries=self.queries.split,
            query_size=len(self.rows),
            explanations=tuple(self.explanation(q) for q in range(min(limit, len(self.rows)))),
            provenance=provenance(self.train, self.queries),
        )

    def save_html(self, path: str | os.PathLike[str], limit: int = SHOWN) -> Path:
        """Write the first `limit` queries, and of each as many neighbours at most, as a page that opens offline."""
        from gradstore.report.page import write_topk

        return write_topk(self.page(limit), path)

    def save_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write one line a query and neighbour; see `write_csv`."""
        shown = self.standard_error is not None
        headings = ["query_row", "rank", "train_row", "similarity", *(["standard_error"] if shown else [])]
        return write_csv(path, chain([headings], self._lines()))

    def _lines(self) -> Iterator[list[object]]:
        for q, row in enumerate(self.split_rows):
            for rank, (i, s, error) in enumerate(
                zip(self.indices[q], self.similarity[q], self._errors(q), strict=True), 1
            ):
                yield [int(row), rank, int(i), repr(float(s)), *([] if error is None else [repr(error)])]
