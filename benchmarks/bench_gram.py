"""Gram matrix of a store: time against numpy on the same array in memory, and the share of torch's own rate.

    OMP_NUM_THREADS=2 python benchmarks/bench_gram.py [--rows 4000] [--repeats 3] [--folder DIR]

appends to results/gram.csv. Rivals are interleaved and each figure is a median. numpy multiplies a float32 array that
is already in memory (`x @ x.T`, which calls BLAS's symmetric product); ours reads the float16 store from the page
cache, checks every row's digest and writes the matrix to disk. "share of matmul" is the time that plain torch products
of operands in memory, tile by tile and of the same dtype, would take for the n²/2 values that have to be computed, over
our time for everything. bfloat16x2 takes three products of bfloat16 a tile, so torch's tile is three of them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from setting import append_rows

import gradstore as gs
from gradstore.arithmetic import matrix_unit
from gradstore.arithmetic.names import BFLOAT16X2, FLOAT32, INT8_ROWS
from gradstore.kernels.gram_matrix import Gram
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.encoding import encode
from gradstore.store.files.manifest import Manifest
from gradstore.store.identity import fingerprint_of
from gradstore.store.schema import Schema
from gradstore.store.store_writer import open_writer

CLASSES, K, SEED, TILE = 10, 10240, 0, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where the store goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        rows = measure(options.rows, options.repeats, Path(name))
    append_rows("gram", [{**row, "rows": options.rows, "classes": CLASSES, "K": K} for row in rows], SEED)


def measure(n: int, repeats: int, folder: Path) -> list[dict[str, object]]:
    x = make_features(n)
    store = write_store(folder / "store", x)
    x = x.reshape(n, -1)
    integers = (torch.randn(2, TILE, CLASSES * K) * 30).clamp_(-127, 127).to(torch.int8)
    floats = torch.from_numpy(x[: 2 * TILE]).view(2, TILE, -1)
    out = folder / "gram.h5"
    limbs = floats.bfloat16()
    kinds = [FLOAT32.name, *([BFLOAT16X2.name] if matrix_unit.available() else []), INT8_ROWS.name]
    torch_tiles: dict[str, Callable[[], object]] = {
        "float32": lambda: torch.mm(floats[0], floats[1].T),
        BFLOAT16X2.name: lambda: [torch.mm(limbs[0], limbs[1].T) for _ in range(3)],
        "int8": lambda: torch._int_mm(integers[0], integers[1].T),
    }
    rivals: dict[str, Callable[[], object]] = {"numpy float32 in memory": lambda: x @ x.T}
    for kind in kinds:
        rivals[f"store, {kind}"] = partial(fresh, store, out, kind)
        rivals[f"torch tile {kind}"] = torch_tiles[kind]
    seconds = interleaved(rivals, repeats)
    tiles = n**2 / 2 / TILE**2
    found = [row(name, value, "s") for name, value in seconds.items()]
    for kind in kinds:
        ours = seconds[f"store, {kind}"]
        found.append(row(f"numpy / store, {kind}", seconds["numpy float32 in memory"] / ours, "x"))
        found.append(row(f"share of matmul, {kind}", tiles * seconds[f"torch tile {kind}"] / ours, "1"))
    exact = x @ x.T
    norms = np.sqrt(np.diag(exact))
    exact /= np.outer(norms, norms)
    for kind in kinds:
        error = fresh(store, out, kind)[:] - exact
        found.append(row(f"rms error of a cosine, {kind}", float(np.sqrt(np.mean(error**2))), "1"))
        found.append(row(f"largest error of a cosine, {kind}", float(np.abs(error).max()), "1"))
    found.append(
        row(
            "peak resident memory of the whole benchmark",
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "GB",
        )
    )
    return found


def make_features(n: int) -> np.ndarray:
    """[n, c, K] float32 with a low-rank part, so that cosines are not all zero."""
    generator = np.random.default_rng(SEED)
    basis = generator.standard_normal((16, CLASSES * K), np.float32)
    x = generator.standard_normal((n, 16), np.float32) @ basis
    x += 2 * generator.standard_normal(x.shape, np.float32)
    return x.reshape(n, CLASSES, K)


def write_store(path: Path, x: np.ndarray) -> FeatureStore:
    n = len(x)
    schema = Schema(c=CLASSES, K=K, classes=CLASSES)
    identity = {
        "projection": {"kind": "rademacher", "K": K, "seed": 0, "version": 1},
        "parameters": {"count": 1, "blocks": [["w", [1]]]},
        "layout": "per-class",
        "dtype": "float16",
        "classes": CLASSES,
        "data": {"length": n},
    }
    names = tuple(map(str, range(CLASSES)))
    manifest = Manifest(identity, fingerprint_of(identity), schema, n, 1000, 1, "train", names)
    with open_writer(path, manifest) as writer:
        for index in writer.manifest.missing:
            rows = writer.manifest.rows_of(index)
            encoded = encode(torch.from_numpy(x[rows.start : rows.stop]), "float16")
            with writer.shard(index) as shard:
                shard.write(
                    {
                        "features": encoded.features,
                        "scale": encoded.scale,
                        "sq_norm": np.ones((len(rows), CLASSES)),
                        "logits": np.zeros((len(rows), CLASSES), np.float32),
                        "label": np.zeros(len(rows), np.int64),
                        "row": np.arange(rows.start, rows.stop),
                        "norm": encoded.norm,
                    }
                )
    return gs.open(path)


def fresh(store: FeatureStore, out: Path, arithmetic: str) -> Gram:
    out.unlink(missing_ok=True)
    return gs.gram(gs.open(store.path), out=out, arithmetic=arithmetic, memory="2GB")


def interleaved(rivals: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, every round running all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, call in rivals.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def row(measure: str, value: float, unit: str) -> dict[str, object]:
    return {"measure": measure, "value": value, "unit": unit}


if __name__ == "__main__":
    main()
