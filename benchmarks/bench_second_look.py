"""What looking at every row a second time costs featurize: the same run with and without, alternating, in one process.

    python benchmarks/bench_second_look.py                       # rows to benchmarks/results/second_look.csv
    python benchmarks/bench_second_look.py --cases digits:640:1024 --pairs 6
    python benchmarks/bench_second_look.py --device cuda --cases resnet18:512:10240

Without, `RowIndependence` is switched off, and everything else is as it is. A ratio is of medians.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from bench_jacobians import digits_cnn, resnet18
from setting import append_rows
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.featurization.row_independence import RowIndependence

MODELS = {"digits": (digits_cnn, (1, 8, 8)), "resnet18": (resnet18, (3, 32, 32))}
LOOK = {name: getattr(RowIndependence, name) for name in ("look", "gradient_audit")}


def seconds(project: gs.Project, K: int, device: str, *, looking: bool) -> tuple[float, dict[str, int]]:
    """Seconds of a run, and how many rows it looked at."""
    for name, method in LOOK.items():
        setattr(RowIndependence, name, method if looking else lambda self, *_: None)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        gs.featurize(project, split="train", out=Path(folder) / "store", proj_dim=K, device=device)
        took = time.perf_counter() - began
        log = (Path(folder) / "store/run.jsonl").read_text().splitlines()
        return took, json.loads(log[-1])["looked"]


def measure(case: str, pairs: int, seed: int, device: str) -> dict[str, object]:
    """One case: model:rows:K."""
    name, rows, K = case.split(":")
    build, shape = MODELS[name]
    torch.manual_seed(seed)
    data = TensorDataset(torch.randn(int(rows), *shape), torch.randint(0, 10, (int(rows),)))
    project = gs.Project(model=build(), splits={"train": data})
    seconds(project, int(K), device, looking=True)
    found: dict[bool, list[float]] = {True: [], False: []}
    looked: dict[str, int] = {}
    for pair in range(pairs):
        for looking in (True, False) if pair % 2 else (False, True):
            took, now = seconds(project, int(K), device, looking=looking)
            found[looking].append(took)
            looked = now if looking else looked
    ratios = [a / b for a, b in zip(found[True], found[False], strict=True)]
    return {
        "model": name,
        "rows": int(rows),
        "K": int(K),
        "pairs": pairs,
        "ratio": round(median(found[True]) / median(found[False]), 4),
        "least": round(min(ratios), 4),
        "most": round(max(ratios), 4),
        **looked,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["digits:640:10240"], metavar="MODEL:ROWS:K")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows = [measure(case, options.pairs, options.seed, options.device) for case in options.cases]
    append_rows("second_look", rows, options.seed)


if __name__ == "__main__":
    main()
