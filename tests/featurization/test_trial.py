"""What `check` says of a model's Jacobian: a fault in a parameter of any size is found, and rounding is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradstore as gs
from gradstore.featurization import trial
from gradstore.jacobians import JacobianEngine


class Attention(nn.Module):
    """Attention, in which the bias of the keys changes no logit."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        attended = nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.head(attended.mean(1)) * 30


def tried(monkeypatch: pytest.MonkeyPatch, fault: dict[str, float]) -> trial.Check:
    """What is said of the Jacobian, where plain autograd's is larger by these shares of the whole gradient."""
    honest = JacobianEngine.looped

    def looped(engine: JacobianEngine, example: Any) -> dict[str, Tensor]:
        found = honest(engine, example)
        whole = torch.cat(list(found.values()), dim=1).norm()
        return {
            name: g + fault.get(name, 0.0) * whole * nn.functional.normalize(torch.ones_like(g).flatten(), dim=0)[0]
            for name, g in found.items()
        }

    monkeypatch.setattr(JacobianEngine, "looped", looped)
    torch.manual_seed(0)
    project = gs.Project(Attention(), {"train": [(torch.randn(5, 6) * 3, i % 3) for i in range(4)]})
    return next(check for check in trial.checks(project, proj_dim=8) if check.name == "Jacobians")


def test_a_gradient_that_is_rounding_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, seen = JacobianEngine.looped, {}
    monkeypatch.setattr(JacobianEngine, "looped", lambda *arguments: seen.setdefault("found", honest(*arguments)))
    assert tried(monkeypatch, {"key.bias": 1e-7}).error is None
    norms = {name: float(g.norm()) for name, g in seen["found"].items()}
    assert 0 < norms["key.bias"] < 1e-6 * max(norms.values())  # the control: it is not zero, as it should be


@pytest.mark.parametrize("name", ["key.bias", "key.weight", "head.bias"])
def test_a_fault_is_found_whatever_the_size_of_the_parameter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check = tried(monkeypatch, {name: 1e-4})
    assert check.error is not None
    assert f"parameter {name}: the Jacobian of row 0 differs from looped autograd" in check.detail
