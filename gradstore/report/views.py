"""What a report shows, as plain frozen data.

Whoever has results fills these in; rendering (`page.py`) reads them and computes nothing. So a page can be tested
without a model, a store or a kernel, and every number on it can be traced to the line that produced it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]
"""Pixels [H, W] (gray) or [H, W, 3] (RGB)."""

Provenance = Sequence[tuple[str, str]]
"""Rows (name, value) that say where the numbers come from: stores, projection, seed, versions, date."""


@dataclass(frozen=True)
class Example:
    """One example as a person sees it.

    Attributes:
        split: name of its split.
        row: index in its split.
        label: name of its label, where the split has labels.
        predicted: name of the class with the largest logit.
        poisoned: known truth; None where unknown.
        shown: a picture, a text, or None where the store has no previews.
    """

    split: str
    row: int
    label: str | None = None
    predicted: str | None = None
    poisoned: bool | None = None
    shown: Picture | str | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Neighbour:
    """A training example, and how similar the kernel finds it to the query.

    Attributes:
        example: the training example.
        similarity: kernel value; for cosine-normalised kernels in [-1, 1].
        standard_error: of `similarity`, due to the random projection; None where the kernel is exact.
    """

    example: Example
    similarity: float
    standard_error: float | None = None


@dataclass(frozen=True)
class Explanation:
    """A query with its most similar training examples, best first.

    Attributes:
        query: the query.
        neighbours: its k nearest training examples over all training examples.
        votes: how many of them are poisoned; None outside forensics.
    """

    query: Example
    neighbours: tuple[Neighbour, ...]
    votes: int | None = None


@dataclass(frozen=True)
class TopKPage:
    """Page of `topk`: each query beside what the model finds most similar to it.

    Attributes:
        kernel: name of the kernel, e.g. "proj-trntk".
        train: name of the training split, e.g. "train".
        train_size: n, the examples searched.
        queries: name of the query split.
        query_size: m, of which `explanations` may be a selection.
        explanations: what is shown.
        provenance: where the numbers come from.
        title: heading of the page.
    """

    kernel: str
    train: str
    train_size: int
    queries: str
    query_size: int
    explanations: tuple[Explanation, ...]
    provenance: Provenance = ()
    title: str = "Most similar training examples"


@dataclass(frozen=True)
class Interval:
    """A proportion with its 95 % Wilson interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Confusion:
    """Flagged against known truth, in queries.

    Attributes:
        tp: poisoned and flagged.
        fp: clean and flagged.
        fn: poisoned and missed.
        tn: clean and passed.
        precision: tp / (tp + fp); None where nothing was flagged.
        recall: tp / (tp + fn); None where nothing was poisoned.
    """

    tp: int
    fp: int
    fn: int
    tn: int
    precision: Interval | None
    recall: Interval | None


@dataclass(frozen=True)
class VoteCount:
    """How many queries have a given number of poisoned neighbours.

    Attributes:
        votes: poisoned among the k nearest.
        clean: queries known to be clean, or all queries where the truth is unknown.
        poisoned: queries known to be poisoned.
    """

    votes: int
    clean: int
    poisoned: int = 0


@dataclass(frozen=True)
class Culprit:
    """A training example that flagged queries point to.

    Attributes:
        example: the training example.
        count: flagged queries that have it among their k nearest.
    """

    example: Example
    count: int


@dataclass(frozen=True)
class Verdict:
    """What one kernel says about the queries.

    Attributes:
        kernel: name of the kernel.
        k: neighbours that vote.
        threshold: votes from which a query is flagged.
        queries: queries examined.
        flagged: queries flagged.
        histogram: one entry for each number of votes 0..k.
        confusion: against known truth; None where it is unknown.
        cases: flagged queries to show, a selection.
        culprits: training examples that flagged queries point to most, a selection.
    """

    kernel: str
    k: int
    threshold: int
    queries: int
    flagged: int
    histogram: tuple[VoteCount, ...]
    confusion: Confusion | None = None
    cases: tuple[Explanation, ...] = ()
    culprits: tuple[Culprit, ...] = ()


@dataclass(frozen=True)
class ForensicsPage:
    """Page of `forensics`: which queries trace back to poisoned training examples.

    Attributes:
        train: name of the training split.
        train_size: n.
        train_poisoned: training examples known to be poisoned.
        queries: names of the query splits.
        verdicts: one a kernel.
        provenance: where the numbers come from.
        title: heading of the page.
    """

    train: str
    train_size: int
    train_poisoned: int
    queries: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    provenance: Provenance = ()
    title: str = "Which predictions trace back to poisoned data"


@dataclass(frozen=True)
class Fact:
    """One number that matters, e.g. "97.8 %", "clean test accuracy", "440 of 450 images"."""

    value: str
    name: str
    note: str = ""


@dataclass(frozen=True)
class ResidualPage:
    """Page of `residual`: how far a projected kernel is from the exact one.

    Attributes:
        kernel: name of the projected kernel.
        exact: name of the exact one.
        pairs: pairs compared.
        facts: headline numbers.
        x: absolute residuals, ascending from 0.
        curves: shares of pairs up to each x: observed, a fitted exponential, what theory predicts.
        provenance: where the numbers come from.
        title: heading of the page.
    """

    kernel: str
    exact: str
    pairs: int
    facts: tuple[Fact, ...]
    x: tuple[float, ...]
    curves: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    provenance: Provenance = ()
    title: str = "How near the projected kernel is to the exact one"

    def drawn(self, width: float, height: float) -> list[tuple[str, str, str]]:
        """(points of a polyline, colour, dashes) for each curve."""
        span = self.x[-1] or 1.0
        looks = (("var(--clean)", ""), ("var(--poison)", "7 4"), ("var(--soft)", "2 4"))
        return [
            (
                " ".join(f"{width * x / span:.1f},{height * (1 - y):.1f}" for x, y in zip(self.x, curve, strict=True)),
                *look,
            )
            for curve, look in zip(self.curves, looks, strict=True)
        ]


@dataclass(frozen=True)
class DemoPage:
    """Page of the demo: the whole story from a poisoned training set to the queries that give it away.

    Attributes:
        story: one paragraph that says what was done.
        facts: headline numbers.
        forensics: which queries were flagged.
        topk: clean queries beside their neighbours.
        provenance: where the numbers come from.
        title: heading of the page.
    """

    story: str
    facts: tuple[Fact, ...]
    forensics: ForensicsPage
    topk: TopKPage
    provenance: Provenance = ()
    title: str = "A poisoned classifier, and the training images that give it away"
