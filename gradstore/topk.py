"""Top-k: the training rows that a kernel finds most similar to each query, over all training rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradstore.class_weights import Classes, query_weights
from gradstore.engines import choose_engine
from gradstore.errors import UsageError
from gradstore.kernels import Kernel, projected_kernel, require_comparable, require_served
from gradstore.memory import parse_bytes
from gradstore.phi import Phi
from gradstore.query_batch import load_queries
from gradstore.scan import plan_scan, scan
from gradstore.store import FeatureStore
from gradstore.topk_result import Search, TopK

__all__ = ["Search", "TopK", "topk"]


def topk(
    train: FeatureStore,
    queries: FeatureStore,
    k: int = 5,
    kernel: str = "proj-trntk",
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    classes: Classes = None,
    memory: int | str = "1GB",
    engine: str = "auto",
) -> TopK:
    """The k training rows that a kernel finds most similar to each query, over all training rows.

    Blocks of the training store are multiplied in float32 under a rigorous error bound; whatever could be among the k
    best is scored again in float64. So neither values nor order depend on memory, block size, engine or threads:
    similarity descending, then row ascending.

    Args:
        train: store of the training split.
        queries: store of another split with the same fingerprint.
        k: neighbours a query.
        kernel: "proj-trntk", "proj-pntk" or "proj-trntk0".
        rows: rows of the query store; default all.
        classes: compare Φ = Σ_c w_c φ^c instead: weights as a mapping or text ("cat - dog": why the one rather than the
            other), or "predicted" for the class that the network predicts for each query. The kernel then decides only
            whether it is a cosine.
        memory: bytes held beside the result.
        engine: "auto" measures; or "numpy", "torch", "cuda".

    Raises:
        UsageError: an unknown kernel, class or engine, k larger than the training store, a row that does not exist, too
            little memory.
        MismatchError: the stores are not of one model and one projection.
        CorruptError: a row does not match its digest.
        NonFiniteError: a row has no direction; names it.
    """
    chosen = projected_kernel(kernel)
    wanted = check_request(train, queries, k, chosen, rows, by_class=classes is not None)
    phis = query_phis(train, queries, chosen, wanted, classes)
    if not phis:
        return TopK(np.empty((0, k), np.int64), np.empty((0, k)), wanted, kernel, train, queries)
    longest = max(phis, key=lambda phi: phi.length)
    plan = plan_scan(train, longest, len(wanted), k, parse_bytes(memory))
    means = choose_engine(engine, plan.batch, plan.block, longest.width)
    batches = [slice(i, i + plan.batch) for i in range(0, len(wanted), plan.batch)]
    found = [scan(train, load_queries(queries, wanted[part], phis[part]), k, means, plan) for part in batches]
    return TopK(
        np.concatenate([best.rows for best in found]),
        np.concatenate([best.similarity for best in found]),
        wanted,
        kernel,
        train,
        queries,
        Search("exact", len(train) * len(batches), means.name),
    )


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
