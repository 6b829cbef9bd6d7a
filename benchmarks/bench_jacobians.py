"""Per-example Jacobians [n, 10, P]: gradstore's streamed engine against `vmap(jacrev)` of torch.func.

    python benchmarks/bench_jacobians.py                  # rows to benchmarks/results/jacobians.csv
    python benchmarks/bench_jacobians.py --threads 1 --repeats 7
    python benchmarks/bench_jacobians.py --growth         # and results/jacobians.png: how it grows with rows and P

Both compute every value in float32. The engine's blocks are formed and dropped one by one, as featurize uses them
("streamed"), or all copied into one tensor ("collected"), for `jacrev` returns all values at once. Runs of the three
alternate; a figure is the median of a run's seconds, a ratio the median of the ratios of neighbouring runs. Each row
also says the largest relative error of a row (example, class) against `jacrev` in float64. Peak memory is that of a
fresh process that builds the engine and reads one batch's stream with its norms; `load_per_core` tells of other work.

The picture needs matplotlib: `pip install ".[plots]"`.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from gradstore.jacobians import JacobianEngine
from gradstore.model.parameters import parameter_blocks

CLASSES = 10
RESULTS = Path(__file__).parent / "results" / "jacobians.csv"


def digits_cnn(width: int = 16) -> nn.Module:
    """Three convolutions with BatchNorm and two linear layers, for 8 × 8 images; `width` channels in the first."""
    a, b, c = width, 2 * width, 4 * width
    return nn.Sequential(
        *(nn.Conv2d(1, a, 3, padding=1), nn.BatchNorm2d(a), nn.ReLU()),
        *(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(b, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(16 * c, c), nn.ReLU(), nn.Linear(c, CLASSES)),
    )


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet18 for 32 × 32 images, 11.2 M parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "digits-cnn": (digits_cnn, (1, 8, 8)),
    **{f"digits-cnn-x{times}": (partial(digits_cnn, 16 * times), (1, 8, 8)) for times in (2, 4)},
    "resnet18": (resnet18, (3, 32, 32)),
}
LABELS = {"jacrev_s": "vmap(jacrev)", "collected_s": "gradstore, collected", "streamed_s": "gradstore, streamed"}
GROWTH = {
    "rows": ["digits-cnn:4", "digits-cnn:16", "digits-cnn:64", "digits-cnn:128"],
    "P": ["digits-cnn:16", "digits-cnn-x2:16", "digits-cnn-x4:16"],
}


def build(name: str, n: int, seed: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    return make().eval(), torch.randn(n, *shape)


def streamed(engine: JacobianEngine, inputs: Tensor) -> None:
    for block in engine(inputs):
        block.dense()


def collected(engine: JacobianEngine, inputs: Tensor, columns: int) -> Tensor:
    out, done = torch.empty(len(inputs), CLASSES, columns), 0
    for block in engine(inputs):
        out[..., done : done + block.size] = block.dense()
        done += block.size
    return out


def functional(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def logits(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, (values, buffers), (x[None],))[0]

    found = vmap(jacrev(logits), in_dims=(None, 0))(parameters, inputs)
    return [values.flatten(2) for values in found.values()]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def error(name: str, seed: int) -> float:
    """Largest error of a Jacobian row over its norm, on two examples, against float64."""
    model, inputs = build(name, 2, seed)
    blocks = parameter_blocks(model)
    engine = JacobianEngine(model, blocks, example=inputs)
    ours = collected(engine, inputs, sum(block.size for block in blocks))
    reference = torch.cat(functional(model.double(), inputs.double()), -1)
    return float(((ours - reference).norm(dim=-1) / reference.norm(dim=-1)).max())


def peak_bytes(name: str, n: int, seed: int) -> int:
    """Peak memory of a fresh process that builds the engine and reads the stream of one batch with its norms."""
    command = [sys.executable, __file__, "--peak", name, str(n), "--seed", str(seed)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def report_peak(name: str, n: int, seed: int) -> None:
    model, inputs = build(name, n, seed)
    for block in JacobianEngine(model, parameter_blocks(model), example=inputs)(inputs):
        block.dense()
        block.sq_norm()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(fields["VmHWM"].split()[0]) * 1024)


def measure(name: str, n: int, repeats: int, seed: int) -> dict[str, object]:
    model, inputs = build(name, n, seed)
    engine = JacobianEngine(model, parameter_blocks(model), example=inputs)
    columns = sum(p.numel() for p in model.parameters())
    contenders = {
        "streamed": lambda: streamed(engine, inputs),
        "collected": lambda: collected(engine, inputs, columns),
        "jacrev": lambda: functional(model, inputs),
    }
    runs = [{key: seconds(work) for key, work in contenders.items()} for _ in range(repeats + 1)][1:]
    return {
        "model": name,
        "n": n,
        "classes": CLASSES,
        "parameters": columns,
        **{f"{key}_s": round(median(run[key] for run in runs), 4) for key in contenders},
        "streamed_speedup": round(median(run["jacrev"] / run["streamed"] for run in runs), 2),
        "collected_speedup": round(median(run["jacrev"] / run["collected"] for run in runs), 2),
        "error": f"{error(name, seed):.2g}",
        "peak_MB": round(peak_bytes(name, n, seed) / 1e6),
    }


def setting(threads: int, repeats: int, seed: int) -> dict[str, object]:
    about = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in about if "model name" in line), "")
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": "cpu",
        "cpu": cpu or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": threads,
        "repeats": repeats,
        "seed": seed,
        "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE", ""),
        "load_per_core": round(os.getloadavg()[0] / (os.cpu_count() or 1), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", nargs="*", default=["digits-cnn:64", "resnet18:4"], metavar="MODEL:N")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        report_peak(options.peak[0], int(options.peak[1]), options.seed)
        return
    sizes = dict.fromkeys(size for axis in GROWTH.values() for size in axis) if options.growth else options.sizes
    rows = {}
    for size in sizes:
        name, n = size.split(":")
        rows[size] = measure(name, int(n), options.repeats, options.seed) | setting(
            options.threads, options.repeats, options.seed
        )
        add_row(options.out, rows[size])
        print(", ".join(f"{key} {value}" for key, value in rows[size].items()), flush=True)
    if options.growth:
        plot(rows)


def add_row(path: Path, row: dict[str, object]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def plot(rows: dict[str, dict[str, object]]) -> None:
    """Milliseconds an example, so that what grows in proportion is level, against rows and against parameters."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8.5, 3.4), layout="constrained")
    titles = {"rows": "digits CNN, 89,770 parameters", "P": "digits CNN of growing width, 16 rows"}
    for panel, (axis, sizes) in zip(panels, GROWTH.items(), strict=True):
        found = [rows[size] for size in sizes]
        across = [row["n" if axis == "rows" else "parameters"] for row in found]
        for key, label in (
            ("jacrev_s", "vmap(jacrev)"),
            ("collected_s", "gradstore, collected"),
            ("streamed_s", "gradstore, streamed"),
        ):
            panel.loglog(across, [1e3 * row[key] / row["n"] for row in found], "o-", label=label)
        panel.set_xlabel({"rows": "rows n", "P": "parameters P"}[axis])
        panel.set_title(titles[axis], fontsize=9)
        panel.set_xticks(across, [f"{value:,}" for value in across], minor=False)
        panel.set_yticks([0.5, 1, 2, 5, 10, 20])
        panel.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds an example, 10 classes")
    panels[0].legend(fontsize=8)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
