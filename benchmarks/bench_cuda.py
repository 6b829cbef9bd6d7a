"""The projection on one GPU: what is right, what is wrong and where, how fast; by stages, most valuable first.

    PYTHONPATH=. python benchmarks/bench_cuda.py --out FOLDER [--stages facts smoke-wgmma ...] [--seconds 270]
    PYTHONPATH=. python benchmarks/bench_cuda.py --prebuild FOLDER     # needs no GPU: compiled kernels to carry along

Needs torch, h5py and cuda-bindings; no installation of gradstore. Every stage is a process with its own limit and none
depends on an earlier one, so one that hangs costs its own time only; every line is in FOLDER/log.txt as soon as it is
printed, every figure in FOLDER/cuda.csv. By default the first run: facts, smoke, race, repeat. The second, after what
it found is mended, is `--stages tests ends profile pieces sjlt memory sanitizer`.

Speeds are medians of CUDA-event times, 2 * rows * P * K counted as flops; rivals take turns in one process. The ceiling
(a dense bf16 product) and the rival (a bf16 slab of P written by the same generator, then cuBLAS) are measured in the
same process. Whole runs (`ends`) featurize some examples and are extrapolated in proportion, without the time to set
up.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMITS = {  # seconds, in the order of their value
    "facts": 40,
    "smoke-wgmma": 45,
    "smoke-mma": 45,
    "smoke-triton": 60,
    "race": 110,
    "repeat": 40,
    "tests": 240,
    "ends": 170,
    "profile": 90,
    "pieces": 30,
    "sjlt": 40,
    "memory": 40,
    "sanitizer": 240,
}
FIRST = ("facts", "smoke-wgmma", "smoke-mma", "smoke-triton", "race", "repeat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--stages", nargs="+", choices=LIMITS, default=FIRST)
    parser.add_argument("--seconds", type=float, default=270.0, help="for all stages together")
    parser.add_argument("--prebuild", type=Path, help="compile every variant into this folder, for GRADSTORE_CACHE")
    options = parser.parse_args()
    if options.prebuild:
        prebuild(options.prebuild)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    outcomes = []
    for stage in options.stages:
        limit = min(LIMITS[stage], end - time.monotonic())
        outcomes.append((stage, *(run_stage(stage, options.out, limit) if limit > 8 else ("no time", 0.0))))
    print()
    for stage, outcome, seconds in outcomes:
        print(f"{stage:14} {outcome:10} {seconds:5.0f} s")
    sys.exit(any(outcome != "ok" for _, outcome, _ in outcomes))


def run_stage(stage: str, out: Path, limit: float) -> tuple[str, float]:
    """Run a stage in a process of its own: how it ended, and after how long."""
    began = time.monotonic()
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-u", str(ROOT / "benchmarks" / "cuda_stages.py"), stage, str(out)]
    environment = {**os.environ, "PYTHONPATH": path}
    with (out / "log.txt").open("ab") as log:
        log.write(f"\n== {stage}\n".encode())
        print(f"\n== {stage}", flush=True)
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )

        def copy() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                print(line.decode(errors="replace").rstrip("\n")[:600], flush=True)

        reader = threading.Thread(target=copy, daemon=True)
        reader.start()
        try:
            code = process.wait(limit)
            outcome = "ok" if code == 0 else f"failed {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that the stage started
            process.wait()
            outcome = "timed out"
        reader.join(2)
    return outcome, time.monotonic() - began


def prebuild(folder: Path) -> None:
    """Compile every variant of the CUDA source for Hopper, for a machine whose time is dear."""
    os.environ["GRADSTORE_CACHE"] = str(folder)
    from gradstore.projection.cuda import PRECISIONS, cuda_source, row_tiles
    from gradstore.projection.cuda.geometry import Variant
    from gradstore.projection.cuda.sparse_geometry import SumsVariant
    from gradstore.projection.kinds import KINDS, kind_of

    variants = [
        Variant(kind, precision, rows, hopper)
        for kind in KINDS
        if kind_of(kind).fused is not None
        for precision in PRECISIONS
        for rows in row_tiles(kind, precision)
        for hopper in (True, False)
    ]
    variants += [SumsVariant(precision, 32) for precision in PRECISIONS]
    for variant in variants:
        cuda_source.cubin(variant, "sm_90a")
    print(f"{len(variants)} variants by NVRTC {cuda_source.nvrtc_version()} in {folder}")


if __name__ == "__main__":
    main()
