"""How faithful a surrogate is to its network: rank correlation, accuracy, shared mistakes (Engel et al., ICLR 2024).

All measures that compare probabilities of the correct class y go by log-odds, log p_y - log(1 - p_y), computed from
logits: a strictly increasing function of p_y that does not round to one value where the network is certain.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import expit
from scipy.stats import kendalltau, pearsonr, spearmanr

from gradstore.errors import UsageError
from gradstore.explain.surrogate import KernelGLM
from gradstore.explain.surrogate.alpha import log_odds
from gradstore.explain.surrogate.training_data import of_present, two_logits
from gradstore.indices import class_indices
from gradstore.store.present_rows import present_rows
from gradstore.store.rows import Rows


@dataclass(frozen=True)
class Measure:
    """One number.

    Attributes:
        value: None where it is undefined.
        error: its standard error by bootstrap over the queries; None where none was asked for or it is undefined.
        n: queries it rests on.
        note: why it is undefined, or what to know about it.
    """

    value: float | None
    error: float | None
    n: int
    note: str = ""

    def __str__(self) -> str:
        """Such as "0.812 ± 0.011", or "n/a (the reason)"."""
        if self.value is None:
            return f"n/a ({self.note})"
        return f"{self.value:.3f}" + (f" ± {self.error:.3f}" if self.error is not None else "")


@dataclass(frozen=True)
class Faithfulness:
    """A surrogate against its network on m queries.

    Attributes:
        tau: Kendall's τ_K of the correct class's probability (App. G, whose definition knows no ties; tau-b, which is
            the same without ties, allows for them).
        tau_unsaturated: the same over queries where neither probability rounds to 0 or 1 in float32, as in the paper.
        spearman: rank correlation of the probability.
        pearson: correlation of the probability itself; App. H says why it misleads.
        pearson_log_odds: correlation of the log-odds.
        tad: test accuracy differential, surrogate minus network, as a share (eq. 20).
        r_miss: misclassification coincidence rate (eq. 21): of the queries that either gets wrong, the share where both
            predict the same wrong class.
        agreement: share of queries where both predict the same class.
        network_accuracy: share that the network gets right.
        surrogate_accuracy: share that the surrogate gets right.
        saturated: queries whose probability rounds to 0 or 1, of the network and of the surrogate.
        ties: pairs of queries with equal log-odds, of the network and of the surrogate.
    """

    tau: Measure
    tau_unsaturated: Measure
    spearman: Measure
    pearson: Measure
    pearson_log_odds: Measure
    tad: Measure
    r_miss: Measure
    agreement: Measure
    network_accuracy: Measure
    surrogate_accuracy: Measure
    saturated: tuple[int, int]
    ties: tuple[int, int]

    def measures(self) -> dict[str, Measure]:
        """The measures by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Measure)}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; null where undefined."""
        return asdict(self)


def evaluate(
    model: KernelGLM,
    queries: Rows,
    labels: np.ndarray | None = None,
    *,
    bootstrap: int = 200,
    seed: int = 0,
) -> Faithfulness:
    """Compare a surrogate with its network on queries.

    Args:
        model: a fitted surrogate.
        queries: a store or any `Rows`, with the network's logits, and labels; absent rows count nowhere.
        labels: the correct classes, int64 [m]; default those that are stored.
        bootstrap: resamples of the queries for the errors; 0 for none.
        seed: of the resamples.

    Returns:
        The measures, with errors where there are resamples.

    Raises:
        UsageError: a query has no label.
        Others: as `KernelGLM.logits`.

    Example:
        >>> found = gs.evaluate(gs.KernelGLM(target="predictions").fit(train), test, bootstrap=0)
        >>> list(found.measures())[:3]
        ['tau', 'tau_unsaturated', 'spearman']
    """
    there = present_rows(queries)
    given = there.labels if labels is None else of_present(labels, queries)
    queries, basis = there, model.log_odds_basis(there)
    return faithfulness(given, two_logits(queries.logits), basis, bootstrap=bootstrap, seed=seed)


def faithfulness(
    labels: np.ndarray, network: np.ndarray, surrogate: np.ndarray, *, bootstrap: int = 200, seed: int = 0
) -> Faithfulness:
    """Compare logits.

    Args:
        labels: correct classes, int64 [m].
        network: logits of the network, [m, classes].
        surrogate: numbers whose softmax is the surrogate's probabilities, [m, classes].
        bootstrap: resamples of the queries for the errors; 0 for none.
        seed: of the resamples.

    Returns:
        The measures, with errors where there are resamples.

    Raises:
        UsageError: there are no queries, shapes differ, logits are not known (NaN), or a label is missing or
            no whole number.
    """
    labels = checked_labels(labels, network, surrogate)
    ours, theirs = log_odds(surrogate, labels), log_odds(network, labels)
    predicted = network.argmax(1), surrogate.argmax(1)
    right = tuple((classes == labels).astype(float) for classes in predicted)
    same = (predicted[0] == predicted[1]).astype(float)
    clear = ~(saturated(ours) | saturated(theirs))
    rng = np.random.default_rng(seed)
    resamples = Resamples(rng, len(labels), bootstrap)

    def over(statistic: Callable[..., Measure], *columns: np.ndarray) -> Measure:
        return with_error(statistic, columns, resamples)

    return Faithfulness(
        tau=over(kendall, theirs, ours),
        tau_unsaturated=over(lambda t, o, ok: kendall(t[ok], o[ok]), theirs, ours, clear),
        spearman=over(spearman, theirs, ours),
        pearson=over(pearson, expit(theirs), expit(ours)),
        pearson_log_odds=over(pearson, theirs, ours),
        tad=over(lambda net, sur: _mean(sur - net), *right),
        r_miss=over(r_miss, labels, *predicted),
        agreement=over(_mean, same),
        network_accuracy=over(_mean, right[0]),
        surrogate_accuracy=over(_mean, right[1]),
        saturated=(int(saturated(theirs).sum()), int(saturated(ours).sum())),
        ties=(tied_pairs(theirs), tied_pairs(ours)),
    )


def kendall(a: np.ndarray, b: np.ndarray) -> Measure:
    """Kendall's tau-b, which allows for ties; undefined where either side is constant."""
    return _correlation(a, b, lambda: kendalltau(a, b).statistic)


def spearman(a: np.ndarray, b: np.ndarray) -> Measure:
    """Pearson's correlation of ranks."""
    return _correlation(a, b, lambda: spearmanr(a, b).statistic)


def pearson(a: np.ndarray, b: np.ndarray) -> Measure:
    """Pearson's correlation; undefined too where one side varies by no more than rounding."""
    return _correlation(a, b, lambda: pearsonr(a, b).statistic, rounding=True)


def is_constant(values: np.ndarray) -> bool:
    """Whether values are equal up to rounding."""
    return float(np.linalg.norm(values - values.mean())) <= 1e-11 * abs(float(values.mean()))


def r_miss(labels: np.ndarray, network: np.ndarray, surrogate: np.ndarray) -> Measure:
    """Misclassification coincidence rate (eq. 21): both wrong and of one mind, over either wrong.

        |{f ≠ z} ∩ {g ≠ z} ∩ {f = g}| / |{f ≠ z} ∪ {g ≠ z}|

    Args:
        labels: correct classes z, int64 [m].
        network: predicted classes f, int64 [m].
        surrogate: predicted classes g, int64 [m].

    Returns:
        Undefined where neither makes a mistake.
    """
    wrong = network != labels, surrogate != labels
    either = int((wrong[0] | wrong[1]).sum())
    if either == 0:
        return Measure(None, None, len(labels), "neither makes a mistake")
    alike = wrong[0] & wrong[1] & (network == surrogate)
    return Measure(float(alike.sum() / either), None, len(labels))


def saturated(odds: np.ndarray) -> np.ndarray:
    """Where a probability, given by its log-odds, rounds to 0 or 1 in float32; bool [m]."""
    p = expit(odds).astype(np.float32)
    return (p == 0) | (p == 1)


def tied_pairs(values: np.ndarray) -> int:
    """Pairs of equal values."""
    _, counts = np.unique(values, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


class Resamples:
    """Rows drawn with replacement, as many as there are; the same whenever they are gone through, one held at a time.

    Args:
        rng: draws them; is left as it was.
        rows: of each.
        count: resamples.
    """

    def __init__(self, rng: np.random.Generator, rows: int, count: int) -> None:
        self._rng, self._rows, self._count = copy.deepcopy(rng), rows, count

    def __len__(self) -> int:
        """How many there are."""
        return self._count

    def __iter__(self) -> Iterator[np.ndarray]:
        """int64 [rows] each."""
        rng = copy.deepcopy(self._rng)
        return (rng.integers(0, self._rows, self._rows) for _ in range(self._count))


def with_error(statistic: Callable[..., Measure], columns: tuple[np.ndarray, ...], resamples: Resamples) -> Measure:
    """A measure with its bootstrap standard error over resamples where it is defined; None below two of those."""
    found = statistic(*columns)
    if found.value is None or not resamples:
        return found
    values = [statistic(*(column[rows] for column in columns)).value for rows in resamples]
    defined = [value for value in values if value is not None]
    error = float(np.std(defined, ddof=1)) if len(defined) > 1 else None
    return Measure(found.value, error, found.n, found.note)


def _mean(values: np.ndarray) -> Measure:
    return Measure(float(values.mean()), None, len(values))


def _correlation(a: np.ndarray, b: np.ndarray, compute: Callable[[], float], *, rounding: bool = False) -> Measure:
    if len(a) < 2:
        return Measure(None, None, len(a), "fewer than two queries are left")
    for name, values in (("network", a), ("surrogate", b)):
        if not np.isfinite(values).all():
            return Measure(None, None, len(a), f"a probability of the {name} is not finite")
        if (values == values[0]).all():
            return Measure(None, None, len(a), f"all probabilities of the {name} are equal")
        if rounding and is_constant(values):
            return Measure(None, None, len(a), f"all probabilities of the {name} are equal up to rounding")
    return Measure(float(compute()), None, len(a))


def checked_labels(labels: np.ndarray, network: np.ndarray, surrogate: np.ndarray) -> np.ndarray:
    """Labels as int64 [m].

    Returns:
        int64 [m].

    Raises:
        UsageError: there are no queries, shapes differ, a query has no label, or one that is no whole number.
    """
    labels = class_indices(labels, where="labels")
    if network.ndim != 2 or network.shape != surrogate.shape or labels.shape != network.shape[:1]:
        raise UsageError(
            "labels and logits do not fit together",
            where="faithfulness",
            expected=f"{list(network.shape)} and labels [{len(network)}]",
            got=f"{list(surrogate.shape)} and labels {list(labels.shape)}",
        )
    if not len(labels):
        raise UsageError("there are no queries", where="faithfulness", expected="at least one")
    for name, logits in (("network", network), ("surrogate", surrogate)):
        unknown = np.flatnonzero(np.isnan(logits).any(axis=1))
        if unknown.size:
            raise UsageError(
                f"the {name}'s logits are not known",
                where="queries",
                expected=f"numbers for each of {len(labels)} queries",
                got=f"{unknown.size} without, the first in row {unknown[0]}",
            )
    missing = np.flatnonzero((labels < 0) | (labels >= network.shape[1]))
    if missing.size:
        raise UsageError(
            "labels are missing",
            where="queries",
            expected=f"a class below {network.shape[1]} for each of {len(labels)} queries",
            got=f"{missing.size} without, the first in row {missing[0]}",
        )
    return labels
