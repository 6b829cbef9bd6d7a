"""What the Jacobian engine must not get wrong: the user's model, misleading batches, and the structure of blocks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, HARD_CASES, Case, SmallCNN
from test_jacobians import looped, relative, streamed, whole
from torch import Tensor, nn
from torch_threads import torch_threads

from gradstore.errors import ProjectError, UsageError
from gradstore.jacobians import EmbeddingBlock, JacobianEngine, terms
from gradstore.jacobians import jacobian_engine as engine_module
from gradstore.jacobians.blocks import JacobianBlock
from gradstore.jacobians.footprint import MAX_COLUMNS
from gradstore.jacobians.pullback import Pulled
from gradstore.jacobians.reused_memory import drop_spare, reused
from gradstore.jacobians.side_by_side import side_by_side
from gradstore.model.parameters import parameter_blocks

pytestmark = [pytest.mark.numerical, pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")]
BY_NAME = {case.name: case for case in CASES + HARD_CASES}


def engine_for(case: Case, model: nn.Module, example: Any, **options: Any) -> JacobianEngine:
    return JacobianEngine(
        model, parameter_blocks(model, case.parameters), forward=case.forward, example=example, **options
    )


def routes(case: Case) -> dict[str, str]:
    return dict(engine_for(case, case.model(), case.batch()).describe())


def put_together(blocks: list[JacobianBlock]) -> Tensor:
    return torch.cat([block.dense() for block in blocks], -1)


STRUCTURED = [
    "mlp",
    "cnn-batchnorm",
    "transformer-dict",
    "one-logit",
    "tied-weights",
    "shared-layer",
    "residual-inplace",
    "convolution-variants",
    "head-only",
    "functional-weights",
    "custom-parameters",
    "sequence-first-attention",
]


@pytest.mark.parametrize("name", STRUCTURED)
def test_ordinary_models_need_no_generic_route(name: str):
    assert not [route for route in routes(BY_NAME[name]).values() if "torch.func" in route or "loop" in route]


class PartlyUnknown(nn.Module):
    """Of its weights one is known to no rule, and one is gathered by the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rows, self.head = nn.Linear(5, 6), nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 3)
        self.distance = nn.Parameter(torch.randn(7, 6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh() + self.rows[x.argmax(1) % 4]
        return self.head(hidden) - torch.cdist(hidden, self.distance).mean(1, keepdim=True)


def test_generic_routes_are_taken_per_parameter_and_said():
    case = Case("partly unknown", PartlyUnknown, lambda n: torch.randn(n, 5), 3)
    assert routes(case) == {
        "rows": "torch.func (used outside a known layer)",
        "distance": "torch.func (used outside a known layer)",
        "first.weight": "linear",
        "first.bias": "linear",
        "head.weight": "linear",
        "head.bias": "linear",
    }
    _, reference = looped(case, case.model(dtype=torch.float64), case.batch(dtype=torch.float64))
    assert relative(whole(streamed(case, case.model(), case.batch())[1]), whole(reference)) < 1e-5
    assert routes(BY_NAME["packed-rows"])["inner.weight"] == "autograd by example (used outside a known layer)"
    assert routes(BY_NAME["tied-weights"])["embed.weight"] == "embedding + linear"
    assert routes(BY_NAME["custom-parameters"])["unused"] == "unused"
    assert routes(BY_NAME["functional-weights"])["first.weight"] == "linear + linear of a function"
    attention = routes(BY_NAME["sequence-first-attention"])
    assert attention["attention.in_proj_weight"] == "linear"
    assert attention["cross.in_proj_weight"] == "linear of a function"


@pytest.mark.parametrize("name", ["cnn-batchnorm", "transformer-dict", "lstm", "packed-rows", "functional-weights"])
def test_the_model_is_left_as_it_was(name: str):
    case = BY_NAME[name]
    model = case.model().train()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)

    def state() -> tuple[Any, ...]:
        tensors = [t.clone() for t in [*model.parameters(), *model.buffers()]]
        flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        return tensors, flags, hooks, [p.grad for p in model.parameters()], torch.get_rng_state()

    before, identity = state(), [id(t) for t in [*model.parameters(), *model.buffers()]]
    streamed(case, model, case.batch())
    after = state()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:4] == after[1:4]
    assert torch.equal(before[4], after[4])
    assert identity == [id(t) for t in [*model.parameters(), *model.buffers()]]


class CountingCalls(nn.Module):
    """Keeps a buffer of how often it ran, replacing it and changing it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))
        self.register_buffer("last", torch.zeros(1))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.sum().detach()[None]
        return self.head(x)


def test_buffers_that_the_forward_pass_changes_are_restored():
    model = CountingCalls()
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    list(JacobianEngine(model, parameter_blocks(model), example=x)(x))
    assert torch.equal(model.calls, torch.zeros(2))
    assert torch.equal(model.last, torch.zeros(1))


class ChangesInputInPlace(nn.Module):
    """A layer's input is changed after it was read; only the layer's bias is learned, so autograd does not mind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = nn.functional.linear(x, self.first.weight.detach(), self.first.bias).tanh()
        x.mul_(3)
        return self.head(y + x)


class SortsExamples(nn.Module):
    """Reorders the batch by a property that the probe's equal examples do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort(stable=True)
        return self.head(self.first(x[order]).tanh()[order.argsort()])


class SortsLargeActivations(nn.Module):
    """Reorders the batch in a layer whose output has a gradient a billion times smaller than another's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort(stable=True)
        large = self.first(x * 1e-6).tanh() * 1e9
        return self.head((self.second(large[order])[order.argsort()] * 1e-9).tanh())


class BranchesOnBatch(nn.Module):
    """Uses another layer when the batch holds a large value, which the probe does not."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        big = (x.abs().amax(1, keepdim=True) > 10).to(x.dtype)
        hidden = self.small(x)
        if big.any():
            hidden = hidden + big * self.large(x)
        return self.head(hidden.tanh())


class ReusesWeightOnBatch(nn.Module):
    """Uses a weight a second time, outside its layer, only for some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if (x > 10).any():
            hidden = hidden + (x > 10).to(x.dtype) @ self.first.weight * 0.1
        return self.head(hidden)


@pytest.mark.parametrize(
    "build",
    [ChangesInputInPlace, SortsExamples, SortsLargeActivations, BranchesOnBatch, ReusesWeightOnBatch],
    ids=lambda b: b.__name__,
)
def test_a_batch_unlike_the_probe_is_still_right(build: type[nn.Module]):
    case = Case(build.__name__, build, lambda n: torch.randn(n, 4), 2)
    model, inputs = case.model(), case.batch(6)
    inputs[4] *= 40
    _, reference = looped(case, case.model(dtype=torch.float64), inputs.double())
    stream = engine_for(case, model, inputs[:1])(inputs)
    assert relative(put_together(list(stream)), whole(reference)) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_blocks_are_cut_alike_whatever_route_a_batch_takes(tied: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MAX_COLUMNS, "cpu", 6)
    case = BY_NAME["tied-weights"] if tied else BY_NAME["lstm"]
    model, inputs = case.model(), case.batch(5)
    engine = engine_for(case, model, inputs)
    usual = list(engine(inputs))
    monkeypatch.setattr(engine_module, "pull_back", lambda *args: Pulled(unsafe=dict.fromkeys(args[2], "for the test")))
    unusual = list(engine(inputs))
    assert [(b.name, b.start, b.size) for b in usual] == [(b.name, b.start, b.size) for b in unusual]
    assert any(isinstance(block, EmbeddingBlock) for block in usual) != tied
    assert relative(put_together(unusual), put_together(usual).double()) < 1e-6


class LengthFirst(nn.Module):
    """Examples on the second axis, with parameters broadcast over both leading axes."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        self.scale, self.shift = nn.Parameter(torch.rand(5)), nn.Parameter(torch.rand(6, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.lift(x.transpose(0, 1))
        return self.head((hidden * self.scale + self.shift).tanh().mean(0))


@pytest.mark.parametrize(
    "case",
    [
        Case("length-first", LengthFirst, lambda n: torch.randn(n, 6, 4), 2),
        Case("recurrence-only", BY_NAME["lstm"].build, BY_NAME["lstm"].inputs, 3, parameters=r"lstm\..*"),
        Case("scalar-only", BY_NAME["custom-parameters"].build, lambda n: torch.randn(n, 5, 4), 3, parameters="temp.*"),
    ],
    ids=lambda case: case.name,
)
def test_parameters_of_an_unusual_use(case: Case):
    _, reference = looped(case, case.model(dtype=torch.float64), case.batch(dtype=torch.float64))
    _, jacobian = streamed(case, case.model(), case.batch())
    assert relative(whole(jacobian), whole(reference)) < 1e-5
    assert set(routes(case).values()) <= {"linear", "arithmetic", "recurrent"}


@pytest.mark.parametrize("n", [1, 3, 7, 8])
def test_batch_sizes_that_coincide_with_other_axes(n: int):
    case = BY_NAME["transformer-dict"]  # 7 tokens, width 8, three probe examples
    _, reference = looped(case, case.model(dtype=torch.float64), case.batch(n, dtype=torch.float64))
    stream = engine_for(case, case.model(), case.batch())(case.batch(n))
    assert relative(put_together(list(stream)), whole(reference)) < 1e-5


@pytest.mark.parametrize("name", ["cnn-batchnorm", "transformer-dict", "tied-weights", "convolution-variants", "lstm"])
def test_small_blocks_are_the_large_ones_cut(name: str, monkeypatch: pytest.MonkeyPatch):
    case = BY_NAME[name]
    _, one = streamed(case, case.model(), case.batch())
    monkeypatch.setitem(MAX_COLUMNS, "cpu", 40)
    _, many = streamed(case, case.model(), case.batch())
    assert relative(whole(many), whole(one).double()) < 1e-6


def test_bfloat16_model_agrees_to_its_own_rounding():
    case = BY_NAME["cnn-batchnorm"]
    model, inputs = case.model(dtype=torch.bfloat16), case.batch(dtype=torch.bfloat16)
    _, reference = looped(case, case.model(dtype=torch.bfloat16).double(), inputs.double())
    logits, jacobian = streamed(case, model, inputs)
    assert logits.dtype == torch.float32
    assert relative(whole(jacobian), whole(reference)) < 0.05


class BatchStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if len(x) > 1 else self.body[2](self.body[0](x))


class CutsGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).detach()


class ChangesSavedInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        logits = self.head(x)
        x.zero_()
        return logits


def test_what_has_no_per_example_jacobian_is_refused():
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for model, message in [
        (BatchStatistics(), "model: an example's logits depend on the other examples of its batch"),
        (CutsGradient(), "model: the logits do not depend on any differentiated parameter"),
        (ChangesSavedInput(), "model: autograd cannot differentiate the model .* modified by an inplace operation"),
        (nn.Flatten(0), r"model: the model's output is not logits \(expected a floating-point tensor \[3, classes\]"),
    ]:
        with pytest.raises(ProjectError, match=message):
            JacobianEngine(model, parameter_blocks(model) if list(model.parameters()) else (), example=x)
    model = nn.Linear(4, 2)
    with pytest.raises(UsageError, match=r"layout=: unknown layout .*got 'mean'"):
        JacobianEngine(model, parameter_blocks(model), layout="mean", example=x)
    for inputs, message in [
        ({"a": x, "b": x[:2]}, r"differ in their number of examples \(got a \[4, 4\], b \[2, 4\]\)"),
        ([x], r"not a batch of examples .*got list"),
        (x[:0], r"not a batch of examples .*got \[0, 4\]"),
    ]:
        with pytest.raises(ProjectError, match=message):
            JacobianEngine(model, parameter_blocks(model), example=inputs)


@pytest.mark.filterwarnings("default")
def test_huggingface_bert():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    case = Case(
        "bert",
        lambda: transformers.BertForSequenceClassification(config),
        lambda n: {
            "input_ids": torch.randint(1, 61, (n, 9)),
            "attention_mask": (torch.arange(9) < torch.randint(4, 10, (n, 1))).long(),
        },
        3,
        forward=lambda model, x: model(**x).logits,
    )
    _, reference = looped(case, case.model(dtype=torch.float64), case.batch(dtype=torch.float64))
    _, jacobian = streamed(case, case.model(), case.batch())
    assert relative(whole(jacobian), whole(reference)) < 1e-5
    assert set(routes(case).values()) == {"embedding", "layer norm", "linear"}


PEAK = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
from cases import SmallCNN
from torch import nn
from gradstore.jacobians import JacobianEngine
from gradstore.model.parameters import parameter_blocks
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64),
                      nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4096, 256), nn.ReLU(), nn.Linear(256, 10))
n = 24
x = torch.randn(n, 3, 32, 32)
engine = JacobianEngine(model, parameter_blocks(model), example=x)
def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # the peak starts again from here
base = kilobytes("VmRSS")
for block in engine(x):
    block.dense()
held = (kilobytes("VmHWM") - base) * 1024
print(held, engine.bytes_needed(n), n * 10 * sum(p.numel() for p in model.parameters()) * 4)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as Linux reports it")
def test_measured_memory_is_what_bytes_needed_says():
    here = Path(__file__).parents[1]
    command = [sys.executable, "-c", PEAK, str(here), str(here.parent)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    measured, estimate, full = map(int, done.stdout.split())
    assert estimate < full / 2  # the whole Jacobian would not fit in what the estimate allows
    assert measured < 1.15 * estimate
    assert estimate < 4 * measured


@pytest.mark.parametrize("name", ["digits", "transformer-dict", "lstm", "convolution-variants"])
def test_bits_do_not_depend_on_the_number_of_threads(name: str):
    case = BY_NAME.get(name, Case(name, lambda: SmallCNN(10), lambda n: torch.randn(n, 1, 8, 8), 10))
    found = []
    for count in (1, 2, 3, 4):
        with torch_threads(count):
            found.append(whole(streamed(case, case.model(), case.batch(16))[1]))
            assert torch.get_num_threads() == count
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_classes_that_arrive_together_share_one_memory(monkeypatch: pytest.MonkeyPatch):
    """The first threads to bring a class would each make room for all of them, and all but one class be lost."""

    def slowly(*args: Any) -> Tensor:
        time.sleep(0.05)
        return torch.full(args[0], torch.nan)

    monkeypatch.setattr(terms, "reused", slowly)
    made = [
        terms.ReducedTerm(2, 4, (3,), lambda delta: delta),
        terms.OuterTerm(4, 3, 5, lambda: torch.ones(2, 1, 1, 5), by_position=False),
        terms.OuterTerm(4, 3, 5, lambda: torch.ones(2, 1, 1, 5), by_position=True),
        terms.IndexTerm(4, torch.zeros(2, 3).long(), 7, 1, None),
    ]
    deltas = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    shapes = [(2, 1, 3), (2, 1, 3, 1), (2, 1, 3, 1), (2, 1, 1, 3)]
    with torch_threads(4):
        for term, shape in zip(made, shapes, strict=True):
            side_by_side(lambda share: [term.absorb(c, deltas[c].view(shape)) for c in share], 4, deltas.device)  # noqa: B023
            assert term._kept is not None
            kept = term.deltas if isinstance(term, terms.OuterTerm) else term._kept
            assert torch.equal(kept.flatten(2), deltas.transpose(0, 1)), type(term).__name__


def test_an_error_in_one_share_is_raised_after_all_have_ended():
    ended = []

    def work(share: range) -> None:
        if 2 in share:
            raise ArithmeticError("class 2")
        time.sleep(0.05)
        ended.append(share.start)

    with torch_threads(4), pytest.raises(ArithmeticError, match="class 2"):
        side_by_side(work, 8, torch.device("cpu"))
    assert sorted(ended) == [0, 1, 3]


def test_a_block_that_is_still_held_keeps_its_values():
    case = Case("digits", lambda: SmallCNN(10), lambda n: torch.randn(n, 1, 8, 8), 10)
    engine = engine_for(case, case.model(), case.batch(8))
    kept = [block.dense() for block in engine(case.batch(8))]
    copies = [values.clone() for values in kept]
    views = [values[:, 1] for values in kept]
    for block in engine(case.batch(8, seed=2)):
        block.dense()
    del kept
    for block in engine(case.batch(8, seed=3)):
        block.dense()
    assert all(torch.equal(view, copy[:, 1]) for view, copy in zip(views, copies, strict=True))


def test_a_dropped_block_lends_its_memory_to_the_next():
    like = torch.empty(0)
    drop_spare()
    first = reused((1 << 20,), like)
    place = first.data_ptr()
    view = first[5:]
    del first
    other = reused((1 << 19,), like)
    assert other.data_ptr() != place, "a view still holds it"
    del view
    assert reused((1 << 20,), like).data_ptr() == place
    drop_spare()
