"""Projection on the CPU: speed against a matrix product and TRAK's BasicProjector, error, growth with rows, p and K.

    python benchmarks/bench_projection.py [--repeats 5] [--threads N] [--quick] [--sparse]

adds rows to results/projection.csv and writes results/projection.png. Speed is work done per second, 2 * rows * p * K
operations as a matrix product would need. Every comparison interleaves its rivals in one run and takes medians of
wall time, so that a disturbance of the machine meets all of them. The rivals:

- ``matmul``: ``torch.matmul`` in float32 with the sign matrix already in memory. A matrix of 10240 x 1 M would take
  42 GB; its first 16384 columns (671 MB, far more than any cache) stand for the rest, as the work is linear in p.
- ``basic``: the algorithm of TRAK's BasicProjector: regenerate 200 rows of P at a time (normals or coin tosses of
  torch's CPU generator) and multiply in float32. A slice of p again stands for the rest.

``--sparse`` compares the sparse projection alone, with the dense one, with ``basic``, and with

- ``index_add``: the same sums by ``torch.index_add``, whose places and signs are made beforehand and kept;
- ``dattri``, where it is installed (``pip install --no-deps dattri``): its ``random_project`` with signs. It has no
  SJLT on a CPU: version 0.3.0 refuses it there, and the package ``sjlt`` 0.1.7, which it would take, is CUDA alone.

Speed is counted as if it were dense.

results/projection.md explains what limits the speed.

Needs matplotlib: `pip install ".[plots]"`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from gradstore.native import library
from gradstore.projection import Projection

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
K = 10240
SLICE = 16384
BLOCK = 1024  # rows of the sparse P with one non-zero a column
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="1/16 of the parameters")
    parser.add_argument("--sparse", action="store_true", help="the sparse projection against the dense one, alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    p = (1 << 20) // (16 if options.quick else 1)
    whole = not options.sparse
    rows = [*compare(p, options.repeats), *errors(), *growth(p)] if whole else compare_sparse(p, options.repeats)
    environment = environment_columns()
    path = RESULTS / "projection.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, ["measure", "kind", "rows", "p", "K", "value", "unit", *environment])
        if new:
            writer.writeheader()
        writer.writerows(row | environment for row in rows)
    if whole:
        plot(rows)


def environment_columns() -> dict[str, object]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": "cpu",
        "cpu": cpu or platform.processor(),
        "simd": library.level() or "reference",
        "threads": torch.get_num_threads(),
        "seed": SEED,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE", ""),
        "load_average": round(os.getloadavg()[0], 1),
    }


def record(measure: str, kind: str, rows: int, p: int, k: int, value: float, unit: str) -> dict[str, object]:
    row = {"measure": measure, "kind": kind, "rows": rows, "p": p, "K": k, "value": f"{value:.4g}", "unit": unit}
    print(*row.values(), flush=True)
    return row


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def speeds(rivals: dict[str, tuple[Callable[[], object], float]], repeats: int) -> dict[str, float]:
    """Median operations a second of each rival; one round runs all of them in turn."""
    for work, _ in rivals.values():
        work()
    times = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, (work, _) in rivals.items():
            times[name].append(seconds(work))
    return {name: operations / statistics.median(times[name]) for name, (_, operations) in rivals.items()}


def compare(p: int, repeats: int) -> list[dict[str, object]]:
    results = []
    for kind in ("rademacher", "gaussian"):
        for rows in (64, 640):
            size = p if rows == 64 else p // 8  # the work is linear in p, as the growth rows show
            found = speeds(rivals(kind, rows, size), repeats)
            for name, speed in found.items():
                results.append(record(f"speed of {name}", kind, rows, size, K, speed / 1e9, "GFLOP/s"))
            for name in set(found) - {"gradstore"}:
                results.append(
                    record(f"gradstore / {name}", kind, rows, size, K, found["gradstore"] / found[name], "x")
                )
    return results


def compare_sparse(p: int, repeats: int) -> list[dict[str, object]]:
    """One eighth of the gradients stands for all in the dense product, and a part of these in `basic`."""
    results = []
    for rows in (64, 640):
        found = {"sjlt": rivals("sjlt", rows, p)["gradstore"]}
        dense = rivals("rademacher", rows, p // 8)
        found |= {"rademacher": dense["gradstore"], "basic": dense["basic"], "index_add": index_add(rows, p // 8)}
        found |= dattri(rows)
        speed = speeds(found, repeats)
        for name, value in speed.items():
            results.append(record(f"speed of {name} beside sjlt", "sjlt", rows, p, K, value / 1e9, "GFLOP/s"))
        for name in set(found) - {"sjlt"}:
            results.append(record(f"sjlt / {name}", "sjlt", rows, p, K, speed["sjlt"] / speed[name], "x"))
    return results


def rivals(kind: str, rows: int, p: int) -> dict[str, tuple[Callable[[], object], float]]:
    block, part = torch.randn(rows, p), torch.randn(rows, SLICE)
    projection, out = Projection(kind, K, SEED), torch.zeros(rows, K)
    found = {
        "gradstore": (lambda: projection.accumulate(out, block, 0), 2.0 * rows * p * K),
        "basic": (lambda: basic_projector(kind, part[:, : SLICE // 8]), 2.0 * rows * (SLICE // 8) * K),
    }
    if kind == "rademacher":
        signs = torch.randint(0, 2, (K, SLICE), dtype=torch.int8).float().mul_(2).sub_(1)
        found["matmul"] = (lambda: torch.matmul(part, signs.T), 2.0 * rows * SLICE * K)
    return found


def index_add(rows: int, p: int) -> tuple[Callable[[], object], float]:
    block, out = torch.randn(rows, p), torch.zeros(rows, K)
    places = torch.randint(0, BLOCK, (K // BLOCK, p))
    signs = torch.randint(0, 2, (K // BLOCK, p)).float().mul_(2).sub_(1)

    def work() -> None:
        for j, sums in enumerate(out.split(BLOCK, dim=1)):
            sums.index_add_(1, places[j], block * signs[j])

    return work, 2.0 * rows * p * K


def dattri(rows: int) -> dict[str, tuple[Callable[[], object], float]]:
    try:
        from dattri.func.projection import random_project
    except ImportError:
        return {}
    part = torch.randn(rows, SLICE // 8)
    project = random_project(part, rows, K, proj_max_batch_size=8, proj_seed=SEED, proj_type="rademacher")
    return {"dattri": (lambda: project(part), 2.0 * rows * part.shape[1] * K)}


def basic_projector(kind: str, gradients: torch.Tensor, columns: int = 200) -> torch.Tensor:
    """Regenerate ``columns`` rows of P at a time, then a float32 product, in one pass over all of K."""
    out = torch.zeros(gradients.shape[0], K)
    generator = torch.Generator()
    matrix = torch.empty(gradients.shape[1], columns)
    for begin in range(0, K, columns):
        generator.manual_seed(SEED + int(1e4) * (begin // columns))
        if kind == "gaussian":
            matrix.normal_(generator=generator)
        else:
            torch.bernoulli(torch.full_like(matrix, 0.5), generator=generator, out=matrix)
            matrix.mul_(2).sub_(1)
        out[:, begin : begin + columns] = (gradients @ matrix)[:, : K - begin]
    return out


def errors() -> list[dict[str, object]]:
    """Relative error of features against the float64 product with the entries of P, over 1 M parameters.

    Of normal gradients, and of uneven ones, whose magnitudes have a normal logarithm of standard deviation 3.
    """
    results = []
    for kind, uneven in (("rademacher", False), ("gaussian", False), ("gaussian", True)):
        p, k = 1 << 20, 16
        block, projection = torch.randn(4, p), Projection(kind, k, SEED)
        if uneven:
            block *= torch.exp(3 * torch.randn(4, p))
        exact = torch.zeros(4, k, dtype=torch.float64)
        for begin in range(0, p, 1 << 16):
            entries = projection.entries(torch.arange(k)[:, None], torch.arange(begin, begin + (1 << 16)))
            exact += block[:, begin : begin + (1 << 16)].double() @ entries.T
        error = (projection.project(block).double() / projection.scale - exact).norm() / exact.norm()
        results.append(record("relative error" + ", uneven" * uneven, kind, 4, p, k, float(error), ""))
    return results


def growth(p: int) -> list[dict[str, object]]:
    """Seconds as one of rows, p and K grows from a point in the middle."""
    middle = {"rows": 64, "p": p // 8, "K": 2048}
    ranges = {
        "rows": (1, 4, 16, 64, 256, 640),
        "p": tuple(p // d for d in (256, 64, 16, 4, 1)),
        "K": (64, 256, 1024, 4096, K),
    }
    results = []
    for kind in ("rademacher", "gaussian"):
        for axis, values in ranges.items():
            for value in values:
                size = middle | {axis: value}
                block, projection = torch.randn(size["rows"], size["p"]), Projection(kind, size["K"], SEED)
                out = torch.zeros(size["rows"], size["K"])
                taken = statistics.median(seconds(lambda: projection.accumulate(out, block, 0)) for _ in range(3))  # noqa: B023
                results.append(record(f"growth with {axis}", kind, size["rows"], size["p"], size["K"], taken, "s"))
    return results


def plot(rows: list[dict[str, object]]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("rows", "p", "K"), strict=True):
        for kind in ("rademacher", "gaussian"):
            chosen = [row for row in rows if row["measure"] == f"growth with {name}" and row["kind"] == kind]
            axis.loglog([row[name] for row in chosen], [float(row["value"]) for row in chosen], "o-", label=kind)
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    fixed = next(row for row in rows if row["measure"] == "growth with rows")
    axes[0].set_ylabel("seconds")
    axes[0].set_title(f"p = {fixed['p']}, K = {fixed['K']}", fontsize=9)
    axes[1].set_title(f"64 rows, K = {fixed['K']}", fontsize=9)
    axes[2].set_title(f"64 rows, p = {fixed['p']}", fontsize=9)
    axes[0].legend()
    figure.savefig(RESULTS / "projection.png", dpi=130)


if __name__ == "__main__":
    main()
