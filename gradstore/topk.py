"""Exact streamed top-k: the most similar training rows of each query, by one pass over the training store."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import UsageError
from gradstore.kernels import Kernel, feature_map, projected_kernel, require_comparable, require_served
from gradstore.memory import format_bytes, parse_bytes
from gradstore.report import Explanation, Neighbour, TopKPage, write_topk
from gradstore.shown import class_name, predicted_class, provenance, shown_example
from gradstore.store import FeatureStore

# Candidates kept beyond k, so that near-ties can be put in order by float64.
_SPARE = 32
# Bound on the relative error of a float32 inner product of two features, in units of the product of their norms.
_TOLERANCE = 2e-5


@dataclass(frozen=True)
class TopK:
    """The k most similar training rows of each query, best first; equal similarities by ascending row.

    Attributes:
        indices: int64 [m, k], rows of the training store.
        similarity: float64 [m, k].
        rows: int64 [m], rows of the query store.
        kernel: name of the kernel.
        train: the training store.
        queries: the query store.
    """

    indices: np.ndarray
    similarity: np.ndarray
    rows: np.ndarray
    kernel: str
    train: FeatureStore
    queries: FeatureStore

    @property
    def k(self) -> int:
        """Neighbours a query."""
        return int(self.indices.shape[1])

    def records(self) -> list[dict[str, Any]]:
        """One plain record a query, for JSON."""
        return [
            {
                "row": int(row),
                "label": class_name(self.queries, int(self.queries.labels[row])),
                "predicted": predicted_class(self.queries, int(row)),
                "neighbours": [
                    {"row": int(i), "similarity": float(s), "label": class_name(self.train, int(self.train.labels[i]))}
                    for i, s in zip(self.indices[q], self.similarity[q], strict=True)
                ],
            }
            for q, row in enumerate(self.rows)
        ]

    def explanation(self, q: int, votes: int | None = None) -> Explanation:
        """Query number q beside its neighbours, with pictures; reads k + 1 rows."""
        neighbours = tuple(
            Neighbour(shown_example(self.train, int(i)), float(s))
            for i, s in zip(self.indices[q], self.similarity[q], strict=True)
        )
        return Explanation(shown_example(self.queries, int(self.rows[q])), neighbours, votes)

    def page(self, limit: int = 50) -> TopKPage:
        """The first `limit` queries as a page."""
        return TopKPage(
            kernel=self.kernel,
            train=self.train.manifest.split,
            train_size=len(self.train),
            queries=self.queries.manifest.split,
            query_size=len(self.rows),
            explanations=tuple(self.explanation(q) for q in range(min(limit, len(self.rows)))),
            provenance=provenance(self.train, self.queries),
        )

    def save_html(self, path: str | os.PathLike[str], limit: int = 50) -> Path:
        """Write the first `limit` queries as one HTML page that opens offline."""
        return write_topk(self.page(limit), path)

    def save_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write one line a query and neighbour."""
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["query_row", "rank", "train_row", "similarity"])
            for row, indices, similarity in zip(self.rows, self.indices, self.similarity, strict=True):
                writer.writerows([int(row), rank, int(i), repr(float(s))] for rank, (i, s) in enumerate(zip(indices, similarity, strict=True), 1))
        return Path(path)


def topk(
    train: FeatureStore,
    queries: FeatureStore,
    k: int = 5,
    kernel: str = "proj-trntk",
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    memory: int | str = "1GB",
) -> TopK:
    """The k training rows that a kernel finds most similar to each query, over all training rows.

    Shards are read in order and multiplied in float32; the best candidates are scored again in float64, so neither
    values nor order depend on how the work was cut.

    Args:
        train: store of the training split.
        queries: store of another split with the same fingerprint.
        k: neighbours a query.
        kernel: "proj-trntk", "proj-pntk" or "proj-trntk0".
        rows: rows of the query store; default all.
        memory: bytes held beside the result.

    Raises:
        UsageError: an unknown kernel, k larger than the training store, a row that does not exist, too little memory.
        MismatchError: the stores are not of one model and one projection.
        CorruptError: a row does not match its digest.
        NonFiniteError: a row has no direction.
    """
    chosen = projected_kernel(kernel)
    require_comparable(train, queries)
    require_served(chosen, train)
    if not 1 <= k <= len(train):
        raise UsageError("k does not fit the training store", where="-k", expected=f"1 to {len(train)}", got=k)
    wanted = _require_rows(rows, queries)
    batch, block = _plan_memory(train, k, parse_bytes(memory))
    parts = [_search(train, queries, chosen, wanted[i : i + batch], k, block) for i in range(0, len(wanted), batch)]
    indices = np.concatenate([part[0] for part in parts]) if parts else np.empty((0, k), np.int64)
    similarity = np.concatenate([part[1] for part in parts]) if parts else np.empty((0, k))
    return TopK(indices, similarity, wanted, kernel, train, queries)


def _require_rows(rows: Sequence[int] | np.ndarray | None, queries: FeatureStore) -> np.ndarray:
    wanted = np.arange(len(queries)) if rows is None else np.asarray(rows, dtype=np.int64).reshape(-1)
    bad = wanted[(wanted < 0) | (wanted >= len(queries))]
    if bad.size:
        raise UsageError("no such query row", where="--rows", expected=f"0 to {len(queries) - 1}", got=int(bad[0]))
    return wanted


def _plan_memory(train: FeatureStore, k: int, memory: int) -> tuple[int, int]:
    """(queries a pass, training rows a block) within the budget: half for the queries, half for the block."""
    _, c, K = train.shape
    row = c * K * 12 + train.schema.row_bytes  # stored, float32, and a product or a float64 copy beside it
    need = 4 * row
    if memory < need:
        raise UsageError("too little memory", where="--memory", expected=f"at least {format_bytes(need)}", got=format_bytes(memory))
    batch = min(512, memory // (2 * row))
    return batch, min(4096, memory // (2 * row))


def _search(
    train: FeatureStore, queries: FeatureStore, kernel: Kernel, rows: np.ndarray, k: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """One pass over the training store for a batch of queries."""
    phi, norms = _features_of(queries, kernel, rows)
    best = torch.full((len(rows), 0), -torch.inf, dtype=torch.float64)
    index = torch.empty((len(rows), 0), dtype=torch.int64)
    for start, columns in train.blocks(block):
        other, other_norms = feature_map(kernel, columns)
        scores = (phi @ other.T).double() / (norms[:, None] * other_norms)
        ids = torch.arange(start, start + len(other)).expand_as(scores)
        best, index = _keep(torch.cat([best, scores], 1), torch.cat([index, ids], 1), k + _SPARE)
    return _rescore(train, kernel, phi, norms, best, index, k)


def _features_of(store: FeatureStore, kernel: Kernel, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    parts = [feature_map(kernel, store.read(int(row), int(row) + 1)) for row in rows]
    if not parts:
        return torch.empty(0, 0), torch.empty(0, dtype=torch.float64)
    return torch.cat([phi for phi, _ in parts]), torch.cat([norm for _, norm in parts])


def _keep(scores: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best columns of each row, in order: similarity descending, then index ascending."""
    order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :count]
    return scores.gather(1, order), index.gather(1, order)


def _rescore(
    train: FeatureStore, kernel: Kernel, phi: Tensor, norms: Tensor, best: Tensor, index: Tensor, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Score again in float64 every candidate that could be among the k best, and sort."""
    span = torch.ones(len(best), 1, dtype=torch.float64)
    if not kernel.normalised:
        span = best.abs().amax(dim=1, keepdim=True)
    close = best >= best[:, k - 1 : k] - 2 * _TOLERANCE * span
    exact = torch.full_like(best, -torch.inf)
    for row in _distinct(index[close]):
        other, other_norm = feature_map(kernel, train.read(row, row + 1))
        q, slot = torch.nonzero(close & (index == row), as_tuple=True)
        exact[q, slot] = (phi[q].double() @ other[0].double()) / (norms[q] * other_norm)
    order = np.lexsort((index.numpy(), -exact.numpy()), axis=1)[:, :k]
    return np.take_along_axis(index.numpy(), order, 1), np.take_along_axis(exact.numpy(), order, 1)


def _distinct(index: Tensor) -> Iterator[int]:
    yield from torch.unique(index).tolist()
