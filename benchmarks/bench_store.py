"""Throughput of stores beside a plain sequential file of the same size on the same disk, digests on.

    python -m benchmarks.bench_store [--folder DIR] [--rows N] [--repeats N]

Rows are 10 classes x 10,240 float16 features (102,400 floats). Each number is the median of several runs; only ratios
within one run mean anything. "cold" drops the file from the page cache first (`posix_fadvise`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.setting import append_rows
from gradstore.store.background_writer import in_background
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.manifest import Manifest
from gradstore.store.identity import fingerprint_of
from gradstore.store.schema import Schema
from gradstore.store.store_writer import open_writer

SCHEMA = Schema(c=10, K=10_240, classes=10)
CHUNK = 4 << 20
GROUP = 64


def manifest(rows: int) -> Manifest:
    identity = {
        "format": 1,
        "projection": {"kind": "rademacher", "K": SCHEMA.K, "seed": 0, "version": 1},
        "parameters": {"count": 1, "blocks": [["w", [1]]]},
        "weights": "benchmark",
        "classes": 10,
        "layout": "per-class",
        "dtype": "float16",
        "data": {"length": rows},
    }
    shard_rows = (256 << 20) // SCHEMA.row_bytes // GROUP * GROUP
    names = tuple(map(str, range(10)))
    return Manifest(identity, fingerprint_of(identity), SCHEMA, rows, shard_rows, GROUP, "train", names)


def columns(rows: range) -> dict[str, np.ndarray]:
    rng, n = np.random.default_rng(0), len(rows)
    data = {c.name: np.ones((n, *c.shape), c.dtype) for c in SCHEMA.columns if c.name != "digest"}
    data["features"] = rng.integers(0, 1 << 14, (n, 10, 10_240), dtype=np.uint16).view(np.float16)
    return {**data, "row": np.arange(rows.start, rows.stop)}


def write_store(path: Path, rows: int, block: dict[str, np.ndarray]) -> None:
    with open_writer(path, manifest(rows)) as writer, in_background(writer) as background:
        for index in writer.missing:
            span = writer.manifest.rows_of(index)
            for start in range(span.start, span.stop, GROUP):
                background.write(partial(rows_from, block, range(start, min(start + GROUP, span.stop))))


def rows_from(block: dict[str, np.ndarray], rows: range) -> dict[str, np.ndarray]:
    cut = {name: array[: len(rows)] for name, array in block.items()}
    return {**cut, "row": np.arange(rows.start, rows.stop)}


def write_plain(path: Path, size: int, block: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for at in range(0, size, len(block)):
        os.pwrite(fd, block[: min(len(block), size - at)], at)
    os.fsync(fd)
    os.close(fd)


def read_plain(path: Path) -> None:
    buffer = bytearray(CHUNK)
    fd = os.open(path, os.O_RDONLY)
    at = 0
    while done := os.preadv(fd, [buffer], at):
        at += done
    os.close(fd)


def read_store(store: FeatureStore) -> None:
    for _, _ in store.blocks(512):
        pass


def forget(folder: Path) -> None:
    """Drop what is in a folder from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def interleaved(
    repeats: int, actions: dict[str, Callable[[], object]], before: Callable[[], object]
) -> dict[str, float]:
    """Median seconds of each action, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            before()
            seconds[name].append(timed(action))
    return {name: statistics.median(values) for name, values in seconds.items()}


def random_rows(store: FeatureStore, count: int = 300) -> list[float]:
    """Milliseconds of single rows at random, from the page cache, each as float32 with its digest checked."""
    read_store(store)
    rows = np.random.default_rng(0).integers(0, len(store), count)
    return sorted(1e3 * timed(lambda row=row: store.features[row]) for row in rows)  # type: ignore[misc]


def run(folder: Path, rows: int, repeats: int) -> list[dict[str, object]]:
    path, plain = folder / "store", folder / "plain"
    block = columns(range(GROUP))
    size = rows * SCHEMA.row_bytes
    data = block["features"].tobytes()

    def clean() -> None:
        shutil.rmtree(path, ignore_errors=True)
        plain.unlink(missing_ok=True)

    actions = {"plain": lambda: write_plain(plain, size, data), "store": lambda: write_store(path, rows, block)}
    written = interleaved(repeats, actions, clean)
    write_plain(plain, size, data)
    write_store(path, rows, block) if not path.exists() else None
    reading = {"plain": lambda: read_plain(plain), "store": lambda: read_store(FeatureStore(path))}
    cold = interleaved(repeats, reading, lambda: forget(folder))
    warm = interleaved(repeats, reading, lambda: None)
    single = random_rows(FeatureStore(path))
    found: list[dict[str, object]] = []
    for name, seconds in (("write + fsync", written), ("read, cold", cold), ("read, warm", warm)):
        speeds = {f"{kind} GB/s": round(size / s / 1e9, 2) for kind, s in seconds.items()}
        ratio = round(seconds["plain"] / seconds["store"], 2)
        row = {"what": name, "bytes": size, "rows": rows, "repeats": repeats}
        found.append({**row, **speeds, "ratio": ratio, "ms": ""})
    empty = dict.fromkeys(("plain GB/s", "store GB/s", "ratio"), "")
    row = {"what": "one row at random, warm", "bytes": SCHEMA.row_bytes, "rows": 1, "repeats": len(single)}
    return [*found, {**row, **empty, "ms": round(statistics.median(single), 3)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to write; default the temporary folder")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        append_rows("store", run(Path(folder), chosen.rows, chosen.repeats), seed=0)


if __name__ == "__main__":
    main()
