"""Which logits a similarity is about: all of them, one, or a weighted combination such as "cat - dog"."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from gradstore.errors import UsageError
from gradstore.store.rows import Rows

PREDICTED = "predicted"

Asked = str | Mapping[str, float]
""""predicted"; an expression such as "cat - 0.5 dog"; or a mapping name -> weight."""
Classes = Asked | None
"""None for the kernel's own."""


def query_weights(classes: Asked, train: Rows, queries: Rows, rows: np.ndarray) -> list[tuple[float, ...]]:
    """The class weights w of Φ = Σ_c w_c φ^c for each query.

    Args:
        classes: what the caller asked for.
        train: gives the names and number of classes.
        queries: gives the predicted class of each row.
        rows: int64 [m], rows of the query store.

    Returns:
        m tuples of c numbers.

    Raises:
        UsageError: no such class, no weight other than zero, or a layout that holds only the sum over classes.
    """
    c = train.schema.c
    if c == 1 and train.schema.classes > 1:
        raise UsageError(
            "a combination of classes needs the features of each, and this store holds only their sum",
            where=train.where,
            expected="layout per-class",
            got=f"layout {train.identity['layout']}",
        )
    if classes == PREDICTED:
        return [_one_hot(_predicted(queries, int(row)), c) for row in rows]
    weights = parse_weights(classes) if isinstance(classes, str) else dict(classes)
    return [_as_tuple(weights, train)] * len(rows)


def parse_weights(text: str) -> dict[str, float]:
    """Weights of text such as "cat - dog", "0.5 cat + 2 bird" or "cat"; names with spaces or signs in double quotes.

    Returns:
        Name -> weight.

    Raises:
        UsageError: it is no such sum.
    """
    term = re.compile(r"\s*([+-]?)\s*(?:(\d+(?:\.\d+)?)\s*\*?\s+)?(?:\"([^\"]+)\"|([^\s+\-*\"]+))\s*")
    weights: dict[str, float] = {}
    at = 0
    while at < len(text):
        match = term.match(text, at)
        if match is None or (at > 0 and not match.group(1)):
            break
        sign, factor, quoted, plain = match.groups()
        name = quoted or plain
        weights[name] = weights.get(name, 0.0) + float(factor or 1) * (-1 if sign == "-" else 1)
        at = match.end()
    if at < len(text) or not weights:
        raise UsageError(
            "not a combination of classes",
            where="--classes",
            expected='for example "cat - dog" or predicted',
            got=repr(text),
        )
    return weights


def _as_tuple(weights: Mapping[str, float], train: Rows) -> tuple[float, ...]:
    names = list(train.classes)
    unknown = [name for name in weights if name not in names]
    if unknown:
        shown = ", ".join(names[:10]) + (" …" if len(names) > 10 else "")
        raise UsageError("no such class", where="--classes", expected=f"one of {shown}", got=repr(unknown[0]))
    found = [0.0] * train.schema.c
    for name, weight in weights.items():
        found[names.index(name)] = float(np.float32(weight))
    if not any(found) or not np.isfinite(found).all():
        raise UsageError(
            "the weights of the classes are unusable",
            where="--classes",
            expected="finite, and one that is not zero",
            got=weights,
        )
    return tuple(found)


def _one_hot(c: int, count: int) -> tuple[float, ...]:
    return tuple(float(i == c) for i in range(count))


def _predicted(queries: Rows, row: int) -> int:
    found = int(queries.predicted[row])
    if found < 0:
        raise UsageError(
            "the network's logits of a query are not known",
            where=queries.where,
            expected="logits, whose largest is the predicted class",
            got=f"none in row {row}",
            hint="Name the classes with --classes, or import the store with its logits",
        )
    return found if queries.schema.c > 1 else 0  # of one class there is one Jacobian
