"""Poison forensics: a query is flagged when enough of its most similar training examples are poisoned."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.errors import UsageError
from gradstore.indices import RowChoice, row_mask
from gradstore.machine.byte_counts import format_bytes, parse_bytes
from gradstore.report.shown_rows import provenance, shown_example
from gradstore.report.views import Confusion, Culprit, ForensicsPage, Interval, Verdict, VoteCount
from gradstore.search.topk import TopK, topk
from gradstore.search.topk_result import RESULT_BYTES
from gradstore.store.rows import Rows


@dataclass(frozen=True)
class Forensics:
    """What the k-nearest vote says of one kernel; queries of all query stores, one after another.

    Attributes:
        kernel: name of the kernel.
        threshold: votes from which a query is flagged.
        neighbours: top-k result of each query store.
        votes: int64 [m], poisoned among the k most similar training rows.
        flagged: bool [m].
        truth: bool [m], or None where any query store does not know.
        poisoned: bool [n], the poisoned training rows.
    """

    kernel: str
    threshold: int
    neighbours: tuple[TopK, ...]
    votes: np.ndarray
    flagged: np.ndarray
    truth: np.ndarray | None
    poisoned: np.ndarray

    @property
    def train(self) -> Rows:
        """The training store."""
        return self.neighbours[0].train

    @property
    def confusion(self) -> Confusion | None:
        """Counts, precision and recall with 95 % Wilson intervals; None where the truth is unknown."""
        if self.truth is None:
            return None
        tp, fp = int((self.flagged & self.truth).sum()), int((self.flagged & ~self.truth).sum())
        fn, tn = int((~self.flagged & self.truth).sum()), int((~self.flagged & ~self.truth).sum())
        return Confusion(tp, fp, fn, tn, wilson(tp, tp + fp), wilson(tp, tp + fn))

    def culprits(self, most: int | None = None) -> list[tuple[int, int]]:
        """(training row, flagged queries that have it among their k nearest), most first, then by row; so many."""
        indices = np.concatenate([result.indices for result in self.neighbours])
        rows, counts = np.unique(indices[self.flagged], return_counts=True)
        order = np.lexsort((rows, -counts))
        return [(int(rows[i]), int(counts[i])) for i in order[:most]]

    def locate(self, q: int) -> tuple[TopK, int]:
        """The result of query q's store, and its place in it."""
        for result in self.neighbours:
            if q < len(result.rows):
                return result, q
            q -= len(result.rows)
        raise IndexError(q)

    def as_dict(self, culprits: int = 20) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: list(v) if name == "flagged" else v for name, v in self.streamed(culprits).items()}

    def streamed(self, culprits: int = 20) -> dict[str, Any]:
        """The same, with an iterator over the flagged queries, of which there may be very many."""
        found = self.confusion
        flagged = (self.locate(int(q)) for q in np.flatnonzero(self.flagged))
        return {
            "kernel": self.kernel,
            "k": self.neighbours[0].k,
            "threshold": self.threshold,
            "queries": len(self.votes),
            "flagged": (_named(*r.queries.part(int(r.rows[q]))) for r, q in flagged),
            "votes": np.bincount(self.votes, minlength=self.neighbours[0].k + 1).tolist(),
            "confusion": None if found is None else confusion_dict(found),
            "culprits": [
                {"row": row, "count": count, "poisoned": bool(self.poisoned[row])}
                for row, count in self.culprits(culprits)
            ],
        }

    def verdict(self, cases: int = 12, culprits: int = 12) -> Verdict:
        """The result as a report shows it; reads the rows that are shown."""
        shown = []
        for q in np.flatnonzero(self.flagged)[:cases]:
            result, place = self.locate(int(q))
            shown.append(result.explanation(place, votes=int(self.votes[q])))
        return Verdict(
            kernel=self.kernel,
            k=self.neighbours[0].k,
            threshold=self.threshold,
            queries=len(self.votes),
            flagged=int(self.flagged.sum()),
            histogram=self._histogram(),
            confusion=self.confusion,
            cases=tuple(shown),
            culprits=tuple(Culprit(shown_example(self.train, row), count) for row, count in self.culprits(culprits)),
        )

    def _histogram(self) -> tuple[VoteCount, ...]:
        truth = np.zeros(len(self.votes), bool) if self.truth is None else self.truth
        return tuple(
            VoteCount(v, int(((self.votes == v) & ~truth).sum()), int(((self.votes == v) & truth).sum()))
            for v in range(self.neighbours[0].k + 1)
        )

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one HTML page that opens offline."""
        from gradstore.report.page import write_forensics

        return write_forensics(forensics_page([self]), path)


def forensics(
    train: Rows,
    queries: Rows | Sequence[Rows],
    *,
    poisoned: RowChoice | None = None,
    k: int = 5,
    votes: int = 3,
    kernel: str = "proj-trntk",
    memory: int | str = "1GB",
) -> Forensics:
    """Flag each query of which at least `votes` of the k most similar training examples are poisoned.

    The neighbours are taken over all training examples, poisoned or not (Engel et al., ICLR 2024, 4).

    Args:
        train: store of the training split, or any `Rows`.
        queries: one or more query stores, or any `Rows`, with the same fingerprint.
        poisoned: bool mask [n], or row indices of the poisoned training examples, each once; default what the store
            knows.
        k: neighbours that vote.
        votes: votes from which a query is flagged.
        kernel: a name in `gradstore.kernels.definitions.PROJECTED`.
        memory: bytes, those of the results, 24·m·k, among them.

    Returns:
        Votes, flags and, where the truth is known, how often they are right.

    Raises:
        UsageError: it is not known which training examples are poisoned, `poisoned` is neither a mask nor rows of
            theirs, or votes is not within 1 … k.
        Others: as `topk`.

    Example:
        >>> found = gs.forensics(train, test, k=5, votes=3)
        >>> found.votes.shape, found.flagged.dtype
        ((8,), dtype('bool'))
    """
    stores = [queries] if isinstance(queries, Rows) else list(queries)
    if not stores:
        raise UsageError("there are no query stores", where="QUERIES", expected="at least one")
    if not 1 <= votes <= k:
        raise UsageError("the votes cannot be reached", where="--votes", expected=f"1 to k = {k}", got=votes)
    mask = _poisoned_mask(train, poisoned)
    left = _beside_others(parse_bytes(memory), stores, min(k, len(train)))  # a larger k is refused by the search
    results = tuple(topk(train, store, k, kernel, memory=room) for store, room in zip(stores, left, strict=True))
    counts = np.concatenate([mask[result.indices].sum(axis=1) for result in results])
    truths = [r.queries.poisoned[r.rows] for r in results if r.queries.poisoned is not None]
    truth = np.concatenate(truths) if len(truths) == len(stores) else None
    return Forensics(kernel, votes, results, counts, counts >= votes, truth, mask)


def _beside_others(memory: int, stores: Sequence[Rows], k: int) -> list[int]:
    """What a search of each store may take, since the results of the others are held too."""
    results = [RESULT_BYTES * len(store) * k for store in stores]
    if sum(results) >= memory:
        expected = f"at least {format_bytes(sum(results))} for the results alone"
        hint = "Ask for a smaller -k, or for fewer queries at a time"
        raise UsageError("too little memory", where="--memory", expected=expected, got=format_bytes(memory), hint=hint)
    return [memory - sum(results) + own for own in results]


def _named(store: Rows, row: int) -> dict[str, Any]:
    return {"store": store.where, "row": int(store.rows[row])}


def forensics_page(results: Sequence[Forensics]) -> ForensicsPage:
    """One page for the same queries under one kernel or several."""
    first = results[0]
    stores = [result.queries for result in first.neighbours]
    return ForensicsPage(
        train=first.train.split,
        train_size=len(first.train.present_at),
        train_poisoned=int(first.poisoned[first.train.present_at].sum()),
        queries=tuple(store.split for store in stores),
        verdicts=tuple(result.verdict() for result in results),
        provenance=provenance(first.train, *stores),
    )


def wilson(successes: int, trials: int, z: float = 1.959963984540054) -> Interval | None:
    """A proportion with its 95 % interval (Wilson 1927); None where there are no trials."""
    if trials == 0:
        return None
    p, z2 = successes / trials, z * z
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z / (1 + z2 / trials) * (p * (1 - p) / trials + z2 / (4 * trials * trials)) ** 0.5
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def confusion_dict(confusion: Confusion) -> dict[str, Any]:
    """Plain values for JSON; null where a proportion is undefined."""
    counts = {"tp": confusion.tp, "fp": confusion.fp, "fn": confusion.fn, "tn": confusion.tn}
    proportions: dict[str, Any] = {}
    for name, interval in (("precision", confusion.precision), ("recall", confusion.recall)):
        proportions[name] = None if interval is None else interval.value
        proportions[f"{name}_interval"] = None if interval is None else [interval.low, interval.high]
    return {**proportions, **counts}


def _poisoned_mask(train: Rows, poisoned: RowChoice | None) -> np.ndarray:
    if poisoned is not None:
        return row_mask(poisoned, len(train), where="--poisoned", what="training row")
    if train.poisoned is None:
        raise UsageError(
            "it is not known which training examples are poisoned",
            where=train.where,
            expected="poisoned={...} in the project, or --poisoned FILE",
            hint="FILE holds one row index a line, or is a .npy mask or index array",
        )
    return train.poisoned
