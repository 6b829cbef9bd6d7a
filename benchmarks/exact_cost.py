"""What the exact trNTK of ResNet18 on 60,000 CIFAR-10 images takes: operations counted, rates measured.

    OMP_NUM_THREADS=2 python -m benchmarks.exact_cost [--examples 96] [--memory 8GB]

appends to results/exact_cost.csv. Operations are those of the code's own cost model, for a group of rows and a block
of columns as the plan for 60,000 images cuts them. Rates are measured on a few random images with the same network:
the weights do not matter to the arithmetic. Notes are in results/exact_cost.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset, TensorDataset

import gradstore as gs
from benchmarks.paper.networks import resnet
from gradstore.jacobians import JacobianEngine
from gradstore.kernels.definitions import exact_kernel
from gradstore.kernels.exact.contraction import factored_is_cheaper, operations
from gradstore.kernels.exact.example_selection import Selection
from gradstore.kernels.exact.factors import Held, held, joined_rows, rows_and_classes
from gradstore.kernels.exact.jacobian_plan import JacobianPlan
from gradstore.kernels.exact.jacobian_tiles import Jacobians, JacobianTiles
from gradstore.machine.byte_counts import parse_bytes
from gradstore.model.parameters import parameter_blocks

sys.path.insert(0, str(Path(__file__).parent))

IMAGES, CLASSES, SEED = 60_000, 10, 0


def main() -> None:
    from setting import append_rows

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--memory", default="8GB")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    model = resnet((2, 2, 2, 2), CLASSES).eval()
    plan = tiles_of(model, Repeated(IMAGES), options.memory).plan
    rows = [*counted(model, plan), *measured(model, options.examples, options.memory)]
    value = {str(row["measure"]): float(row["value"]) for row in rows}  # type: ignore[arg-type]
    rows += predicted(value, plan)
    append_rows("exact_cost", [{**row, "memory": options.memory} for row in rows], SEED)


class Repeated(Dataset):
    """One image as often as wanted, so that a plan can be made for a data set that is not there."""

    def __init__(self, n: int) -> None:
        self.n, self.image = n, torch.randn(3, 32, 32)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.image, 0


def tiles_of(model: torch.nn.Module, data: Dataset, memory: str) -> JacobianTiles:
    project = gs.Project(model=model, splits={"train": data})
    selection = Selection.of(project, "train", None)
    return JacobianTiles(project, selection, selection, exact_kernel("trntk0"), parse_bytes(memory), "cpu")


def counted(model: torch.nn.Module, plan: JacobianPlan) -> list[dict[str, object]]:
    """Multiply-adds a pair of examples, by kind of layer and form."""
    probe = torch.randn(4, 3, 32, 32)
    engine = JacobianEngine(model, parameter_blocks(model), example=probe)
    sums: dict[tuple[str, str], list[float]] = {}
    total = dense = 0.0
    room = plan.scratch // (32 * plan.group * plan.classes)
    parts = range(0, CLASSES, plan.classes)
    stream = [
        block for at in parts for block in joined_rows(map(held, engine(probe, slice(at, at + plan.classes))), room)
    ]
    for block in stream:
        same: list[Held] = [block]
        group, passing = same * (plan.group // 4), same * (plan.block // 4)
        factored = factored_is_cheaper(group, passing, pairs=False)
        cost = operations(group, passing, pairs=False, factored=factored)
        entry = sums.setdefault((stage(block.name), "factored" if factored else "dense"), [0.0, 0.0])
        entry[0] += block.size / len(parts)
        entry[1] += cost
        total += cost
        dense += rows_and_classes(block)[1] * block.size
    found = [
        row(f"{where}, {form}: multiply-adds a pair", cost, "1", f"{int(size)} parameters")
        for (where, form), (size, cost) in sums.items()
    ]
    pairs = IMAGES * (IMAGES + 1) / 2
    return [
        *found,
        row("multiply-adds a pair", total, "1"),
        row("multiply-adds a pair, all dense", dense, "1"),
        row("flops of all pairs", 2 * total * pairs, "1"),
        row("flops of all pairs, both halves, all dense", 2 * dense * IMAGES**2, "1"),
    ]


def stage(name: str) -> str:
    """The residual stage of a parameter: two blocks each, of 64 to 512 channels."""
    part = int(name.split(".")[0])
    return f"stage {(part - 3) // 2 + 1}" if 3 <= part < 11 else "stem and head"


def measured(model: torch.nn.Module, n: int, memory: str) -> list[dict[str, object]]:
    """Seconds of the two halves of the work, Jacobians and contraction, the second of two runs."""
    tiles = tiles_of(model, TensorDataset(torch.randn(n, 3, 32, 32), torch.zeros(n, dtype=torch.long)), memory)
    some = tiles._parts()[0]
    parts = len(tiles._parts())
    for _ in range(2):
        began = time.perf_counter()
        rows: Jacobians = tiles._load(tiles.a, range(n), some)
        loaded = time.perf_counter() - began
        out = torch.zeros(n, n, dtype=torch.float64)
        other = Jacobians(tuple((name, list(blocks)) for name, blocks in rows.columns), rows.rows)
        began = time.perf_counter()
        tiles._add(rows, other, out)
        contracted = time.perf_counter() - began
    cost = sum(
        operations(blocks, blocks, pairs=False, factored=factored_is_cheaper(blocks, blocks, pairs=False))
        for _, blocks in rows.columns
    )
    return [
        row("Jacobians of an example", parts * loaded / n, "s"),
        row("contraction", parts * contracted / n**2, "s a pair"),
        row("rate of the contraction", 2 * cost * n**2 / contracted, "flop/s"),
    ]


def predicted(value: dict[str, float], plan: JacobianPlan) -> list[dict[str, object]]:
    """The whole matrix on this machine."""
    groups = -(-IMAGES // plan.group)
    examples = IMAGES * (groups + 1) / 2
    products = value["flops of all pairs"] / value["rate of the contraction"]
    return [
        row("rows of a group", plan.group, "1"),
        row("classes at a time", plan.classes, "1"),
        row("examples whose Jacobians are computed", examples, "1"),
        row("60,000 images: Jacobians", examples * value["Jacobians of an example"] / 3600, "h"),
        row("60,000 images: contraction", products / 3600, "h"),
    ]


def row(measure: str, value: float, unit: str, note: str = "") -> dict[str, object]:
    return {"measure": measure, "value": value, "unit": unit, "note": note}


if __name__ == "__main__":
    main()
