"""Many classes: what each layout takes, with and without rows below the last call standing for the classes.

    python benchmarks/bench_classes.py                      # rows to benchmarks/results/classes.csv
    python benchmarks/bench_classes.py --K 2048 --rounds 5 --ways per-class mixed
    python benchmarks/bench_classes.py --error              # errors of cosines, to benchmarks/results/class_errors.csv

A small convolutional net on 16 x 16 pictures, 64 inputs of its last layer, 1,000 classes. Every way featurizes in turn,
round after round, in one process, as many rows (`mixed`, which takes minutes, 2); a ratio is of medians of rows a
second. "per-class, every class differentiated" is the way of before, by a switch of this script. Errors are of cosines
of a net with 100 classes that was trained on synthetic pictures, against the exact kernel, beside the standard error
that the store itself states.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
from setting import append_rows
from torch import nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.jacobians import through_head
from gradstore.kernels.definitions import projected_kernel
from gradstore.kernels.sketched_error import errors_of

D = 64
PAYS = through_head.pays
WAYS = {  # name: layout, whether rows below may stand for classes, rows of a run if others, further settings
    "per-class, every class differentiated": ("per-class", False, None, {}),
    "per-class": ("per-class", True, None, {}),
    "mixed": ("mixed", True, 2, {}),
    "sketched, 16 draws": ("sketched", True, None, {"class_draws": 16}),
    "sketched, 32 draws": ("sketched", True, None, {"class_draws": 32}),
    "sketched, 64 draws": ("sketched", True, None, {"class_draws": 64}),
}


def net(classes: int) -> nn.Module:
    """Three convolutions and a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, D)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, classes))


def rows_a_second(way: str, K: int, rows: int, seed: int) -> float:
    """Of one run, from its first gradient to its last row on disk."""
    layout, lowered, own, settings = WAYS[way]
    rows = own or rows
    torch.manual_seed(seed)
    data = TensorDataset(torch.randn(rows, 3, 16, 16), torch.randint(0, 1000, (rows,)))
    project = gs.Project(model=net(1000), splits={"train": data})
    seconds: list[float] = []
    through_head.pays = PAYS if lowered else lambda *_: False
    try:
        with tempfile.TemporaryDirectory() as folder:
            gs.featurize(
                project,
                split="train",
                out=Path(folder) / "store",
                proj_dim=K,
                layout=layout,
                memory="4GB",
                progress=lambda state: seconds.append(state.seconds),
                **settings,
            )
    finally:
        through_head.pays = PAYS
    return rows / seconds[-1]


def speed(K: int, rows: int, rounds: int, ways: list[str], seed: int) -> list[dict[str, object]]:
    """Every way in turn."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways if number % 2 else reversed(ways):
            found[way].append(rows_a_second(way, K, rows, seed))
    before, now = (median(found[way]) if way in found else None for way in list(WAYS)[:2])
    return [
        {
            "way": way,
            "classes": 1000,
            "d": D,
            "K": K,
            "rows": WAYS[way][2] or rows,
            "rounds": rounds,
            "rows_a_second": round(median(values), 4),
            "least": round(min(values), 4),
            "most": round(max(values), 4),
            "over_before": "" if before is None else round(median(values) / before, 2),
            "over_per_class": "" if now is None else round(median(values) / now, 2),
        }
        for way, values in found.items()
    ]


def trained(classes: int, seed: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A net that tells synthetic classes apart, a picture with noise each, and some of the pictures."""
    torch.manual_seed(seed)
    centres = torch.randn(classes, 3, 16, 16)
    labels = torch.arange(20 * classes) % classes
    x = centres[labels] + 0.7 * torch.randn(len(labels), 3, 16, 16)
    model = net(classes)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(12):
        for batch in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), labels[batch]).backward()
            optimizer.step()
    chosen = torch.arange(60) % 30
    return model.eval(), centres[chosen] + 0.7 * torch.randn(60, 3, 16, 16), chosen


def errors(K: int, seed: int) -> list[dict[str, object]]:
    """Root mean square error of cosines, and the stated one."""
    model, x, labels = trained(100, seed)
    project = gs.Project(model=model, splits={"train": TensorDataset(x, labels)})
    exact = gs.exact_gram(project, kernel="trntk")
    pairs = np.triu_indices(len(x), 1)
    right = float((model(x).argmax(1) == labels).float().mean())
    found = []
    for way, (layout, lowered, _, settings) in WAYS.items():
        if not lowered:
            continue
        with tempfile.TemporaryDirectory() as folder:
            store = gs.featurize(
                project, split="train", out=Path(folder) / "s", proj_dim=K, layout=layout, seed=seed, **settings
            )
            features, identity = torch.from_numpy(store.features[:]), store.identity
            off = gs.gram(store, out=Path(folder) / "gram.h5")[:][pairs] - exact[pairs]
            stated = errors_of(
                features[pairs[0][::20]], features[pairs[1][::20]], projected_kernel("proj-trntk"), identity
            )
        found.append(
            {
                "way": way,
                "classes": 100,
                "d": D,
                "K": K,
                "rows": len(x),
                "accuracy": round(right, 3),
                "rms_error": float(f"{np.sqrt(np.mean(off**2)):.3g}"),
                "rms_stated": float(f"{float(stated.square().mean().sqrt()):.3g}"),
                "largest": float(f"{np.abs(off).max():.3g}"),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--K", type=int, default=10240)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--error", action="store_true")
    options = parser.parse_args()
    if options.error:
        append_rows("class_errors", errors(options.K, options.seed), options.seed)
    else:
        append_rows("classes", speed(options.K, options.rows, options.rounds, options.ways, options.seed), options.seed)


if __name__ == "__main__":
    main()
