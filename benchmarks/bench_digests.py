"""Digests of rows: the compiled call for many rows beside the `blake3` package a row at a time, one thread and two.

    python benchmarks/bench_digests.py          # results/digests.csv

Both are asked as a store asks, for BLAKE3 of the features and then of the small datasets of each row, and compared in
turn; medians are given. "cache": the same megabyte again and again; "memory": 400 MB, in blocks of 2 MB.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from setting import append_rows

from gradstore.schema import Schema
from gradstore.storage import native
from gradstore.storage.digests import PartedDigests

BLOCK, MEMORY, WORK = 1 << 20, 400 << 20, 400 << 20  # bytes: of a block, of data in memory, hashed in one measurement
SCHEMAS = {
    "10 x 10240 float16": Schema(c=10, K=10_240, classes=10, version=2),
    "10 x 1024 float16": Schema(c=10, K=1024, classes=10, version=2),
    "1 x 512 float16": Schema(c=1, K=512, classes=10, version=2),
    "1 x 64 float16": Schema(c=1, K=64, classes=10, version=2),
}


def blocks_of(schema: Schema, where: str) -> list[Callable[[], object]]:
    """Calls that hash one block of rows each."""
    rows = (BLOCK if where == "cache" else 2 * BLOCK) // schema.row_bytes
    count = 1 if where == "cache" else MEMORY // (rows * schema.row_bytes)
    small = schema.empty(rows, features=False)
    for array in small.values():
        array.fill(1)
    features = np.random.default_rng(0).integers(0, 1 << 14, (count, rows, schema.c, schema.K), np.uint16)
    digests = PartedDigests(schema, small)
    calls = [lambda block=block: digests.of(0, block) for block in features.view(np.float16)]
    return calls * max(1, WORK // (count * rows * schema.row_bytes))


def rate(calls: list[Callable[[], object]], total: int, threads: int, simd: str) -> float:
    """GB/s of all calls; `simd` is a level of the compiled part, "" for the package."""
    kept, native.level = native.level, lambda: simd
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda _: time.sleep(0.01), range(threads)))  # starts the threads
            began = time.perf_counter()
            list(pool.map(lambda part: [call() for call in part], [calls[i::threads] for i in range(threads)]))
            return total / (time.perf_counter() - began) / 1e9
    finally:
        native.level = kept


def measure(name: str, where: str, threads: int, repeats: int) -> list[dict[str, object]]:
    schema, found = SCHEMAS[name], {simd: [] for simd in ("", *native.levels())}
    calls = blocks_of(schema, where)
    rows = (BLOCK if where == "cache" else 2 * BLOCK) // schema.row_bytes
    for _ in range(repeats):
        for simd, rates in found.items():
            rates.append(rate(calls, len(calls) * rows * schema.row_bytes, threads, simd))
    package, *others = (statistics.median(rates) for rates in found.values())
    what = {"rows": name, "bytes a row": schema.row_bytes, "data in": where, "hashing threads": threads}
    return [
        {
            **what,
            "level": level,
            "GB/s": round(mid, 2),
            "package GB/s": round(package, 2),
            "ratio": round(mid / package, 2),
        }
        for level, mid in zip(native.levels(), others, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    for name in SCHEMAS:
        for where in ("cache", "memory"):
            for threads in (1, 2):
                append_rows("digests", measure(name, where, threads, repeats), seed=0)


if __name__ == "__main__":
    main()
