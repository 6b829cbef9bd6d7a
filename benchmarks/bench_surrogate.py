"""Fit a surrogate of 20,000 rows under a memory limit: seconds, peak memory, convergence.

    python -m benchmarks.bench_surrogate                    # rows to benchmarks/results/surrogate.csv
    python -m benchmarks.bench_surrogate --rows 4000 --backend sgd

A store of made-up features with the structure of real ones (clusters, a decaying spectrum, noise) is written first, in
a process of its own. The fit then runs in a fresh process whose resident memory is watched; `limit` is the memory given
to the fit, `peak` what the whole process held beyond what it held after its imports. `accuracy` is that on 2,000 fresh
rows of the same clusters.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from gradstore.store.files.encoding import encode
from gradstore.store.files.manifest import Manifest
from gradstore.store.identity import fingerprint_of
from gradstore.store.schema import Schema
from gradstore.store.store_writer import open_writer

CLASSES = 10


def made_up(n: int, K: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(features float32 [n, 10, K], labels int64 [n]): twenty clusters, two a class, rank 64 and noise."""
    rng = np.random.default_rng(seed)
    fixed = np.random.default_rng(12345)
    spectrum = np.arange(1, 65) ** -0.7
    basis = fixed.standard_normal((64, CLASSES * K), np.float32) / math.sqrt(CLASSES * K)
    centres = fixed.standard_normal((2 * CLASSES, 64))
    source = rng.integers(0, 2 * CLASSES, n)
    coefficients = ((centres[source] + 0.6 * rng.standard_normal((n, 64))) * spectrum).astype(np.float32)
    features = coefficients @ basis
    features += 0.05 * rng.standard_normal(features.shape, np.float32) / math.sqrt(CLASSES * K)
    return features.reshape(n, CLASSES, K), source % CLASSES


def write(folder: Path, n: int, K: int) -> None:
    """A training store of n rows and a query store of 2,000, a shard at a time."""
    for name, count, seed in (("train", n, 0), ("test", 2000, 10**6)):
        schema = Schema(c=CLASSES, K=K, classes=CLASSES, dtype="float16")
        identity = {
            "projection": {"kind": "rademacher", "K": K, "seed": 0, "version": 1},
            "parameters": {"count": 1, "blocks": [["w", [1]]]},
            "layout": "per-class",
            "dtype": "float16",
            "classes": CLASSES,
            "data": {"length": count, "seed": seed},
        }
        names = tuple(str(c) for c in range(CLASSES))
        manifest = Manifest(identity, fingerprint_of(identity), schema, count, 512, 1, name, names)
        with open_writer(folder / name, manifest) as writer:
            for index in writer.manifest.missing:
                rows = writer.manifest.rows_of(index)
                with writer.shard(index) as shard:
                    shard.write(columns(rows, *made_up(len(rows), K, seed + index)))


def columns(rows: range, features: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """What a store keeps of some rows."""
    encoded = encode(torch.from_numpy(features), "float16")
    return {
        "features": encoded.features,
        "scale": encoded.scale,
        "sq_norm": np.square(features, dtype=np.float64).sum(-1),
        "logits": np.zeros((len(rows), CLASSES), np.float32),
        "label": labels,
        "row": np.arange(rows.start, rows.stop),
        "norm": encoded.norm,
    }


def fit(folder: Path, backend: str, alpha: float, limit: str) -> dict[str, object]:
    """One fit in this process."""
    import gradstore as gs

    train, test = gs.open(folder / "train"), gs.open(folder / "test")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = gs.KernelGLM(backend=backend, alpha=alpha, memory=limit, scratch=folder)
    began = time.perf_counter()
    model.fit(train)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    accuracy = float((model.predict(test) == test.labels).mean())
    return {
        "n": len(train),
        "D": model.n_features_in_,
        "classes": CLASSES,
        "store_GB": round(train.nbytes / 1e9, 2),
        "backend": backend,
        "alpha": alpha,
        "limit": limit,
        "fit_s": round(seconds, 1),
        "iterations": model.n_iter_,
        "converged": model.converged_,
        "peak_GB": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6, 2),
        "predict_2000_s": round(time.perf_counter() - began, 2),
        "accuracy": accuracy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--K", type=int, default=2048)
    parser.add_argument("--backend", action="append", choices=["multinomial", "sgd"])
    parser.add_argument("--alpha", type=float, default=1e-4)
    parser.add_argument("--limit", default="2GB")
    parser.add_argument("--folder", type=Path, help="where stores go, and what `stage` works on")
    parser.add_argument("--stage", choices=["write", "fit"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage == "write":
        write(given.folder, given.rows, given.K)
        return
    if given.stage == "fit":
        print(json.dumps(fit(given.folder, given.backend[0], given.alpha, given.limit)))
        return
    from benchmarks.setting import append_rows

    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        common = ["--folder", folder, "--rows", str(given.rows), "--K", str(given.K), "--limit", given.limit]
        stage(["--stage", "write", *common])
        for backend in given.backend or ["multinomial"]:
            found = stage(["--stage", "fit", "--backend", backend, "--alpha", str(given.alpha), *common])
            append_rows("surrogate", [json.loads(found)], seed=0)


def stage(arguments: list[str]) -> str:
    """Run one stage in a fresh process; its last line of output."""
    command = [sys.executable, "-m", "benchmarks.bench_surrogate", *arguments]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    return out.stdout.strip().splitlines()[-1] if out.stdout.strip() else ""


if __name__ == "__main__":
    main()
