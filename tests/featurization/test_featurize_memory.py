"""Featurize keeps its byte budget: peak resident memory of a fresh process, against `--memory`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, sys, tempfile, torch
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from torch import nn
from torch.utils.data import TensorDataset
import gradstore as gs
name, rows, memory, kind = sys.argv[3], int(sys.argv[4]), sys.argv[5], sys.argv[6]
torch.set_num_threads(2)
torch.manual_seed(0)

class Residual(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        self.one, self.two = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(b), nn.BatchNorm2d(b)
        self.short = nn.Conv2d(a, b, 1, stride, bias=False)
    def forward(self, x):
        y = torch.relu(self.norm1(self.one(x)))
        return torch.relu(self.norm2(self.two(y)) + self.short(x))

def digits():
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1),
                         nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(),
                         nn.Linear(64, 10)), (1, 8, 8)

def resnet():
    return nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), Residual(32, 64, 1),
                         Residual(64, 128, 2), Residual(128, 256, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(256, 10)), (3, 24, 24)

def featurize(build, rows, memory, on_plan=None):
    model, shape = build()
    data = TensorDataset(torch.randn(rows, *shape), torch.randint(0, 10, (rows,)))
    seen = {"parameters": 4 * sum(p.numel() for p in model.parameters())}
    reset()
    before = kilobytes("VmRSS")
    def planned(plan):
        seen.update(group=plan.manifest.group, probe=kilobytes("VmHWM") - before)
        reset()
        seen["begins"] = kilobytes("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        gs.featurize(gs.Project(model=model, splits={"train": data}), split="train", out=Path(folder) / "s",
                     proj_dim=256, projection=kind, memory=memory, on_plan=planned)
    return seen | {"run": kilobytes("VmHWM") - seen.pop("begins"), "whole": rows * 10 * seen["parameters"]}

def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def reset():
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")

small = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 10))
featurize(lambda: (small, (3, 8, 8)), 40, "20MB")  # libraries load and compile what they need once
print(json.dumps(featurize({"digits": digits, "resnet": resnet}[name], rows, memory)))
"""


def measured(model: str, rows: int, memory: str, kind: str = "rademacher") -> dict[str, int]:
    here = Path(__file__).parents[1]
    command = [sys.executable, "-c", CHILD, str(here), str(here.parent), model, str(rows), memory, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as Linux reports it")
@pytest.mark.parametrize(
    ("model", "rows", "megabytes", "kind"),
    [
        ("digits", 400, 256, "rademacher"),
        ("digits", 400, 256, "gaussian"),
        ("resnet", 16, 256, "rademacher"),
        ("resnet", 16, 256, "gaussian"),
    ],
)
def test_peak_memory_stays_within_the_budget(model: str, rows: int, megabytes: int, kind: str) -> None:
    found, budget = measured(model, rows, f"{megabytes}MB", kind), megabytes * 10**6
    assert found["run"] < budget
    # Checking the engine against autograd takes the parameters' gradients a few times, whatever the budget.
    assert found["probe"] < budget + 4 * found["parameters"]
    assert found["whole"] > 2 * budget  # the whole Jacobian would not have fitted


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as Linux reports it")
def test_a_larger_budget_is_used() -> None:
    small, large = (measured("digits", 192, memory) for memory in ("15MB", "400MB"))
    assert small["group"] < 16 < large["group"]
    assert small["run"] < large["run"]
