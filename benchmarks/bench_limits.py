"""What commands over a whole store take, beside what reading its bytes and their arithmetic alone take here.

    python -m benchmarks.bench_limits [--rows 2000] [--repeats 5] [--folder DIR]
    python -m benchmarks.bench_limits --write            # the table in results/README.md, from the last run

appends to results/limits.csv. Commands and limits take turns, and each figure is a median. The store is float16, 10
classes x 10,240, and in the page cache. What a limit has:

- ``verify``: BLAKE3 of the files, by as many threads as there are cores;
- ``export``: reading the files, widening them to float32, and writing that to the same disk, one after another;
- ``gram``: the digests, and the n² / 2 products as torch multiplies tiles that are in memory, in float32;
- ``index``: the digests, and one product of all rows with as many directions, by torch in float32;
- ``fit``: the digests, and the products of a single step of a solver, rows by weights and errors by rows, by torch in
  float32.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3

import gradstore as gs
from benchmarks.bench_surrogate import CLASSES, write
from benchmarks.setting import RESULTS, append_rows
from gradstore.arithmetic.names import FLOAT32
from gradstore.store.export import export
from gradstore.store.feature_store import FeatureStore
from gradstore.store.verify import verify

K, SEED, TILE, BLOCK = 10240, 0, 1024, 256
BEGIN, END = "<!-- limits -->", "<!-- end of limits -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where the store goes")
    parser.add_argument("--write", action="store_true", help="measure nothing: draw the table")
    options = parser.parse_args()
    if options.write:
        draw()
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        write(Path(name), options.rows, K)
        measure(gs.open(Path(name) / "train"), Path(name), options.repeats)


def measure(store: FeatureStore, folder: Path, repeats: int) -> None:
    """Time each command beside its limit, and put both down."""
    n, D = len(store), CLASSES * K
    floats = torch.randn(2, TILE, D)
    tiles = n**2 / 2 / TILE**2
    directions = gs.Session(store).index.basis.size
    files = sorted(path for path in store.path.rglob("*.h5"))
    cases: dict[str, tuple[Callable[[], object], Callable[[], object], float]] = {
        "verify": (partial(verify, store.path), partial(digests, files), 0.0),
        "export": (partial(export, store, folder / "all.npy"), partial(widened, files, folder / "raw"), 0.0),
        "gram": (partial(fresh_gram, store, folder / "gram.h5"), partial(digests, files), tiles),
        "index": (partial(gs.Session, store, rebuild=True), partial(digests_and_product, files, n, directions), 0.0),
        "fit": (partial(fit, store), partial(digests_and_product, files, n, 2 * CLASSES), 0.0),
    }
    for name, (command, limit, of_tile) in cases.items():
        seconds = in_turns([command, limit, partial(torch.mm, floats[0], floats[1].T)], repeats)
        least = seconds[1] + of_tile * seconds[2]
        found = {"command": name, "rows": n, "D": D, "store_GB": round(store.nbytes / 1e9, 2)}
        found |= {"measured_s": round(seconds[0], 3), "limit_s": round(least, 3), "ratio": round(least / seconds[0], 2)}
        append_rows("limits", [found], SEED)


def in_turns(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each, after a round that is not counted."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for call, taken in zip(calls, seconds, strict=True):
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken[1:]) for taken in seconds]


def digests(files: list[Path]) -> None:
    for path in files:
        blake3(max_threads=blake3.AUTO).update_mmap(path).digest()


def widened(files: list[Path], out: Path) -> None:
    with out.open("wb") as file:
        for path in files:
            values = torch.from_numpy(np.fromfile(path, np.float16, count=path.stat().st_size // 2))
            for part in values.split(1 << 24):
                file.write(memoryview(part.float().numpy()))
        file.flush()
        os.fsync(file.fileno())


def digests_and_product(files: list[Path], n: int, columns: int) -> None:
    digests(files)
    block, weights = torch.ones(BLOCK, CLASSES * K), torch.ones(CLASSES * K, columns)
    for _ in range(-(-n // BLOCK)):
        torch.mm(block, weights)


def fresh_gram(store: FeatureStore, out: Path) -> None:
    out.unlink(missing_ok=True)
    gs.gram(gs.open(store.path), out=out, arithmetic=FLOAT32.name, memory="1GB")


def fit(store: FeatureStore) -> None:
    gs.KernelGLM(alpha=1e-4, memory="1GB").fit(gs.open(store.path))


def draw() -> None:
    """The last figures of each command, between the marks of results/README.md."""
    with (RESULTS / "limits.csv").open(newline="") as file:
        last = {row["command"]: row for row in csv.DictReader(file)}
    lines = ["| command | measured | limit | ratio |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{name}` | {row['measured_s']} s | {row['limit_s']} s | {float(row['ratio']):.0%} |"
        for name, row in last.items()
    ]
    row = next(iter(last.values()))
    setting = f"{row['rows']} rows x {row['D']}, {row['store_GB']} GB in float16; {row['cpu']}, {row['simd']}, "
    setting += f"{row['threads']} threads, torch {row['torch']}, {row['date'][:10]}."
    page = RESULTS / "README.md"
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text("\n\n".join([before + BEGIN, setting, "\n".join(lines), END + after]))


if __name__ == "__main__":
    main()
