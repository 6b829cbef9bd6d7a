"""Gradients that jump where a unit is within rounding of zero: right on either side, and no excuse for a fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import ProjectError
from gradstore.jacobians import JacobianEngine, forward_record, jacobian_engine, probe
from gradstore.jacobians.by_autograd import by_loop
from gradstore.jacobians.rules import RULES
from gradstore.jacobians.steadiness import spread
from gradstore.jacobians.subject import Subject
from gradstore.model.parameters import parameter_blocks

WIDTH = 40
X = torch.randn(WIDTH, 24, generator=torch.Generator().manual_seed(3))


class AtItsKinks(nn.Module):
    """A ReLU layer of which one unit is zero for each row, and summed eight roundings higher alone than in a batch.

    Kernels for different batch sizes differ so. Alone the unit is on, beside others it is off.
    """

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(24, WIDTH), nn.Linear(WIDTH, 3)
        with torch.no_grad():
            self.first.bias.copy_(-(X @ self.first.weight.T).diagonal())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x) + (1e-6 if len(x) == 1 else -1e-6)))


class TokensAtTheirKinks(AtItsKinks):
    """The same of words: inputs are indices, and only weights can be moved."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding.from_pretrained(X, freeze=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.words(x))


class Tenfold(torch.autograd.Function):
    """Identity whose gradient is ten times as large in a batch: no logit shows it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.alone = len(x) == 1
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient if ctx.alone else 10 * gradient


class TenfoldBeforeItsKinks(AtItsKinks):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.before = nn.Linear(24, 24)
            nn.init.eye_(self.before.weight)
            nn.init.zeros_(self.before.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Tenfold.apply(self.before(x)))


class Unsteady(torch.autograd.Function):
    """Identity whose gradient is drawn anew at every call."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Unsteady.calls += 1
        return gradient * (1 + Unsteady.calls % 7)


def bias_gradient(x: Tensor, i: int) -> Tensor:
    model = AtItsKinks()
    return torch.autograd.grad(model(x)[i].sum(), model.first.bias)[0]


def featurize(model: nn.Module, out: Path) -> gs.FeatureStore:
    data = TensorDataset(X, torch.arange(len(X)) % 3)
    return gs.featurize(gs.Project(model=model, splits={"train": data}), split="train", out=out, proj_dim=128)


def test_every_row_has_another_gradient_alone() -> None:
    assert not any(torch.equal(bias_gradient(X[i : i + 1], 0), bias_gradient(X, i)) for i in range(len(X)))


def test_a_gradient_that_jumps_with_a_rounding_is_stored(tmp_path: Path) -> None:
    assert len(featurize(AtItsKinks(), tmp_path / "s")) == len(X)


def test_were_it_not_known_how_roundings_move_it_it_would_be_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jacobian_engine, "spread", lambda *_: {})
    with pytest.raises(ProjectError, match=r"row \d+ has another gradient alone than in its batch"):
        featurize(AtItsKinks(), tmp_path / "s")


def test_a_fault_beside_kinks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe alone has three rows, and would take the loop."""
    monkeypatch.setattr(probe.Prober, "_differing", lambda *_: set())
    with pytest.raises(ProjectError, match=r"parameter before\..*has another gradient alone than in its batch"):
        featurize(TenfoldBeforeItsKinks(), tmp_path / "s")


class TenfoldInside(nn.Module):
    """A smooth network whose first layers' gradient is ten times as large in a batch."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(24, 16, dtype=dtype), nn.Linear(16, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Tenfold.apply(torch.tanh(self.first(x.to(self.first.weight)))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_excuses_a_gradient_is_small_in_every_dtype(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {name for name, _ in engine(TenfoldInside(dtype)).generic()} == {"first.weight", "first.bias"}
    monkeypatch.setattr(probe.Prober, "_differing", lambda *_: set())
    with pytest.raises(ProjectError, match=r"parameter first\..*has another gradient alone than in its batch"):
        featurize(TenfoldInside(dtype), tmp_path / "s")


def engine(model: nn.Module) -> JacobianEngine:
    return JacobianEngine(model, parameter_blocks(model), example=X)


@pytest.mark.parametrize("factor", [1.01, 1.0003])
def test_a_rule_that_is_wrong_by_less_than_a_kink_is_not_taken(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return RULES[nn.functional.linear](factor * input, weight, bias)

    monkeypatch.setattr(forward_record, "RULES", {**RULES, nn.functional.linear: wrong})
    monkeypatch.setitem(forward_record.ARGUMENTS, wrong, ["input", "weight", "bias"])
    routes = dict(engine(AtItsKinks()).describe())
    assert "differs from autograd" in routes["first.weight"]
    assert "differs from autograd" in routes["last.weight"]
    assert routes["first.bias"] == routes["last.bias"] == "linear"


def test_its_parameters_keep_their_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not engine(AtItsKinks()).generic()
    monkeypatch.setattr(probe, "spread", lambda *_: {})
    assert len(engine(AtItsKinks()).generic()) == 2  # of the first layer


def test_a_gradient_that_a_batch_changes_takes_the_loop_beside_kinks() -> None:
    assert {name for name, _ in engine(TenfoldBeforeItsKinks()).generic()} == {"before.weight", "before.bias"}


class FailsInABatch(torch.autograd.Function):
    """Identity whose backward pass takes one example at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        assert len(gradient) == 1
        return gradient


def test_a_backward_pass_that_fails_in_a_batch_takes_the_loop() -> None:
    class OneByOne(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return FailsInABatch.apply(super().forward(x))

    found = engine(OneByOne(24, 3)).generic()
    assert [route.split(" (")[0] for _, route in found] == ["autograd loop"] * 2


def moved(model: nn.Module, change: Any = None, inputs: Tensor = X[:1]) -> dict[str, float]:
    subject = Subject(model, change, [name for name, _ in model.named_parameters()])

    def gradients(subject: Subject, inputs: Any) -> dict[str, Tensor]:
        return dict(
            zip(subject.parameters, by_loop(subject, list(subject.parameters), inputs, torch.ones(1, 3)), strict=True)
        )

    with subject.ready():
        return spread(subject, inputs, gradients, 1e-4, lambda _: False)


def test_a_gradient_moves_by_a_unit_and_leaves_the_model_as_it_is() -> None:
    model, state = AtItsKinks(), torch.random.get_rng_state()
    before = {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    found = moved(model)
    jump = bias_gradient(X[:1], 0) - bias_gradient(X[:2], 0)
    assert float(jump.norm()) * 0.99 <= found["first.bias"] <= 3 * float(jump.norm())
    assert found["last.bias"] == 0
    after = {name: (id(p), p, p.requires_grad) for name, p in model.named_parameters()}
    assert all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2]
        for a, b in zip(before.values(), after.values(), strict=True)
    )
    assert torch.equal(torch.random.get_rng_state(), state)


def test_where_inputs_are_indices_weights_are_moved() -> None:
    found = moved(TokensAtTheirKinks(), inputs=torch.arange(1))
    jump = bias_gradient(X[:1], 0) - bias_gradient(X[:2], 0)
    assert found["first.bias"] >= 0.99 * float(jump.norm())


def test_a_smooth_gradient_hardly_moves() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        smooth = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3))
    found = moved(smooth)
    assert all(0 <= most < 1e-3 for most in found.values())
    assert found["0.weight"] > 0


def test_a_gradient_that_changes_by_itself_is_not_excused() -> None:
    found = moved(AtItsKinks(), lambda model, x: Unsteady.apply(model(x)))
    assert set(found.values()) == {0.0}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_of_a_scripted_module_only_inputs_are_moved() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3))
    assert moved(torch.jit.trace(plain, X[:1]))["0.weight"] > 0
