"""The zoo of `benchmarks/bench_models.py`: its hand-written models are right, and its script would say if not."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.zoo import hand_written
from benchmarks.zoo.entry import CLASSES, Entry
from benchmarks.zoo.report import page
from benchmarks.zoo.rightness import looped, rightness
from gradstore.jacobians import JacobianEngine
from gradstore.jacobians.blocks import DenseBlock

ROOT = Path(__file__).parent.parent
HAND = {entry.name: entry for entry in hand_written.ENTRIES}


@pytest.mark.filterwarnings("ignore")  # of torch itself, on old ways to norm a weight and on scripts
@pytest.mark.numerical
@pytest.mark.parametrize("name", HAND)
def test_hand_written_model_is_right(name: str) -> None:
    found = rightness(HAND[name], most=3)
    assert found["outcome"] == "right", found["why"]


def test_the_reference_is_the_slope_of_the_logits() -> None:
    entry, step = HAND["tokens from a batch norm"], 1e-5
    model, inputs = entry.model(wide=True), entry.batch(1, wide=True)
    _, _, gradients = next(looped(entry, 0, 1, wide=True))
    for name, parameter in model.named_parameters():
        way = torch.randn_like(parameter)
        logits = []
        for sign in (1, -2):
            parameter.data += sign * step * way
            logits.append(model(inputs)[0, 0].detach())
        slope = float(logits[0] - logits[1]) / (2 * step)
        assert float(gradients[name] @ way.flatten()) == pytest.approx(slope, rel=1e-6, abs=1e-9), name
        parameter.data += step * way


@pytest.mark.parametrize("what", ["values", "norms"])
def test_a_wrong_gradient_is_called_wrong(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(DenseBlock):
        def sq_norm(self) -> Tensor:
            return super().sq_norm() * (1.001 if what == "norms" else 1.0)

    def stream(*_: object) -> Iterator[DenseBlock]:
        for block in blocks(*_):
            scale = 1.001 if what == "values" and block.name == "inner" else 1.0
            yield Wrong(block.name, block.start, block.dense() * scale)

    blocks = JacobianEngine._stream
    monkeypatch.setattr(JacobianEngine, "_stream", stream)
    assert rightness(HAND["x + beta"])["outcome"] == "wrong"


def test_a_model_that_is_left_altered_is_called_wrong() -> None:
    class Drifting(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data.copy_(self.weight.data.clamp(-0.1, 0.1))
            return super().forward(x)

    entry = Entry("drifting", "hand", lambda: Drifting(20, CLASSES), lambda n: torch.randn(n, 20))
    found = rightness(entry, most=3)
    assert (found["outcome"], found["why"]) == ("wrong", "the model is left altered: weight")


def test_names_are_unique() -> None:
    from benchmarks.zoo import of_timm, of_torchvision, of_transformers

    names = [e.name for m in (hand_written, of_timm, of_torchvision, of_transformers) for e in m.ENTRIES]
    assert len(names) == len(set(names))


def test_script_replaces_its_rows_and_keeps_others(tmp_path: Path) -> None:
    table = tmp_path / "models.csv"
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_models.py"), "--no-time", "--table", str(table)]
    table.write_text("model,outcome,n\nx + beta,crash,32\nx + beta,crash,\nshared layer,refused,32\n")
    subprocess.run([*command, "--only", "x + beta"], check=True, capture_output=True)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["outcome"]) for row in rows] == [("shared layer", "refused"), ("x + beta", "right")]
    assert float(rows[1]["error_gradient"]) < 1e-5
    assert all(f"| {row['model']} |" in page(rows) for row in rows)


def test_script_names_a_model_that_it_does_not_have() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_models.py"), "--only", "no such"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (1, "not in the zoo, or its library is not installed: no such\n")
