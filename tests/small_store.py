"""A store of small made-up rows, written by the same loop as featurize's: what the fault tests inject faults into."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.store.background_writer import in_background
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.disk import Disk
from gradstore.store.files.manifest import Manifest
from gradstore.store.identity import fingerprint_of
from gradstore.store.schema import Schema
from gradstore.store.store_writer import StoreWriter, open_writer
from gradstore.store.verify import find_damage, require_read

SCHEMA = Schema(c=2, K=12, classes=2, dtype="float16", preview=(4,))
N, SHARD_ROWS, GROUP = 22, 8, 4


def data(schema: Schema, n: int) -> dict[str, Any]:
    """What a store of this schema says of the first n rows."""
    if schema.has_inputs:
        return {"length": n}
    return {
        "length": n,
        "labels": hashlib.sha256(str(n).encode()).hexdigest(),
        "poisoned": "not known",
        "sampled rows": "",
    }


def plan(n: int = N, seed: int = 0, shard_rows: int = SHARD_ROWS) -> Manifest:
    identity = {
        "format": 1,
        "projection": {"kind": "rademacher", "K": SCHEMA.K, "seed": seed, "version": 1},
        "parameters": {"count": 6, "blocks": [["w", [2, 3]]]},
        "weights": hashlib.sha256(b"weights").hexdigest(),
        "precision": "float32",
        "classes": SCHEMA.classes,
        "layout": "per-class",
        "dtype": SCHEMA.dtype,
        "data": data(SCHEMA, n),
    }
    return Manifest(identity, fingerprint_of(identity), SCHEMA, n, shard_rows, GROUP, "train", ("a", "b"), "text")


def row(i: int) -> dict[str, np.ndarray]:
    """Every dataset of row i but its digest, of all versions; any two rows differ in all but what is 0 or 1."""
    rng = np.random.default_rng(i)
    return {
        "features": rng.standard_normal((SCHEMA.c, SCHEMA.K)).astype(np.float16),
        "scale": 2.0 ** rng.integers(-30, 30, SCHEMA.c).astype(np.float32),
        "sq_norm": rng.random(SCHEMA.c),
        "logits": rng.standard_normal(SCHEMA.classes).astype(np.float32),
        "label": np.int64(i % 2),
        "row": np.int64(i),
        "norm": rng.random(SCHEMA.c),
        "poisoned": np.uint8(i % 3 == 0),
        "input_digest": np.random.default_rng(i + 1_000_000).integers(0, 256, 16).astype(np.uint8),
        "absent": np.uint8(0),
        "preview": rng.integers(1, 255, 4).astype(np.uint8),
    }


ROWS = [row(i) for i in range(4096)]


def columns(rows: range) -> dict[str, np.ndarray]:
    return {name: np.stack([ROWS[i][name] for i in rows]) for name in ROWS[0]}


def fill(writer: StoreWriter, each: Callable[[int], None] = lambda index: None) -> None:
    """Write the missing shards, a group at a time; `each` is told when a shard is stored."""
    with in_background(writer, lambda shard: each(shard.index)) as background:
        for index in writer.missing:
            rows = writer.manifest.rows_of(index)
            for start in range(rows.start, rows.stop, GROUP):
                background.write(partial(columns, range(start, min(start + GROUP, rows.stop))))


def write(
    path: Path,
    n: int = N,
    disk: Disk | None = None,
    each: Callable[[int], None] = lambda index: None,
    shard_rows: int = SHARD_ROWS,
) -> None:
    """Create, continue, mend or append to the store of the first n rows."""
    with open_writer(path, plan(n, shard_rows=shard_rows), disk, data) as writer:
        damage = require_read(find_damage(path, writer.manifest, writer.disk), path)
        writer.drop(found.shard for found in damage)
        fill(writer, each)


def files(path: Path) -> dict[str, bytes]:
    """Everything that counts in a store: not the lock, the run log and the annotations, which tell the time."""
    others = (".lock", "run.jsonl", "annotations.safetensors")
    return {f.name: f.read_bytes() for f in sorted(path.iterdir()) if f.name not in others}


def wrong_rows(store: FeatureStore) -> list[int]:
    """Rows that read well and are not what they should be; reading them all raises where one is damaged."""
    read = store.read(0, len(store))
    expected = columns(range(len(store))) if len(store) else {}
    bad = {
        i
        for name, want in expected.items()
        for i in range(len(store))
        if name in read and read[name][i].tobytes() != want[i].tobytes()
    }
    return sorted(bad)
