"""Models as people write them that were refused, crashed or ran slowly for no good reason, each standing for a kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_layers import Uses
from test_rules import looped, moved, streamed
from torch import Tensor, nn

import gradstore as gs
from gradstore.errors import ProjectError
from gradstore.jacobians import JacobianEngine, forward_record, generic_routes
from gradstore.jacobians.by_autograd import by_loop, by_torch_func
from gradstore.jacobians.rules import ARGUMENTS, RULES
from gradstore.jacobians.terms import ReducedTerm
from gradstore.jacobians.uses import Use, channels_last
from gradstore.jacobians.weight_functions import WeightFunction
from gradstore.model.parameters import parameter_blocks

pytestmark = pytest.mark.numerical
ROWS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Forward = Callable[[nn.Module, Any], Tensor]


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return moved(build()).eval()


def engine_of(model: nn.Module, example: Any, forward: Forward | None = None) -> JacobianEngine:
    return JacobianEngine(model, parameter_blocks(model), forward=forward, example=example)


def routes(model: nn.Module, example: Any, forward: Forward | None = None) -> dict[str, str]:
    return dict(engine_of(model, example, forward).describe())


def error(ours: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest of a parameter's, an example's and a class's, over the norm of that parameter's gradient."""
    scale = {name: values.norm(dim=-1).max() for name, values in want.items()}
    return max(float((ours[name] - want[name]).norm(dim=-1).max() / scale[name].clamp(min=1e-30)) for name in want)


def agrees(model: nn.Module, batch: Tensor, tolerance: float = 1e-5, **options: Any) -> None:
    """The model's Jacobian is that of its copy in float64, where that is all the same computation."""
    exact = looped(copy.deepcopy(model).double(), batch.double() if batch.is_floating_point() else batch)
    assert error(streamed(engine_of(model, batch[:2], **options), batch), exact) < tolerance


# -- an odd layer costs the others nothing ---------------------------------------------------------------------------


def with_prelu() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Flatten(), nn.Linear(64, 3))


def test_a_slope_beside_a_convolution() -> None:
    model = seeded(with_prelu)
    assert [*routes(model, IMAGES).values()] == ["convolution", "convolution", "arithmetic", "linear", "linear"]
    agrees(model, IMAGES)


@pytest.mark.parametrize("gone", [(torch.prelu,), (torch.prelu, F.conv2d)], ids=["slope", "slope and convolution"])
def test_where_no_rule_knows_the_slope_only_it_is_slow(gone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_record, "RULES", {f: rule for f, rule in RULES.items() if f not in gone})
    model = seeded(with_prelu)
    found = routes(model, IMAGES)
    assert found["1.weight"].startswith(("torch.func", "autograd by example"))
    # under torch.func the slope of torch 2.13 gives gradients of another shape to what is before it too
    assert found["0.weight"] == "convolution" if len(gone) == 1 else "loop" not in found["0.weight"]
    assert found["3.weight"] == "linear"
    agrees(model, IMAGES)


NORMS_OF_ROWS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch": (lambda: nn.BatchNorm1d(8), "batch norm"),
    "group": (lambda: nn.GroupNorm(2, 8), "group norm"),
    "instance": (
        lambda: Uses(
            lambda x, w, b, mean, var: F.instance_norm(x[..., None], mean, var, w, b, use_input_stats=False)[..., 0],
            w=torch.ones(8),
            b=torch.ones(8),
            fixed_mean=torch.zeros(8),
            fixed_var=torch.ones(8),
        ),
        "instance norm",
    ),
}


@pytest.mark.parametrize("kind", NORMS_OF_ROWS)
def test_a_norm_of_rows(kind: str) -> None:
    build, route = NORMS_OF_ROWS[kind]
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 8), build(), nn.Tanh(), nn.Linear(8, 3)))
    assert set(routes(model, ROWS).values()) == {"linear", route}
    agrees(model, ROWS)


class BrokenError(RuntimeError):
    pass


def raises(*_: Any) -> Any:
    raise BrokenError("of the rule")


class BreaksWhenRead(ReducedTerm):
    def values(self, first: int, last: int) -> Tensor:
        raise BrokenError("when it was read")


def at_call(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use:
    return raises()


def at_term(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use:
    return Use("broken", channels_last, ("first",), {"weight": raises, "bias": raises})


def at_view(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use:
    good = RULES[F.linear](x, weight, bias)
    return Use("broken", raises, ("first",), good.terms)


def at_values(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use:
    def term(batch: Any) -> Any:
        return BreaksWhenRead(
            batch.n, batch.classes, tuple(weight.shape), lambda d: d.new_zeros(*d.shape[:2], *weight.shape)
        )

    return Use("broken", channels_last, ("first",), {"weight": term, "bias": term})


@pytest.mark.parametrize("rule", [at_call, at_term, at_view, at_values], ids=lambda rule: rule.__name__)
def test_an_exception_in_a_rule_costs_the_parameters_of_its_call_only(
    rule: Callable[..., Use], monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_second(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return (rule if len(weight) == 7 else RULES[F.linear])(input, weight, bias)

    monkeypatch.setattr(forward_record, "RULES", {**RULES, F.linear: only_second})
    monkeypatch.setitem(ARGUMENTS, only_second, ["input", "weight", "bias"])
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)))
    found = routes(model, ROWS)
    assert [name for name, route in found.items() if route != "linear"] == ["2.weight", "2.bias"]
    assert rule is at_call or "BrokenError in" in found["2.weight"]
    agrees(model, ROWS)


@pytest.mark.parametrize("fault", ["shape", "value", "exception", "not a tensor"])
def test_a_generic_route_that_fails_for_one_parameter_serves_the_others(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(subject: Any, names: list[str], inputs: Any, cotangents: Tensor) -> list[Any]:
        found: list[Any] = by_torch_func(subject, names, inputs, cotangents)
        for place, name in enumerate(names):
            if name == "2.weight":
                if fault == "exception":
                    raise BrokenError("of this parameter")
                changes = {"shape": found[place][..., 1:], "value": 1.01 * found[place], "not a tensor": None}
                found[place] = changes[fault]
        return found

    monkeypatch.setattr(forward_record, "RULES", {})
    monkeypatch.setattr(generic_routes, "by_torch_func", failing)
    monkeypatch.setitem(generic_routes.WORDS, failing, "torch.func")
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
    found = {name: route.split(" (")[0] for name, route in routes(model, ROWS).items()}
    others = dict.fromkeys(("0.weight", "0.bias", "2.bias"), "torch.func")
    assert found == {**others, "2.weight": "autograd by example"}
    agrees(model, ROWS)


@pytest.mark.parametrize("bad", range(2**5))
def test_every_parameter_that_a_generic_route_serves_takes_it(bad: int) -> None:
    names = list("abcde")
    refused = {name for place, name in enumerate(names) if bad >> place & 1}

    def right(route: Any, names: list[str]) -> dict[str, bool]:
        if route is by_torch_func and refused & {*names}:
            raise BrokenError("always the same")
        return dict.fromkeys(names, True)

    found = generic_routes.generic_routes(names, right)
    assert {name for name, route in found.items() if route is not by_torch_func} == refused


def test_a_generic_route_that_serves_nothing_is_soon_given_up() -> None:
    tries: list[Any] = []

    def right(route: Any, names: list[str]) -> dict[str, bool]:
        tries.append(route)
        raise BrokenError("always the same")

    found = generic_routes.generic_routes([str(i) for i in range(200)], right)
    assert set(found.values()) == {by_loop}
    assert len(tries) <= 20


class Tripled(torch.autograd.Function):
    """Its backward pass is one that vmap refuses."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return 3 * w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.new_tensor((3 * gradient).tolist())


@pytest.mark.parametrize("function", [torch.exp, Tripled.apply], ids=["by vmap", "row by row"])
def test_a_function_of_a_weight_is_pulled_back(function: Callable[..., Tensor]) -> None:
    w = ROWS.clone().requires_grad_()
    rows = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    found = WeightFunction(function(w), ("w",)).pull_back(rows, {"w": w})["w"]
    torch.testing.assert_close(found, rows * (3 if function is not torch.exp else w.detach().exp().view(1, -1)))


class Distances(nn.Module):
    """Under `torch.func`, torch.cdist gives wrong gradients of several classes, and right ones of one."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x[:, None], self.centres)[:, 0].square()


def test_a_generic_route_that_is_right_for_one_class_only_is_not_taken() -> None:
    model = seeded(Distances)
    assert routes(model, ROWS)["centres"] == "autograd by example (used outside a known layer)"
    agrees(model, ROWS)


# -- dtypes ----------------------------------------------------------------------------------------------------------


class Body(nn.Module):
    """A body in one dtype whose logits come out in another."""

    def __init__(self, dtype: torch.dtype, logits: torch.dtype) -> None:
        super().__init__()
        self.logits = logits
        self.body = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.to(self.head.weight.dtype))).to(self.logits)


DTYPES = [
    (torch.float32, torch.float64, 1e-5),
    (torch.bfloat16, torch.float32, 0.1),
    (torch.float16, torch.float32, 0.01),
    (torch.bfloat16, torch.float64, 0.1),
    (torch.float64, torch.float32, 1e-6),
]


@pytest.mark.parametrize(("dtype", "logits", "tolerance"), DTYPES, ids=str)
def test_logits_in_another_dtype_than_the_body(dtype: torch.dtype, logits: torch.dtype, tolerance: float) -> None:
    model = seeded(lambda: Body(dtype, logits))
    assert set(routes(model, ROWS).values()) == {"linear", "layer norm"}
    exact = copy.deepcopy(model).double()
    exact.logits = torch.float64
    assert error(streamed(engine_of(model, ROWS[:2]), ROWS), looped(exact, ROWS.double())) < tolerance


def test_autocast_inside_the_forward_pass() -> None:
    model = seeded(lambda: Body(torch.float32, torch.float32))

    def autocast(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert set(routes(model, ROWS, autocast).values()) == {"linear", "layer norm"}
    exact = copy.deepcopy(model).double()
    exact.logits = torch.float64
    ours = streamed(engine_of(model, ROWS[:2], autocast), ROWS)
    assert 1e-5 < error(ours, looped(exact, ROWS.double())) < 0.1


# -- sparse tensors and inference mode -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("known", [True, False], ids=["by rule", "by a generic route"])
def test_sparse_gradients(kind: Any, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:
        monkeypatch.setattr(forward_record, "RULES", {})
    ids = torch.randint(0, 7, (5, 4), generator=torch.Generator().manual_seed(0))
    width = 12 if kind is nn.Embedding else 3
    model = seeded(lambda: nn.Sequential(kind(7, 3, sparse=True), nn.Flatten(), nn.Linear(width, 3)))
    assert (routes(model, ids)["0.weight"] in ("embedding", "embedding bag")) == known
    agrees(model, ids)


@pytest.mark.parametrize("product", [torch.sparse.mm, torch.matmul, F.linear], ids=lambda product: product.__name__)
def test_sparse_examples(product: Callable[..., Tensor]) -> None:
    rows = ROWS * (ROWS > 0)

    def of(product: Callable[..., Tensor]) -> nn.Module:
        w = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
        return Uses(lambda x, w, b: product(x, w).tanh() + b, w=w if product is F.linear else w.t(), b=torch.ones(3))

    engine = engine_of(of(product), rows.to_sparse())
    assert not engine.generic()
    dense = of(F.linear if product is F.linear else torch.mm).double()
    assert error(streamed(engine, rows.to_sparse()), looped(dense, rows.double())) < 1e-5


@pytest.mark.parametrize("known", [True, False], ids=["by rules", "by a generic route"])
def test_buffers_and_examples_made_in_inference_mode(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:
        monkeypatch.setattr(forward_record, "RULES", {})
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)))
    plain = copy.deepcopy(model).double()
    with torch.inference_mode():
        model[1].running_mean = model[1].running_mean.clone()
        model[1].running_var = model[1].running_var + 0
        rows = ROWS.clone()
    made = model[1].running_mean
    assert bool(engine_of(model, rows).generic()) != known
    assert error(streamed(engine_of(model, rows), rows), looped(plain, ROWS.double())) < 1e-5
    assert model[1].running_mean is made


def test_a_model_made_in_inference_mode_is_refused_in_one_line() -> None:
    with torch.inference_mode():
        model = nn.Linear(5, 3)
    with pytest.raises(ProjectError) as refused:
        engine_of(model, ROWS)
    assert str(refused.value) == (
        "model, parameter weight: the model was made in inference mode, so autograd cannot differentiate it (expected "
        "a parameter made outside torch.inference_mode()). Build the model and load its weights outside of "
        "torch.inference_mode()."
    )


LIKE_A_SUM: dict[str, tuple[Callable[[], nn.Module], list[list[int]], list[list[int]]]] = {
    "embedding by frequency": (
        lambda: nn.Embedding(6, 3, scale_grad_by_freq=True),
        [[0, 1], [2, 3], [4, 5]],
        [[0, 0], [2, 3], [1, 1]],
    ),
    "bag by frequency": (
        lambda: nn.EmbeddingBag(6, 3, scale_grad_by_freq=True),
        [[0, 1], [2, 3], [4, 5]],
        [[0, 0], [2, 3], [1, 1]],
    ),
    "largest of a bag": (lambda: nn.EmbeddingBag(6, 3, mode="max"), [[0], [1], [2]], [[0, 1], [2, 3], [4, 5]]),
}


@pytest.mark.parametrize("kind", LIKE_A_SUM)
def test_what_the_probe_does_not_show(kind: str) -> None:
    build, probe, batch = LIKE_A_SUM[kind]
    model = seeded(lambda: Uses(lambda ids, m: m(ids).reshape(len(ids), -1, 3).sum(1).tanh(), m=build()))
    want = looped(copy.deepcopy(model).double(), torch.tensor(batch))
    assert error(streamed(engine_of(model, torch.tensor(probe)), torch.tensor(batch)), want) < 1e-5


# -- what a forward pass writes --------------------------------------------------------------------------------------


class Writing(nn.Module):
    """Counts its calls, follows statistics of its own, replaces a buffer, and shrinks the rows that it looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4, max_norm=0.7)
        self.bags = nn.EmbeddingBag(7, 4, max_norm=0.6)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("last", torch.zeros(4))
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        hidden = torch.cat([self.words(ids).mean(1), self.bags(ids)], 1)
        self.mean.mul_(0.9).add_(0.1 * hidden[:, :4].detach().mean(0))
        self.last = hidden[0, :4].detach()
        return self.head(hidden.tanh())


IDS = torch.randint(0, 7, (12, 5), generator=torch.Generator().manual_seed(0))


def state(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (id(value), value.detach().clone()) for name, value in tensors.items()}


@pytest.mark.parametrize("call", ["engine", "batch", "logits", "alone", "project"])
def test_every_call_leaves_buffers_and_weights_as_they_were(call: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Writing().eval()
    engine = engine_of(copy.deepcopy(model), IDS)
    before = state(model)
    if call == "engine":
        engine_of(model, IDS)
    elif call == "project":
        items = [(row, 0) for row in IDS]
        gs.Project(model=model, splits={"train": items}).prepare().logits(IDS)
    else:
        engine = engine_of(model, IDS)
        if call == "batch":
            assert not engine.generic()
            streamed(engine, IDS)
        elif call == "logits":
            engine.logits([IDS])
        else:
            engine.alone(IDS[:1], ["head.weight"], torch.ones(3))
    after = state(model)
    assert all(before[name][0] == after[name][0] for name in before)
    assert all(torch.equal(before[name][1], after[name][1]) for name in before)


def test_stores_of_a_model_that_writes_go_together(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Writing()
    items = [(row, i % 3) for i, row in enumerate(IDS)]
    project = gs.Project(model=model, splits={"train": items[:8], "test": items[8:]})
    train = gs.featurize(project, split="train", out=tmp_path / "train", proj_dim=64)
    test = gs.featurize(project, split="test", out=tmp_path / "test", proj_dim=64)
    found = gs.topk(train, test, k=2)
    assert found.indices.shape == (4, 2)
    assert np.isfinite(found.similarity).all()
    assert int(model.calls) == 0


# -- what cannot be served is said in one line -----------------------------------------------------------------------


def test_a_net_that_ends_in_relu_keeps_its_routes() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), nn.ReLU()))
    assert set(routes(model, ROWS).values()) == {"linear"}
    agrees(model, ROWS)
    with torch.no_grad():
        silent = model(ROWS) == 0
    assert silent.any()
    found = streamed(engine_of(model, ROWS), ROWS)
    assert all((values.abs().sum(-1)[silent] == 0).all() for values in found.values())


def test_a_net_that_fails_on_a_batch_of_one() -> None:
    model = seeded(lambda: Uses(lambda x, m: m(x).squeeze().softmax(1), m=nn.Linear(5, 3)))
    with pytest.raises(ProjectError, match=r"the model fails on a batch of one example.*squeeze.*forward=") as refused:
        engine_of(model, ROWS)
    assert "\n" not in str(refused.value)


class Refuses(torch.autograd.Function):
    """Identity whose backward pass raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: Any) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise ctx.error


ERRORS = [AssertionError(), AssertionError("two\nlines"), KeyError("key"), NotImplementedError(), BrokenError("x")]


@pytest.mark.parametrize("raised", ERRORS, ids=repr)
def test_an_exception_in_a_backward_pass(raised: Exception) -> None:
    model = seeded(lambda: Uses(lambda x, m: Refuses.apply(m(x), raised), m=nn.Linear(5, 3)))
    with pytest.raises(ProjectError, match=r"autograd cannot differentiate the model .*backward") as refused:
        engine_of(model, ROWS)
    assert type(raised).__name__ in str(refused.value)
    assert "\n" not in str(refused.value)


# -- compiled and scripted models ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "part"])
def test_a_compiled_model_keeps_its_routes(backend: str, whole: bool) -> None:
    plain = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)))
    compiled = torch.compile(plain, backend=backend)
    model = compiled if whole else nn.Sequential(compiled, nn.Linear(3, 2))
    with torch.no_grad():
        model(ROWS)  # is compiled before the engine sees it
    if hasattr(torch.compiler, "set_stance"):
        assert set(routes(model, ROWS).values()) == {"linear", "layer norm"}
    want = looped(copy.deepcopy(plain if whole else nn.Sequential(plain, model[1])).double(), ROWS.double())
    ours = {name.replace("_orig_mod.", ""): values for name, values in streamed(engine_of(model, ROWS), ROWS).items()}
    assert error(ours, want) < 1e-5


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_model_takes_a_generic_route() -> None:
    plain = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)))
    model = torch.jit.script(plain)
    assert all(route.startswith(("torch.func", "autograd")) for route in routes(model, ROWS).values())
    assert error(streamed(engine_of(model, ROWS), ROWS), looped(copy.deepcopy(plain).double(), ROWS.double())) < 1e-5
