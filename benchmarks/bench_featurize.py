"""Featurize end to end on a CPU by each kind of projection: rows a second, shares of the time, and peak memory.

    python benchmarks/bench_featurize.py                     # rows to benchmarks/results/featurize.csv
    python benchmarks/bench_featurize.py --cases digits:640 --projections sjlt

Each case runs in a process of its own, whose peak resident memory is the figure: interpreter, torch, model, data and
all. `baseline_MB` is that of the same process just before featurize begins. Time is split by featurize's own stopwatch.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from bench_jacobians import digits_cnn, resnet18
from bert import VOCABULARY, Bert
from setting import append_rows
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradstore as gs

TOKENS = 64
AS_COMMANDS = {"THP_MEM_ALLOC_ENABLE": "1"}  # how `gradstore` has torch allocate


def small_bert() -> nn.Module:
    """As large as BERT-mini: 11 M parameters, two classes."""
    return Bert(width=256, layers=4, heads=4)


def pictures(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *shape)


def sentences(rows: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, TOKENS))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], int]] = {
    "digits": (digits_cnn, pictures(1, 8, 8), 10),
    "resnet18": (resnet18, pictures(3, 32, 32), 10),
    "bert": (small_bert, sentences, 2),
}


def peak_megabytes() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def run(case: str, projection: str, K: int, memory: str, seed: int) -> dict[str, object]:
    """Featurize one case and say where the time went."""
    name, n = case.split(":")
    build, inputs, classes = MODELS[name]
    torch.manual_seed(seed)
    model, rows = build().eval(), int(n)
    data = TensorDataset(inputs(rows), torch.randint(0, classes, (rows,)))
    project = gs.Project(model=model, splits={"train": data})
    baseline, last = peak_megabytes(), {}
    with tempfile.TemporaryDirectory() as folder:
        gs.featurize(
            project,
            split="train",
            out=Path(folder) / "store",
            proj_dim=K,
            projection=projection,
            memory=memory,
            progress=lambda state: last.update(busy=state.busy, seconds=state.seconds),
        )
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "model": name,
        "rows": rows,
        "classes": classes,
        "projection": projection,
        "parameters": parameters,
        "K": K,
        "memory": memory,
        "rows_per_second": round(rows / last["seconds"], 3),
        "projection_share": round(last["busy"]["projection"] / last["seconds"], 3),
        "jacobian_share": round(last["busy"]["jacobians"] / last["seconds"], 3),
        "check_share": round(last["busy"]["checks"] / last["seconds"], 3),
        "writing_share": round(last["busy"]["writing"] / last["seconds"], 3),
        "baseline_MB": baseline,
        "peak_MB": peak_megabytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["digits:1280", "resnet18:16", "bert:64"], metavar="MODEL:ROWS")
    parser.add_argument("--projections", nargs="*", default=["rademacher", "sjlt"])
    parser.add_argument("--proj-dim", type=int, default=10240)
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        (projection,) = options.projections
        print(json.dumps(run(options.child, projection, options.proj_dim, options.memory, options.seed)))
        return
    for case, projection in product(options.cases, options.projections):
        words = [sys.executable, __file__, "--child", case, "--projections", projection]
        words += ["--proj-dim", str(options.proj_dim)]
        words += ["--memory", options.memory, "--seed", str(options.seed)]
        done = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, **AS_COMMANDS})
        append_rows("featurize", [json.loads(done.stdout)], options.seed)


if __name__ == "__main__":
    main()
