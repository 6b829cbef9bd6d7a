"""What the stages of `bench_cuda.py` measure with: figures that are kept at once, times that rivals take in turns."""

from __future__ import annotations

import csv
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from setting import setting

from gradstore.projection.device_paths import PATHS
from gradstore.projection.entries import Entries

ROOT = Path(__file__).parent.parent
K, P = 10240, 11_173_962  # of a ResNet18
SEED = 0
HANGS_AFTER = 6.0


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


def finish(what: str, seconds: float = HANGS_AFTER) -> None:
    """Poll the device; a hang is said and ends the stage, since nothing later in this process could run."""
    event, end = torch.cuda.current_stream().record_event(), time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > end:
            print(f"HANGS: {what}", flush=True)
            os._exit(7)
        time.sleep(0.0005)


def timed(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each rival; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for name, work in works.items():
        work()
        finish(name, 30)
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


def product_of(name: str, kind: str, precision: str, block: torch.Tensor) -> Callable[[], None]:
    path = next(path for path in PATHS if path.name == name)
    entries, out = Entries(kind, SEED, 0), torch.zeros(len(block), K, device="cuda")
    product = path.product(0)
    return lambda: product(entries, out, block, 0, 0, precision)


def fastest() -> str:
    return next(path.name for path in PATHS if path.suits(0, "rademacher") and not path.missing(0))
