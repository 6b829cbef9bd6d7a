"""Top-k at 200 queries × 20,000 rows × 102,400: the exact scan beside FAISS and beside what the machine can do at best;
the certified and approximate search beside the scan; the cost of the index; growth with n, m, k and K.

    python benchmarks/bench_topk.py --directory /somewhere/with/6GB       # results/topk.csv, topk_growth.csv and .png
    python benchmarks/bench_topk.py --directory D --parts index --data digits --stores stores/train stores/test
    python benchmarks/bench_topk.py --directory D --parts scan --level avx2       # as on a processor without AVX-512

Compared things run in turn, `--repeats` times, and medians are compared. FAISS is given float32 features that are
already in memory, in parts so that they fit; our search reads, checks and converts what is on the disk (page cache).
A level holds both to what such a processor has, BLAS, PyTorch, FAISS and gradstore; digests take what there is.

The picture of growth needs matplotlib: `pip install ".[plots]"`.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from setting import RESULTS, append_rows
from structured import write_structured

import gradstore as gs
from gradstore.arithmetic import matrix_unit
from gradstore.arithmetic.seven_bits import MOST, LeftRows
from gradstore.machine.threads import single_threaded
from gradstore.search.index.faiss_index import require_faiss
from gradstore.store.feature_store import FeatureStore

K_BEST = 10
_LEVEL = "GRADSTORE_BENCHMARK_LEVEL"


def seconds(call: Callable[..., object], *args: Any, **settings: Any) -> float:
    """Seconds that one call takes."""
    began = time.perf_counter()
    call(*args, **settings)
    return time.perf_counter() - began


def rate(m: int, rows: int, width: int, calls: list[Callable[[], object]]) -> float:
    """GFLOP/s of the fastest of some products [m, width] by [rows, width], data in cache, a thread a core."""
    cores, repeat = torch.get_num_threads(), 40

    def work(call: Callable[[], object]) -> None:
        torch.set_num_threads(1)
        for _ in range(repeat):
            call()

    with single_threaded(), ThreadPoolExecutor(cores) as pool:
        taken = [min(seconds(lambda c: list(pool.map(work, [c] * cores)), call) for _ in range(3)) for call in calls]
    return 2e-9 * m * width * rows * repeat * cores / min(taken)


def float_rate(m: int) -> float:
    """GFLOP/s of float32 products of the scan's shape."""
    q, t = torch.randn(m, 2048), torch.randn(234, 2048)
    return rate(m, 234, 2048, [lambda: torch.mm(q, t.T)])


def integer_rate(m: int, K: int) -> float:
    """GFLOP/s of the scan's products of one 7-bit digit."""
    rows = 117
    q, t = (torch.randint(-MOST, MOST + 1, (n, K), dtype=torch.int8) for n in (m, rows))
    left = LeftRows(q)
    return rate(m, rows, K, [lambda: left.times(t)])


def limb_rate(m: int) -> float:
    """GFLOP/s of the scan's products of one bfloat16 limb, of float16 rows by packed queries."""
    rows, q = torch.randn(240, 2048).half(), matrix_unit.pack(torch.randn(m, 2048), 1)
    return rate(m, 240, 2048, [lambda: matrix_unit.add_product(rows, q, torch.zeros(240, m), limbs=(1, 1))])


def plain_read(store: FeatureStore) -> None:
    """Every byte of every shard through one buffer, unchecked, a thread a core."""

    def work(index: int) -> None:
        buffer = memoryview(bytearray(8 << 20))
        with (store.path / store.manifest.file_of(index)).open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, range(store.manifest.shard_count)))


def checked_read(store: FeatureStore) -> None:
    """Every row through the store, digests checked."""
    buffers = store.schema.empty(250)
    for start in range(0, len(store), 250):
        store.read(start, min(start + 250, len(store)), out=buffers)


def faiss_seconds(train: FeatureStore, queries: np.ndarray, parts: int = 4) -> float:
    """Seconds in `faiss.knn` alone, over parts of the features that are float32 in memory before the clock starts."""
    faiss, total = require_faiss(), 0.0
    for rows in np.array_split(np.arange(len(train)), parts):
        block = np.empty((len(rows), queries.shape[1]), np.float32)
        for low in range(0, len(rows), 250):
            values = train.features[int(rows[0]) + low : int(rows[0]) + min(low + 250, len(rows))]
            block[low : low + len(values)] = values.reshape(len(values), -1)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        total += seconds(faiss.knn, queries, block, K_BEST, metric=faiss.METRIC_INNER_PRODUCT)
    return total


def bench_scan(train: FeatureStore, queries: FeatureStore, repeats: int, row: Callable[..., None]) -> None:
    m = len(queries)
    flat = queries.features[:].reshape(m, -1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    names = ("ours", "ours_cpu", "faiss", "float_gemm", "integer_gemm", "limb_gemm", "read", "checked")
    times: dict[str, list[float]] = {name: [] for name in names}
    work = 2e-9 * m * len(train) * flat.shape[1]
    for _ in range(repeats):
        cpu = time.process_time()
        times["ours"].append(seconds(gs.topk, train, queries, K_BEST))
        times["ours_cpu"].append(time.process_time() - cpu)
        times["faiss"].append(faiss_seconds(train, flat))
        times["float_gemm"].append(work / float_rate(m))
        times["integer_gemm"].append(work / integer_rate(m, train.schema.K))
        if matrix_unit.available():
            times["limb_gemm"].append(work / limb_rate(m))
        times["read"].append(seconds(plain_read, train))
        times["checked"].append(seconds(checked_read, train))
    mid = {name: statistics.median(values) for name, values in times.items() if values}
    engine = gs.topk(train, queries, K_BEST).search.engine
    detail = " ".join(f"{name}={value:.2f}s" for name, value in mid.items()) + f" engine={engine}"
    ours, read = mid["ours"], mid["read"]
    own = mid[{"int8": "integer_gemm", "bfloat16": "limb_gemm"}.get(engine, "float_gemm")]
    row("exact scan against faiss.knn float32 in memory", mid["faiss"] / ours, "times", detail)
    row("float32 GEMM or plain read, the longer, against the scan", max(mid["float_gemm"], read) / ours, "of 1", detail)
    row("its own products or plain read, the longer, against the scan", max(own, read) / ours, "of 1", detail)
    row("its own products plus checked read against the scan", (own + mid["checked"]) / ours, "of 1", detail)


def peak_memory(train: Path, queries: Path, memory: str) -> dict[str, float]:
    """Peak resident megabytes of a process that does one scan, and just before it."""
    code = (
        "import re, sys, json, gradstore as gs\n"
        "a, b = gs.open(sys.argv[1]), gs.open(sys.argv[2])\n"
        "gs.topk(b, b, 2, rows=[0], memory=sys.argv[3])\n"
        "status = lambda: open('/proc/self/status').read()\n"
        # Not ru_maxrss, which begins with the peak of the process that started this one.
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', status()).group(1)) * 1024 / 1e6\n"
        "before = peak(); gs.topk(a, b, 10, memory=sys.argv[3]); print(json.dumps([before, peak()]))\n"
    )
    words = [sys.executable, "-c", code, str(train), str(queries), memory]
    before, peak = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return {"before": before, "peak": peak}


def bench_index(train: FeatureStore, queries: FeatureStore, repeats: int, row: Callable[..., None]) -> None:
    reads = statistics.median(seconds(checked_read, train) for _ in range(repeats))
    build = seconds(gs.Session, train, rebuild=True)
    session = gs.Session(train)
    card = session.card()
    row(
        "index build against one checked read of the store",
        build / reads,
        "times",
        f"build={build:.2f}s read={reads:.2f}s",
    )
    row(
        "index size against the store",
        session.index.nbytes / train.nbytes,
        "of 1",
        card["sketch"] + "; " + card["left out"],
    )
    exact, cold, warm, read, notes = [], [], [], [], 0
    for q in range(8):
        exact.append(seconds(gs.topk, gs.open(train.path), queries, K_BEST, rows=[q]))
        cold.append(seconds(gs.topk, gs.open(train.path), queries, K_BEST, rows=[q], mode="certified"))
        warm.append(seconds(session.topk, queries, K_BEST, rows=[q]))
        found = session.topk(queries, K_BEST, rows=[q])
        read.append(found.search.rows_read)
        notes += bool(found.search.note)
    recall = session.recall()
    approx = [seconds(session.topk, queries, K_BEST, rows=[q], mode="approx") for q in range(8)]
    mid = [statistics.median(values) for values in (exact, cold, warm, approx)]
    detail = f"scan={mid[0]:.3f}s cold={mid[1]:.3f}s warm={mid[2]:.3f}s"
    detail += f" rows read={statistics.median(read):.0f} fell back={notes}/8"
    row("certified, one cold query against the exact scan", mid[0] / mid[1], "times", detail)
    row("certified, one warm query against the exact scan", mid[0] / mid[2], "times", detail)
    row("approx, one warm query against the exact scan", mid[0] / mid[3], "times", f"approx={mid[3]:.3f}s")
    row("approx, recall@10 on held-out rows", recall, "of 1", "100 candidates")


def bench_identical(train: FeatureStore, queries: FeatureStore, row: Callable[..., None]) -> None:
    # As many at a time as the index serves: of more it leaves the answer to a scan.
    session, exact = gs.Session(train), gs.topk(train, queries, K_BEST)
    parts = [session.topk(queries, K_BEST, rows=rows) for rows in np.array_split(np.arange(len(queries)), 20)]
    indices, similarity = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("indices", "similarity")
    )
    same = (indices == exact.indices).all(1) & (similarity == exact.similarity).all(1)
    detail = f"rows read={sum(part.search.rows_read for part in parts)}, {len(parts[0].rows)} queries at a time"
    detail += "".join(f"; {note}" for note in sorted({part.search.note for part in parts} - {""}))
    row("certified answers identical to the exact scan", int(same.sum()), f"of {len(queries)}", detail)
    approx = session.topk(queries, K_BEST, mode="approx")
    hits = np.mean([np.isin(a, b).mean() for a, b in zip(exact.indices, approx.indices, strict=True)])
    row("approx, recall@10 on the queries", float(hits), "of 1", f"{len(queries)} queries, 100 candidates")


def bench_growth(folder: Path, seed: int) -> None:
    """Seconds of the scan and of a certified query as one of n, m, k and K grows."""
    base = {"n": 4000, "m": 64, "k": 10, "K": 1024}
    sweeps = {"n": [1000, 2000, 4000, 8000], "m": [1, 8, 64, 256], "k": [1, 10, 100, 1000], "K": [256, 1024, 4096]}
    rows = []
    for name, values in sweeps.items():
        for value in values:
            now = {**base, name: value}
            train = write_structured(folder / f"n{now['n']}K{now['K']}", now["n"], 10, now["K"], seed=seed, rank=100)
            queries = write_structured(
                folder / f"m{now['m']}K{now['K']}", now["m"], 10, now["K"], seed=seed + 1, rank=100
            )
            session = gs.Session(train)
            scan = statistics.median(seconds(gs.topk, train, queries, now["k"]) for _ in range(3))
            index = statistics.median(seconds(session.topk, queries, now["k"]) for _ in range(3))
            rows.append({"grows": name, **now, "scan_s": round(scan, 4), "certified_s": round(index, 4)})
    append_rows("topk_growth", rows, seed)
    plot_growth(rows, list(sweeps))


def plot_growth(rows: list[dict[str, Any]], names: list[str]) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    meaning = {"n": "training rows", "m": "queries", "k": "neighbours", "K": "projected dimension"}
    figure, axes = plt.subplots(1, len(names), figsize=(13, 3.4), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        mine = [row for row in rows if row["grows"] == name]
        values = [row[name] for row in mine]
        for column, label in (("scan_s", "exact scan"), ("certified_s", "certified, through the index")):
            axis.plot(values, [row[column] for row in mine], "o-", label=label)
        fixed = ", ".join(f"{other} = {mine[0][other]}" for other in names if other != name)
        axis.set(xscale="log", yscale="log", xlabel=f"{name}, {meaning[name]}")
        axis.set_title(f"c = 10, {fixed}", fontsize=9)
        axis.set_xticks(values, [f"{value:,}" for value in values])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds for all queries")
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(RESULTS / "topk_growth.png", dpi=120)


def begin_again(level: str) -> None:
    """The same command as on another processor: libraries ask for their level once, as they are loaded."""
    levels = runpy.run_path(str(Path(__file__).parents[1] / ".ci" / "levels.py"))["LEVELS"]
    faiss = {"FAISS_SIMD_LEVEL": level.upper(), "FAISS_OPT_LEVEL": level}
    environment = {**os.environ, **levels[level], **faiss, _LEVEL: level}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where stores are made; they stay there")
    parser.add_argument("--parts", nargs="*", default=["scan", "memory", "index", "identical", "growth"])
    parser.add_argument("--stores", nargs=2, type=Path, metavar=("TRAIN", "QUERIES"), help="instead of made ones")
    parser.add_argument("--data", default="structured", help="what the features are, for the record")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--proj-dim", type=int, default=10_240)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--level", choices=["avx2"], help="as on a processor of this level; default this one")
    options = parser.parse_args()
    if options.level and os.environ.get(_LEVEL) != options.level:
        begin_again(options.level)
    folder, K, seed = options.directory, options.proj_dim, options.seed
    folder.mkdir(parents=True, exist_ok=True)
    if options.stores:
        train, queries = (gs.open(path) for path in options.stores)
        many = queries
    else:
        train = write_structured(folder / f"train{options.rows}K{K}", options.rows, 10, K, seed=seed)
        queries = write_structured(folder / f"test200K{K}", 200, 10, K, seed=seed + 1)
        if "identical" in options.parts:
            many = write_structured(folder / f"test1000K{K}", 1000, 10, K, seed=seed + 2)

    def row(measure: str, value: float, unit: str, detail: str) -> None:
        n, c, K = train.shape
        sizes = {"n": n, "c": c, "K": K, "m": len(queries), "k": K_BEST}
        record = {
            "measure": measure,
            "value": round(value, 5),
            "unit": unit,
            "data": options.data,
            **sizes,
            "detail": detail,
        }
        append_rows("topk", [record], seed)

    if "scan" in options.parts:
        bench_scan(train, queries, options.repeats, row)
    if "memory" in options.parts:
        for memory in ("1GB", "300MB"):
            found = peak_memory(train.path, queries.path, memory)
            row(
                f"peak memory of a scan with --memory {memory}",
                found["peak"],
                "MB",
                f"{found['before']:.0f} MB before it",
            )
    if "index" in options.parts:
        bench_index(train, queries, options.repeats, row)
    if "identical" in options.parts:
        bench_identical(train, many, row)
    if "growth" in options.parts:
        bench_growth(folder / "growth", seed)
        shutil.rmtree(folder / "growth")


if __name__ == "__main__":
    main()
