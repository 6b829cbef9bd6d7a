"""Exact trNTK of the digits CNN: time against the dense J Jᵀ, and against neural_tangents.

    OMP_NUM_THREADS=2 python benchmarks/bench_exact.py [--rows 1000] [--repeats 3] [--peer PYTHON]

appends to results/exact.csv. Rivals are interleaved and each figure is a median. The dense rival multiplies a float32
Jacobian [n, c p] that is already in memory, and is given the symmetric product; ours starts from the images, computes
Jacobians as often as its memory asks for, and may use a tenth of the dense Jacobian's bytes. `--peer` names a Python
with JAX and neural_tangents, which computes the same kernel of the same network (BatchNorm folded into the
convolutions, as in eval mode) by `empirical_ntk_fn`; its compiled function is warmed up first. What works together:
neural-tangents 0.6.5, jax and jaxlib 0.4.23, tf2jax 0.3.6, numpy below 2, scipy below 1.13.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from setting import append_rows
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.jacobians import JacobianEngine
from gradstore.model.parameters import parameter_blocks

SEED = 0
PEER = Path(__file__).parent / "peer_neural_tangents.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", default=None, help="a Python with jax and neural_tangents")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    images = torch.randn(options.rows, 1, 8, 8)
    rows = against_dense(images, options.repeats)
    if options.peer:
        rows += against_peer(images[: min(options.rows, 300)], options.repeats, options.peer)
    append_rows("exact", rows, SEED)


class DigitsCNN(nn.Sequential):
    """The demo's network: three convolutions with batch normalisation, then a linear layer; 15,498 parameters."""

    def __init__(self) -> None:
        def convolution(i: int, o: int) -> tuple[nn.Module, ...]:
            return nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()

        pool = nn.MaxPool2d(2)
        first, second, third = convolution(1, 16), convolution(16, 32), convolution(32, 32)
        super().__init__(*first, *second, pool, *third, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def against_dense(images: Tensor, repeats: int) -> list[dict[str, object]]:
    model = DigitsCNN().eval()
    project = project_of(model, images)
    dense = dense_jacobian(model, images)
    n, size = len(images), dense.numel() * 4
    budgets = {"a tenth of J's memory": size // 10, "a third of J's memory": size // 3, "2 GB": 2 * 10**9}
    rivals: dict[str, Callable[[], object]] = {"dense J Jᵀ, J in memory": lambda: dense @ dense.T}
    for name, memory in budgets.items():
        rivals[f"exact_gram, {name}"] = lambda memory=memory: gs.exact_gram(project, kernel="trntk0", memory=memory)
    seconds = interleaved(rivals, repeats)
    found = [row(name, value, "s", n) for name, value in seconds.items()]
    reference = (dense @ dense.T).numpy()
    for name, memory in budgets.items():
        ours = f"exact_gram, {name}"
        found.append(row(f"dense / {ours}", seconds["dense J Jᵀ, J in memory"] / seconds[ours], "x", n))
        value = gs.exact_gram(project, kernel="trntk0", memory=memory)
        found.append(row(f"largest error of {ours}", float(np.abs(value - reference).max() / reference.max()), "1", n))
    return found


def dense_jacobian(model: nn.Module, images: Tensor) -> Tensor:
    """[n, c p] float32."""
    engine = JacobianEngine(model, parameter_blocks(model), example=images[:4])
    parts = []
    for start in range(0, len(images), 50):
        blocks = [block.dense() for block in engine(images[start : start + 50])]
        parts.append(torch.cat([block.flatten(1) for block in blocks], dim=1))
    return torch.cat(parts)


def against_peer(images: Tensor, repeats: int, python: str) -> list[dict[str, object]]:
    """The same network and images in both, each in its own process with all threads."""
    model = DigitsCNN().eval()
    layers = list(model)
    folded = nn.Sequential(
        *(
            fuse_conv_bn_eval(layer, layers[i + 1]) if isinstance(layer, nn.Conv2d) else layer
            for i, layer in enumerate(layers)
            if not isinstance(layer, nn.BatchNorm2d)
        )
    ).eval()
    project = project_of(folded, images)
    ours, theirs = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arrays = {key: value.detach().numpy() for key, value in folded.state_dict().items()}
        np.savez(folder / "in.npz", images=images.numpy(), **arrays)
        for _ in range(repeats):
            began = time.perf_counter()
            value = gs.exact_gram(project, kernel="trntk0", memory="1GB")
            ours.append(time.perf_counter() - began)
            command = [python, str(PEER), str(folder / "in.npz"), str(folder / "out.npy")]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            for kind, seconds in json.loads(done.stdout.splitlines()[-1]).items():
                theirs.setdefault(kind, []).append(seconds)
        reference = np.load(folder / "out.npy")
    n = len(images)
    mine = statistics.median(ours)
    found = [row("exact_gram, folded network", mine, "s", n)]
    for kind, seconds in theirs.items():
        found.append(row(f"neural_tangents {kind}", statistics.median(seconds), "s", n))
        found.append(row(f"neural_tangents {kind} / exact_gram", statistics.median(seconds) / mine, "x", n))
    found.append(
        row("largest difference from neural_tangents", float(np.abs(value - reference).max() / reference.max()), "1", n)
    )
    return found


def project_of(model: nn.Module, images: Tensor) -> gs.Project:
    return gs.Project(model=model, splits={"train": TensorDataset(images, torch.arange(len(images)) % 10)})


def interleaved(rivals: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, every round running all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, call in rivals.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def row(measure: str, value: float, unit: str, n: int) -> dict[str, object]:
    return {"measure": measure, "value": value, "unit": unit, "rows": n}


if __name__ == "__main__":
    main()
