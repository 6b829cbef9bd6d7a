"""The fused CUDA projection on one GPU: checks it, times it, prints a short table; ten minutes at most.

    PYTHONPATH=. python benchmarks/bench_cuda.py [--out FOLDER] [--stages compile checks speed ends sanitizer]

Needs torch, h5py, cuda-core and pytest; no installation of gradstore. Every stage is a process of its own with a time
limit, so that one that hangs costs its own time only. Speeds are medians of CUDA-event times, 2 * rows * P * K counted
as flops; rivals take turns in one process. The ceiling (a dense bf16 product) and the rival (a bf16 slab of P written
by the same generator, then cuBLAS) are measured in the same run. Whole runs (`ends`) featurize a reduced number of
examples and are extrapolated in proportion, without the time to compile and set up. Rows go to FOLDER/cuda.csv.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from setting import setting

import gradstore as gs
from gradstore.projection import cuda
from gradstore.projection.cuda import source
from gradstore.projection.cuda.geometry import Variant, variant_for
from gradstore.projection.entries import Entries

ROOT = Path(__file__).parent.parent
LIMITS = {"compile": 120, "checks": 150, "speed": 150, "ends": 170, "sanitizer": 150}  # seconds
BY_DEFAULT = ("compile", "checks", "speed", "ends")
K, P = 10240, 11_173_962
SEED = 0
SLAB = 32768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--stages", nargs="+", choices=LIMITS, default=BY_DEFAULT)
    parser.add_argument("--stage", choices=LIMITS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_cuda: this machine has no CUDA device")
    if options.stage:
        STAGES[options.stage](Recorder(options.out / "cuda.csv"))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = [(stage, *run_stage(stage, options.out)) for stage in options.stages]
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for stage, outcome, seconds in outcomes:
        print(f"{stage:10} {outcome:10} {seconds:5.0f} s")
    sys.exit(any(outcome != "ok" for _, outcome, _ in outcomes))


def run_stage(stage: str, out: Path) -> tuple[str, float]:
    print(f"\n== {stage}", flush=True)
    began = time.perf_counter()
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, __file__, "--stage", stage, "--out", str(out)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True)
    try:
        code = process.wait(LIMITS[stage])
        outcome = "ok" if code == 0 else f"failed {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that the stage started
        process.wait()
        outcome = "timed out"
    return outcome, time.perf_counter() - began


class Recorder:
    """Prints a figure and adds it to the CSV file at once, so that a later hang loses nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, measure: str, value: float, unit: str, rows: int = 0, p: int = 0, note: str = "") -> None:
        row = {"measure": measure, "rows": rows, "p": p, "K": K, "value": f"{value:.4g}", "unit": unit, "note": note}
        full = {**row, **setting(SEED)}
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(full))
            if new:
                writer.writeheader()
            writer.writerow(full)
        print(f"{measure:44} {value:10.4g} {unit:8} {rows or '':>5} x {p or '':<9} {note}", flush=True)


# ---- compile -------------------------------------------------------------------------------------------------------


def compile_variant(variant: Variant, architecture: str) -> float:
    """Seconds to have the code of a variant in the cache."""
    began = time.perf_counter()
    source.cubin(variant, architecture)
    return time.perf_counter() - began


def compile_all(record: Recorder) -> None:
    """Fill the cache with every variant that the other stages use, in parallel: NVRTC needs no GPU."""
    device = cuda.device(0)
    kinds = [(kind, precision) for kind in ("rademacher", "gaussian") for precision in cuda.PRECISIONS]
    rows = (1, 640, 650, 64, 160, 32)
    wanted = {variant_for(*kind, n, hopper) for kind in kinds for n in rows for hopper in {device.hopper, False}}
    first = variant_for("rademacher", "fast", 640, device.hopper)
    record("compile one variant", compile_variant(first, device.architecture), "s")
    began = time.perf_counter()
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_variant, wanted, [device.architecture] * len(wanted)))
    record(f"compile {len(wanted)} variants", time.perf_counter() - began, "s", note=f"NVRTC {source.nvrtc_version()}")


# ---- checks --------------------------------------------------------------------------------------------------------


def checks(record: Recorder) -> None:
    """The GPU tests: parity, odd shapes, p beyond 2^31, determinism over 50 runs, neighbours, streams, memory."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--maxfail=12", "-W", "default"]
    files = ["tests/test_cuda_gpu.py", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=line"]
    began = time.perf_counter()
    code = subprocess.run([*command, *files], cwd=ROOT).returncode
    record("GPU tests", code, "exit", note=f"{time.perf_counter() - began:.0f} s")
    sys.exit(code)


# ---- speed ---------------------------------------------------------------------------------------------------------


def timed(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each rival; they take turns."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def random_block(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows begin at multiples of 128 bytes, as cuBLAS likes them."""
    block = torch.empty(rows, -(-columns // 64) * 64, dtype=dtype, device="cuda")
    for row in block:
        row.normal_()
    return block[:, :columns]


def fused(kind: str, precision: str, block: torch.Tensor, *, hopper: bool | None = None) -> Callable[[], None]:
    device, entries = cuda.device(0), Entries(kind, SEED, 0)
    out = torch.zeros(len(block), K, device="cuda")

    def work() -> None:
        native = device.hopper
        device.hopper = native if hopper is None else hopper
        cuda.accumulate(device, entries, out, block, 0, 0, precision)
        device.hopper = native

    return work


def packing_only(block: torch.Tensor) -> Callable[[], None]:
    """The launches of `fast` without their products."""

    class Packs:
        processors, hopper, pack = cuda.device(0).processors, cuda.device(0).hopper, cuda.device(0).pack

        def multiply(self, *_: object) -> None:
            pass

    out = torch.zeros(len(block), K, device="cuda")
    return lambda: cuda.accumulate(Packs(), Entries("rademacher", SEED, 0), out, block, 0, 0, "fast")


def speed(record: Recorder) -> None:
    """All target rows, with the ceiling and the rival in the same process."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    seconds = timed({"ceiling": lambda: a @ b}, 20)["ceiling"]
    record("dense bf16 product 8192^3 (ceiling)", 2 * 8192**3 / seconds / 1e12, "TFLOP/s")
    main_rows(record)
    for kind, precision, rows, columns in (
        ("rademacher", "fast", 640, P),
        ("rademacher", "exact", 640, P // 4),
        ("rademacher", "fast", 32, P),
        ("rademacher", "fast", 160, P // 2),
        ("rademacher", "fast", 640, 65536),
        ("gaussian", "fast", 640, P // 8),
        ("gaussian", "exact", 640, P // 32),
    ):
        block = random_block(rows, columns)
        found = timed({"it": fused(kind, precision, block)}, 5)["it"]
        record(
            f"{kind} {precision}, float32 gradients", 2 * rows * columns * K / found / 1e12, "TFLOP/s", rows, columns
        )
        del block


def main_rows(record: Recorder) -> None:
    """640 rows of a ResNet18: fused in both forms, packing alone, and the rival."""
    from slab import SlabProduct

    block = random_block(640, P, torch.bfloat16)
    rival, entries = SlabProduct(cuda.device(0), K, SLAB), Entries("rademacher", SEED, 0)
    out = torch.zeros(640, K, device="cuda")
    rival.generate(entries, 1000)
    k, p = torch.arange(K)[::97], torch.arange(128_000, 128_000 + SLAB, 991)
    written = rival.slab[k][:, p - 128_000].cpu().double()
    assert torch.equal(written, entries.at(k[:, None], p)), "the rival's P is wrong"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work = fused("rademacher", "fast", block)
    work()
    extra = torch.cuda.max_memory_allocated() - before - 640 * K * 4
    record("memory beside gradients and features", extra / 1e6, "MB", 640, P)
    works = {
        "rademacher fast": work,
        "slab of P, then cuBLAS": lambda: rival.accumulate(entries, out, block),
        "rademacher fast, mma": fused("rademacher", "fast", block, hopper=False),
        "packing alone": packing_only(block),
        "the rival's generator alone": lambda: [rival.generate(entries, b) for b in range(0, P // 128, SLAB // 128)],
        "the rival's product alone": lambda: [
            torch.mm(block[:, :SLAB], rival.slab.T, out_dtype=torch.float32) for _ in range(P // SLAB)
        ],
    }
    found = timed(works, 5)
    for name, seconds in found.items():
        record(name, 2 * 640 * P * K / seconds / 1e12, "TFLOP/s", 640, P, f"{1e3 * seconds:.1f} ms, bf16 gradients")
    record("fused / rival", found["slab of P, then cuBLAS"] / found["rademacher fast"], "x", 640, P)


# ---- whole runs ----------------------------------------------------------------------------------------------------


def featurized(model: torch.nn.Module, inputs: torch.Tensor, classes: int, memory: str) -> float:
    """Seconds that featurize spends on its rows."""
    data = torch.utils.data.TensorDataset(inputs, torch.randint(0, classes, (len(inputs),)))
    last: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        gs.featurize(
            gs.Project(model=model, splits={"train": data}),
            split="train",
            out=Path(folder) / "store",
            proj_dim=K,
            device="cuda",
            memory=memory,
            progress=lambda state: last.update(seconds=state.seconds),
        )
    return last["seconds"]


def ends(record: Recorder) -> None:
    """Featurize a ResNet18 on CIFAR-shaped data and a BERT-base on tokens, and what the whole would take."""
    from bench_jacobians import resnet18
    from bert import LENGTH, VOCABULARY, Bert

    torch.manual_seed(SEED)
    cases = (
        ("ResNet18, 10 classes", resnet18(), lambda n: torch.randn(n, 3, 32, 32), 10, 60000, 512),
        ("BERT-base, 2 classes", Bert(), lambda n: torch.randint(0, VOCABULARY, (n, LENGTH)), 2, 8192, 320),
    )
    for name, model, make, classes, whole, n in cases:
        p = sum(parameter.numel() for parameter in model.parameters())
        featurized(model, make(n // 8), classes, "60GB")  # compiles, warms up
        seconds = featurized(model, make(n), classes, "60GB")
        record(f"featurize {name}", n / seconds, "rows/s", n, p, f"{seconds:.1f} s for {n}")
        record(f"extrapolated to {whole} rows", whole * seconds / n / 60, "min", whole, p)


# ---- sanitizer -----------------------------------------------------------------------------------------------------


def sanitizer(record: Recorder) -> None:
    """A small product of each variant under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    code = (
        "import torch\n"
        "from gradstore.projection import Projection\n"
        "for kind in ('rademacher', 'gaussian'):\n"
        "    for precision in ('fast', 'exact'):\n"
        "        Projection(kind, dim=300, precision=precision).project(torch.ones(33, 20000, device='cuda'), 128)\n"
        "torch.cuda.synchronize()\n"
    )
    failed = 0
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", code]
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=LIMITS["sanitizer"] // 2 - 3)
        summary = [
            line for line in (outcome.stdout + outcome.stderr).splitlines() if "SUMMARY" in line or "Error" in line
        ]
        record(check, outcome.returncode, "exit", note="; ".join(summary[-3:])[:150])
        failed += outcome.returncode != 0
    sys.exit(failed)


STAGES = {"compile": compile_all, "checks": checks, "speed": speed, "ends": ends, "sanitizer": sanitizer}

if __name__ == "__main__":
    main()
