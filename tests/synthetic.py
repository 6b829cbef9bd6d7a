"""Stores written straight from arrays, so that tests of what reads them need no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.encoding import encode
from gradstore.store.files.manifest import Manifest
from gradstore.store.identity import fingerprint_of
from gradstore.store.schema import Schema
from gradstore.store.store_writer import open_writer


def write_store(
    path: Path,
    features: np.ndarray,
    *,
    dtype: str = "float16",
    shard_rows: int = 64,
    layout: str = "per-class",
    logits: np.ndarray | None = None,
    names: Sequence[str] = (),
    n: int | None = None,
    poisoned: np.ndarray | None = None,
) -> FeatureStore:
    """A finished store of features float32 [n, c, K]; with `n`, one of which only the first rows are written so far."""
    count, c, K = features.shape
    schema = Schema(c=c, K=K, classes=len(names) or c, dtype=dtype, truth=poisoned is not None)
    identity = {
        "projection": {"kind": "rademacher", "K": K, "seed": 0, "version": 1},
        "parameters": {"count": 1, "blocks": [["w", [1]]]},
        "layout": layout,
        "dtype": dtype,
        "classes": schema.classes,
        "data": {"length": n or count},
    }
    classes = tuple(names) or tuple(str(i) for i in range(c))
    manifest = Manifest(identity, fingerprint_of(identity), schema, n or count, shard_rows, 1, path.name, classes)
    outputs = np.zeros((count, schema.classes), np.float32) if logits is None else logits.astype(np.float32)
    with open_writer(path, manifest) as writer:
        for index in writer.manifest.missing:
            rows = writer.manifest.rows_of(index)
            if rows.stop > count:
                break
            with writer.shard(index) as shard:
                truth = {} if poisoned is None else {"poisoned": poisoned[rows.start : rows.stop].astype(np.uint8)}
                shard.write(_columns(features, outputs, rows, dtype) | truth)
    return FeatureStore(path)


def _columns(features: np.ndarray, logits: np.ndarray, rows: range, dtype: str) -> dict[str, np.ndarray]:
    part = features[rows.start : rows.stop]
    encoded = encode(torch.from_numpy(np.ascontiguousarray(part, np.float32)), dtype)
    return {
        "features": encoded.features,
        "scale": encoded.scale,
        "sq_norm": np.square(part, dtype=np.float64).sum(-1),
        "logits": logits[rows.start : rows.stop],
        "label": np.arange(rows.start, rows.stop) % max(logits.shape[1], 2),
        "row": np.arange(rows.start, rows.stop),
        "norm": encoded.norm,
    }


def clustered(n: int, c: int, K: int, *, seed: int = 0, rank: int = 40, noise: float = 0.05) -> np.ndarray:
    """Features float32 [n, c, K] with the structure of real ones: clusters, a decaying spectrum, some noise."""
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, rank + 1) ** -0.8
    basis = np.random.default_rng(10**6 + K).standard_normal((rank, c * K)) / np.sqrt(c * K)
    centres = np.random.default_rng(10**6).standard_normal((8, rank))
    coefficients = (centres[rng.integers(0, 8, n)] + 0.5 * rng.standard_normal((n, rank))) * spectrum
    values = coefficients @ basis + noise * rng.standard_normal((n, c * K)) / np.sqrt(c * K)
    return values.reshape(n, c, K).astype(np.float32)


def rows_of_every_kind(rng: np.random.Generator, n: int, width: int) -> np.ndarray:
    """float32 [n, width]: normal, spiky, tiny, huge, with entries of every size, zero, and twice the same."""
    kinds = rng.integers(0, 6, n)
    rows = rng.standard_normal((n, width))
    rows[kinds == 1, rng.integers(0, width)] = 1e4
    rows[kinds == 2] *= 1e-6
    rows[kinds == 3] *= 1e4 / np.maximum(np.abs(rows[kinds == 3]).max(axis=1, keepdims=True), 1)
    rows[kinds == 4] *= 2.0 ** -rng.integers(0, 60, (int((kinds == 4).sum()), width))
    rows[kinds == 5] = rows[0]
    return rows.astype(np.float32)


def dense_similarity(
    train: FeatureStore, queries: FeatureStore, kernel: str, weights: Sequence[float] | None = None
) -> np.ndarray:
    """Similarities float64 [m, n] from the stored features, without any of the library's search."""
    sides = []
    for store in (queries, train):
        values = store.features[:].astype(np.float64)
        if weights is not None:
            values = np.einsum("nck,c->nk", values, np.asarray(weights, np.float64))
        elif kernel == "proj-pntk":
            values = values.sum(axis=1)
        sides.append(values.reshape(len(values), -1))
    products = sides[0] @ sides[1].T
    if kernel == "proj-trntk0":
        return products
    return products / np.outer(*(np.linalg.norm(side, axis=1) for side in sides))
