"""What looking at every row a second time costs featurize: the same run with and without, alternating, in one process.

    python benchmarks/bench_second_look.py                       # rows to benchmarks/results/second_look.csv
    python benchmarks/bench_second_look.py --cases digits:640:1024 --pairs 6
    python benchmarks/bench_second_look.py --device cuda --cases resnet18:512:10240
    python benchmarks/bench_second_look.py --audits 200          # how often a sound gradient differs beyond rounding

Without, `RowIndependence` is switched off, and everything else is as it is. A ratio is of medians. Audits are of rows
of the first case, drawn at random, each alone and in its group; rows go to benchmarks/results/gradient_audits.csv.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bench_jacobians import digits_cnn, resnet18
from setting import append_rows
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.featurization.gradient_audit import GradientAudit
from gradstore.featurization.plan import Plan
from gradstore.featurization.row_independence import RowIndependence
from gradstore.featurization.settings import Settings
from gradstore.jacobians import steadiness

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
    project, _ = sound(name, int(rows), seed)
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


def audit(case: str, audits: int, seed: int, device: str) -> dict[str, object]:
    """How many gradients of a sound model differ alone and in a batch, and what accounting for that takes."""
    name, rows, _ = case.split(":")
    plan = Plan(*sound(name, int(rows), seed), Settings(proj_dim=128), device, "8GB")
    group, draw, passes = plan.manifest.group, np.random.default_rng(seed), [0]
    through = steadiness._moved

    def counted(*arguments: Any) -> Iterator[Any]:
        for found in through(*arguments):
            passes[-1] += 1
            yield found

    differ: list[float] = []
    refused, longest = 0, 0.0
    steadiness._moved = counted
    try:
        for _ in range(audits):
            first = group * int(draw.integers(int(rows) // group))
            inputs = plan.examples.read(range(first, first + group))[0].to(plan.device)
            found = GradientAudit(plan, [inputs], [range(first, first + group)], draw, plan.classes)
            for block in plan.engine(inputs):
                found.look(0, block, formed=False)
            began = time.perf_counter()
            compared = found.compare()
            if compared.moved:
                differ.append(float((compared.errors / compared.norms).max()))
                passes.append(0)
                longest = max(longest, time.perf_counter() - began)
            refused += not compared.agrees
    finally:
        steadiness._moved = through
    return {
        "model": name,
        "rows": int(rows),
        "group": group,
        "audits": audits,
        "differ": len(differ),
        "most": round(max(differ, default=0.0), 5),
        "refused": refused,
        "passes": max(passes),
        "longest": round(longest, 2),
    }


def sound(name: str, rows: int, seed: int) -> tuple[gs.Project, str]:
    """A model with random weights on random inputs, and the name of its split."""
    build, shape = MODELS[name]
    torch.manual_seed(seed)
    data = TensorDataset(torch.randn(rows, *shape), torch.randint(0, 10, (rows,)))
    return gs.Project(model=build(), splits={"train": data}), "train"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["digits:640:10240"], metavar="MODEL:ROWS:K")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--audits", type=int)
    options = parser.parse_args()
    if options.audits:
        found = audit(options.cases[0], options.audits, options.seed, options.device)
        append_rows("gradient_audits", [found], options.seed)
        return
    rows = [measure(case, options.pairs, options.seed, options.device) for case in options.cases]
    append_rows("second_look", rows, options.seed)


if __name__ == "__main__":
    main()
