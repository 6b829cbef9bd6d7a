"""Attribution: what each training example adds to a surrogate's logits of a query (Engel et al., ICLR 2024, eq. 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.errors import CorruptError, UsageError
from gradstore.explain.similarities import similarities
from gradstore.explain.surrogate import KernelGLM
from gradstore.explain.surrogate.training_gram import finite_rows
from gradstore.indices import RowChoice, chosen_row, chosen_rows
from gradstore.kernels.gram_matrix import Gram
from gradstore.machine.byte_counts import parse_bytes
from gradstore.store.concatenated import concat
from gradstore.store.feature_store import FeatureStore
from gradstore.store.present_rows import PresentRows, require_present
from gradstore.store.rows import Rows


@dataclass(frozen=True)
class Attribution:
    """A(x, x_i)^c = W_ci κ(x, x_i) + b_c / n for one query x.

    Attributes:
        values: A, float64 [classes, n]; summing a class's values gives its logit. Absent examples have none: 0, and n
            in the formula does not count them.
        similarity: κ(x, x_i), float64 [n]; NaN of absent examples.
        logits: the surrogate's, float64 [classes].
        intercept: b, float64 [classes].
        classes: names of the classes.
        row: the query's row.
        labels: of the training examples, int64 [n]; None where the surrogate was not fitted on a store.
        absent: which training examples are absent, bool [n]; None for none.
    """

    values: np.ndarray
    similarity: np.ndarray
    logits: np.ndarray
    intercept: np.ndarray
    classes: tuple[str, ...]
    row: int
    labels: np.ndarray | None = None
    absent: np.ndarray | None = None

    @property
    def _there(self) -> np.ndarray:
        """Which training examples are there, bool [n]."""
        return np.ones(self.values.shape[1], bool) if self.absent is None else ~self.absent

    @property
    def predicted(self) -> int:
        """Index of the class with the largest logit."""
        return int(self.logits.argmax())

    def contrast(self, a: int, b: int) -> np.ndarray:
        """Why class a rather than class b: A^a - A^b, float64 [n], whose sum is the difference of the logits.

        Returns:
            float64 [n].

        Raises:
            UsageError: there is no such class.
        """
        return self.values[self._class(a)] - self.values[self._class(b)]

    def class_means(self) -> np.ndarray:
        """Mean attribution of each class's training examples to each logit (App. M.1.1), float64 [classes, classes].

        Row c holds the means that, each times the training examples of its class, add up to logit c (eq. 22); NaN for a
        class without examples.

        Returns:
            float64 [classes, classes].

        Raises:
            UsageError: labels of the training examples are not known.
        """
        labels = self._known_labels()
        rows = [labels == c for c in range(len(self.classes))]
        means = [self.values[:, own].mean(axis=1) if own.any() else np.full(len(self.values), np.nan) for own in rows]
        return np.stack(means, axis=1)

    def visual(self, c: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """A_viz (eq. 23): a class's logit divided among the training examples of that class alone.

        For the n_c examples i of class c, with the share of all others spread evenly over them,

            A_viz(x, x_i) = W_ci κ(x, x_i) + b_c / n_c + 1/n_c Σ_{j not of class c} W_cj κ(x, x_j),

        so that they add up to logit c. (Eq. 23 is printed with a further sum over i, and with W_ci in the last term;
        with either, its values would not add up to the logit.)

        Args:
            c: class; default the predicted one.

        Returns:
            Their rows, int64 [n_c], and A_viz, float64 [n_c].

        Raises:
            UsageError: the labels of the training examples are not known, there is no such class, or none has it.
        """
        c = self._class(c)
        rows = np.flatnonzero(self._known_labels() == c)
        if not len(rows):
            raise UsageError("no training example is of this class", where="class", got=self.classes[c])
        there = self._there
        own = self.values[c] - there * (self.intercept[c] / there.sum())
        others = own.sum() - own[rows].sum()
        return rows, own[rows] + (self.intercept[c] + others) / len(rows)

    def _known_labels(self) -> np.ndarray:
        if self.labels is None:
            raise UsageError(
                "the labels of the training examples are not known",
                where="attribution",
                expected="queries in a store, of a surrogate fitted on a store",
            )
        missing = np.flatnonzero((self.labels < 0) & self._there)
        if missing.size:
            raise UsageError(
                "labels of training examples are missing",
                where="attribution",
                expected=f"a label for each of {len(self.labels)}",
                got=f"{missing.size} without, the first in row {missing[0]}",
            )
        return np.where(self._there, self.labels, -1)

    def top(self, k: int = 5, c: int | None = None, rather_than: int | None = None) -> Contributions:
        """The training examples that speak most for and against a class.

        Args:
            k: of each, at most; fewer where fewer have that sign.
            c: class; default the predicted one.
            rather_than: compare with this class instead of with nothing.

        Returns:
            Their rows, and the attributions float64 [n] by which they come.

        Raises:
            UsageError: k is below 1, there is no such class, or one is compared with itself.
        """
        if k < 1:
            raise UsageError("k is too small", where="-k", expected="at least 1", got=k)
        c = self._class(c)
        if c == rather_than:
            raise UsageError("a class cannot be compared with itself", where="--rather-than", got=self.classes[c])
        values = self.values[c] if rather_than is None else self.contrast(c, rather_than)
        order = np.argsort(-values, kind="stable")
        best = [int(i) for i in order[:k] if values[i] > 0]
        worst = [int(i) for i in order[::-1][:k] if values[i] < 0]
        return Contributions(c, rather_than, tuple(best), tuple(worst), values)

    def as_dict(self, k: int = 5, c: int | None = None, rather_than: int | None = None) -> dict[str, Any]:
        """Plain values for JSON."""
        found = self.top(k, c, rather_than)
        return {
            "row": self.row,
            "class": self.classes[found.c],
            "rather_than": None if rather_than is None else self.classes[rather_than],
            "predicted": self.classes[self.predicted],
            "logits": dict(zip(self.classes, self.logits.tolist(), strict=True)),
            "sum": float(found.values.sum()),
            "contributors": [self._record(i, found) for i in found.contributors],
            "opponents": [self._record(i, found) for i in found.opponents],
        }

    def _class(self, c: int | None) -> int:
        return self.predicted if c is None else chosen_row(c, len(self.values), where="c", what="class")

    def _record(self, i: int, found: Contributions) -> dict[str, Any]:
        label = -1 if self.labels is None else int(self.labels[i])
        return {
            "row": i,
            "label": self.classes[label] if label >= 0 else None,
            "attribution": float(found.values[i]),
            "similarity": float(self.similarity[i]),
        }


@dataclass(frozen=True)
class Contributions:
    """What speaks most for and against a class.

    Attributes:
        c: the class.
        rather_than: the class it is compared with, if any.
        contributors: training rows of the largest positive attributions, largest first.
        opponents: training rows of the most negative ones, most negative first.
        values: attributions of all training rows, float64 [n].
    """

    c: int
    rather_than: int | None
    contributors: tuple[int, ...]
    opponents: tuple[int, ...]
    values: np.ndarray


def attribute(
    model: KernelGLM, queries: Rows | Gram | np.ndarray, row: int, *, train: Rows | None = None
) -> Attribution:
    """Divide the surrogate's logits of one query among the training examples (eq. 3).

    Args:
        model: a fitted surrogate.
        queries: as it was fitted on: a query store or any `Rows`, a Gram matrix [m, n], or kernel values [m, n].
        row: of `queries`; of many, `attributions` reads the training store once.
        train: the training store; default what is at the path, or paths, that the surrogate remembers.

    Returns:
        float64 values [classes, n]. One pass over the training store, a block at a time.

    Raises:
        UsageError: there is no such row, the training store is gone from its path, or the surrogate was fitted on
            features in an array, which it does not keep.
        MismatchError: the queries or the training store are not those the surrogate is bound to.
        NonFiniteError: a cosine is undefined.
        CorruptError: the surrogate has weights of another number of training examples.

    Example:
        >>> found = gs.attribute(gs.KernelGLM().fit(train), test, row=3)
        >>> np.allclose(found.values.sum(axis=1), found.logits)
        True
    """
    row = chosen_row(row, queries.shape[0], where="--row", what="query row")
    return next(attributions(model, queries, [row], train=train))


def attributions(
    model: KernelGLM, queries: Rows | Gram | np.ndarray, rows: RowChoice | None = None, *, train: Rows | None = None
) -> Iterator[Attribution]:
    """Divide the logits of many queries among the training examples, each as `attribute` does, to the bit.

    The training store is read once for as many queries as the surrogate's `memory` holds: 4·D + 8·n bytes each. Beside
    it stands one query's attribution, 8·classes·n bytes, and whatever the caller keeps.

    Args:
        model: a fitted surrogate.
        queries: as `attribute` takes them.
        rows: of `queries`, as indices in any order or a bool mask; default all that are there.
        train: as `attribute` takes it.

    Returns:
        An iterator over them in the order of `rows`. What is asked for is checked at once; the store is read when the
        first one is taken.

    Raises:
        UsageError: as `attribute`, or the memory does not even hold one query and one row.
        Others: as `attribute`.

    Example:
        >>> model = gs.KernelGLM().fit(train)
        >>> [found.row for found in gs.attributions(model, test, rows=[3, 5])]
        [3, 5]
    """
    wanted = chosen_rows(rows, queries.shape[0], where="--rows", what="query row")
    if not isinstance(queries, Rows):
        _require_kernel_values(model, queries)
        return _from_kernel_values(model, queries, wanted)
    wanted = queries.present_at if rows is None else wanted
    model.binding_.require_queries(queries)
    require_present(queries, wanted, where="--rows")
    train = _remembered(model.binding_.source) if train is None else train
    model.binding_.require_training_store(train)
    _require_as_many(model, len(train))
    absent = (train.absent > 0) & ~model.coef_.any(axis=0)  # one that was excluded after the fit has a part in it
    return _from_stores(model, queries, wanted, train, absent)


def _from_kernel_values(model: KernelGLM, values: Gram | np.ndarray, wanted: np.ndarray) -> Iterator[Attribution]:
    for row in wanted.tolist():
        given = finite_rows(values, row, row + 1)[0] if isinstance(values, Gram) else values[row]
        yield _divided(model, row, np.asarray(given, np.float64), tuple(map(str, model.classes_)))


def _from_stores(
    model: KernelGLM, queries: Rows, wanted: np.ndarray, train: Rows, absent: np.ndarray
) -> Iterator[Attribution]:
    at = np.flatnonzero(~absent)
    names = tuple(map(str, queries.classes if len(queries.classes) > 1 else model.classes_))
    there = PresentRows(train, at) if absent.any() else train
    for rows, found in similarities(queries, wanted, there, model.phi_on(train), parse_bytes(model.memory)):
        for row, known in zip(rows.tolist(), found, strict=True):
            similarity = np.full(len(train), np.nan)
            similarity[at] = known
            yield _divided(model, row, similarity, names, train.labels, absent)


def _divided(
    model: KernelGLM,
    row: int,
    similarity: np.ndarray,
    names: tuple[str, ...],
    labels: np.ndarray | None = None,
    absent: np.ndarray | None = None,
) -> Attribution:
    """The attribution of one query, of its similarity float64 [n] to the training examples."""
    _require_as_many(model, len(similarity))
    there = np.ones(len(similarity), bool) if absent is None else ~absent
    known = np.where(there, similarity, 0.0)
    values = model.coef_ * known + there * (model.intercept_[:, None] / there.sum())
    logits = model.coef_ @ known + model.intercept_
    return Attribution(values, similarity, logits, model.intercept_, names, row, labels, absent)


def _require_as_many(model: KernelGLM, n: int) -> None:
    if model.coef_.shape[1] != n:  # of a file that says it is bound to these rows, and is not
        raise CorruptError("the surrogate is of other training examples", expected=f"{model.coef_.shape[1]}", got=n)


def class_index(names: Sequence[str], wanted: str) -> int:
    """Index of a class by name.

    Returns:
        Its place in `names`.

    Raises:
        UsageError: there is none of that name; lists those there are.
    """
    if wanted not in names:
        listed = ", ".join(names[:20]) + (" …" if len(names) > 20 else "")
        raise UsageError("unknown class", where="--class", expected=f"one of {listed}", got=repr(wanted))
    return list(names).index(wanted)


def _remembered(source: str | list[str]) -> Rows:
    paths = [source] if isinstance(source, str) else source
    for path in paths:
        if not path:
            raise UsageError("the surrogate was fitted on rows in memory", where="--train", expected="these rows")
        if not Path(path).exists():
            raise UsageError(
                "the training store is no longer where the surrogate was fitted",
                where=path,
                hint="Name it with --train",
            )
    return concat([FeatureStore(path) for path in paths])


def _require_kernel_values(model: KernelGLM, values: Gram | np.ndarray) -> None:
    if isinstance(values, Gram):
        model.binding_.require_query_gram(values)
        return
    model.binding_.require_kind("array", values)
    if model.vectors_ is not None:
        raise UsageError(
            "the surrogate keeps no training examples of an array",
            where="queries",
            expected="a store or a Gram matrix",
            hint="Fit it on a Gram matrix with kernel='precomputed'",
        )
