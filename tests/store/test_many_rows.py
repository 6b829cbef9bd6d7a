"""Millions of small rows: written, opened, appended to, verified and searched; `make soak` takes 10^7 of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradstore as gs
from gradstore.store.background_writer import in_background
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.encoding import encode
from gradstore.store.files.manifest import Manifest
from gradstore.store.identity import fingerprint_of
from gradstore.store.schema import Schema
from gradstore.store.store_writer import open_writer
from gradstore.store.verify import verify

pytestmark = pytest.mark.soak
SCHEMA = Schema(c=1, K=8, classes=2)
TOGETHER = 1 << 12
SHARD_ROWS = 4 * TOGETHER
BUDGET = 256_000_000  # bytes that a search may take; reading and verifying take less


def data(schema: Schema, n: int) -> dict[str, Any]:
    return {"length": n}


def planned(n: int, split: str) -> Manifest:
    identity = {
        "projection": {"kind": "rademacher", "K": SCHEMA.K, "seed": 0, "version": 1},
        "parameters": {"count": 1, "blocks": [["w", [1]]]},
        "layout": "sum",
        "dtype": SCHEMA.dtype,
        "classes": SCHEMA.classes,
        "data": data(SCHEMA, n),
    }
    return Manifest(identity, fingerprint_of(identity), SCHEMA, n, SHARD_ROWS, 1, split, ("no", "yes"))


def features(rows: range, split: str) -> np.ndarray:
    """Made up, float16 values as float32 [n, 1, 8]; `rows` are of one stretch of `TOGETHER`."""
    part, first = divmod(rows.start, TOGETHER)
    rng = np.random.default_rng([part, *split.encode()])
    values = rng.standard_normal((TOGETHER, 1, SCHEMA.K), np.float32).astype(np.float16).astype(np.float32)
    return values[first : first + len(rows)]


def columns(rows: range, split: str) -> dict[str, np.ndarray]:
    values = features(rows, split)
    encoded = encode(torch.from_numpy(values), SCHEMA.dtype)
    return {
        "features": encoded.features,
        "scale": encoded.scale,
        "sq_norm": np.square(values, dtype=np.float64).sum(-1),
        "logits": np.zeros((len(rows), SCHEMA.classes), np.float32),
        "label": np.arange(rows.start, rows.stop) % 2,
        "row": np.arange(rows.start, rows.stop),
        "norm": encoded.norm,
    }


def write(path: Path, n: int) -> None:
    """Create, or append to, the store of the first n rows; its name is that of the split."""
    with open_writer(path, planned(n, path.name), None, data) as writer, in_background(writer) as background:
        for index in writer.missing:
            rows = writer.manifest.rows_of(index)
            for start in range(rows.start, rows.stop, TOGETHER):
                part = range(start, min(start + TOGETHER, rows.stop))
                background.write(partial(columns, part, path.name))


def nearest(n: int, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of the largest cosine with each query [m, 8], by NumPy in float64: (rows, cosines), each [m, k]."""
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    rows, best = np.empty((len(unit), 0), np.int64), np.empty((len(unit), 0))
    for start in range(0, n, TOGETHER):
        part = features(range(start, min(start + TOGETHER, n)), "train")[:, 0].astype(np.float64)
        here = unit @ (part / np.linalg.norm(part, axis=1, keepdims=True)).T
        best = np.concatenate([best, here], axis=1)
        rows = np.concatenate([rows, np.tile(np.arange(start, start + len(part)), (len(unit), 1))], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :k]
        best, rows = np.take_along_axis(best, order, 1), np.take_along_axis(rows, order, 1)
    return rows, best


@pytest.fixture
def peak() -> Callable[[str, Callable[[], Any], int], Any]:
    """peak(what, call, budget): what the call returns; its seconds and the most that it held are printed."""

    def kilobytes(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1])

    def measured(what: str, call: Callable[[], Any], budget: int) -> Any:
        if not Path("/proc/self/clear_refs").exists():
            return call()
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before, began = kilobytes("VmRSS"), time.perf_counter()
        result = call()
        seconds, held = time.perf_counter() - began, 1024 * (kilobytes("VmHWM") - before)
        print(f"{what}: {seconds:.2f} s, {held / 1e6:.0f} MB")
        assert held < budget + 60_000_000, what  # stacks of threads, pools, what is loaded on first use
        return result

    return measured


def test_a_store_of_many_small_rows(
    tmp_path: Path, amount: Callable[[int, int], int], peak: Callable[[str, Callable[[], Any], int], Any]
) -> None:
    n = amount(10**5, 10**7)
    before, path = n - n // 10 - 1, tmp_path / "train"
    write(tmp_path / "queries", 5)
    peak("written", lambda: write(path, before), 64_000_000)
    assert len(FeatureStore(path)) == before
    peak("appended to", lambda: write(path, n), 64_000_000)
    store = peak("opened", lambda: gs.open(path), 8_000_000)
    assert (len(store), store.complete, len(store.manifest.shards)) == (n, True, -(-n // SHARD_ROWS))
    assert peak("verified", lambda: verify(path), 64_000_000).ok
    rows = peak("a column read", lambda: store.column("row"), 4 * 8 * n)
    assert np.array_equal(rows, np.arange(n))
    queries = gs.open(tmp_path / "queries")
    found = peak("searched", lambda: gs.topk(store, queries, 5, "proj-pntk", memory=BUDGET), BUDGET)
    expected, cosines = nearest(n, features(range(5), "queries")[:, 0].astype(np.float64), 5)
    assert np.array_equal(found.indices, expected)
    np.testing.assert_allclose(found.similarity, cosines, rtol=0, atol=1e-12)
