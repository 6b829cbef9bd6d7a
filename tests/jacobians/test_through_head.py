"""More classes than inputs of the last layer: d rows below it stand for all classes, as float64 autograd has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case
from test_jacobians import looped, relative, whole
from torch import Tensor, nn
from torch_threads import torch_threads

from gradstore.jacobians import JacobianEngine, LinearBlock, LoweredBlock, OwnRowBlock, join_blocks, through_head
from gradstore.jacobians.blocks import DenseBlock, EmbeddingBlock, JacobianBlock
from gradstore.jacobians.footprint import MAX_COLUMNS
from gradstore.model.parameters import parameter_blocks
from gradstore.projection import Projection
from gradstore.projection.projection_audit import ProjectionAudit

pytestmark = pytest.mark.numerical
C, D, K = 40, 5, 256


class Body(nn.Module):
    """Embedding, convolution, norms, a residual: what a rule covers, down to d outputs."""

    def __init__(self, outputs: int = D) -> None:
        super().__init__()
        self.embed, self.lift = nn.Embedding(13, 6), nn.Linear(6, 8)
        self.convolution, self.norm = nn.Conv1d(8, 8, 3, padding=1, bias=False), nn.BatchNorm1d(8)
        self.out = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, outputs), nn.Tanh())

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.lift(self.embed(ids))).transpose(1, 2)
        return self.out((hidden + torch.relu(self.norm(self.convolution(hidden)))).mean(2))


class Net(nn.Module):
    """A body and a head, with something done to what goes in and comes out."""

    def __init__(
        self,
        before: Callable[[Tensor], Tensor] = lambda z: z,
        after: Callable[[Tensor], Tensor] = lambda logits: logits,
        head: Callable[[], nn.Module] = lambda: nn.Linear(D, C),
    ) -> None:
        super().__init__()
        self.body, self.head = Body(), head()
        self.before, self.after = before, after

    def forward(self, ids: Tensor) -> Tensor:
        return self.after(self.head(self.before(self.body(ids))))


class Vectors(nn.Module):
    """On vectors, for what depends on their values."""

    def __init__(self, hidden: Callable[[Vectors, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, D), nn.Linear(D, D), nn.Linear(D, C)
        self._hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._hidden(self, x))


class Tied(Net):
    """The head's weight is the embedding of a class, too."""

    def __init__(self) -> None:
        super().__init__()
        self.names = nn.Embedding(C, D)
        self.head.weight = self.names.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(ids) + self.names(ids[:, 0]))


class InputsChanged(Vectors):
    """The head's inputs are changed in place once it has read them; it is not learned, so autograd does not mind."""

    def __init__(self) -> None:
        super().__init__(lambda net, x: net.second(net.first(x).tanh()))

    def forward(self, x: Tensor) -> Tensor:
        z = self._hidden(self, x) * 1
        logits = F.linear(z, self.head.weight.detach(), self.head.bias)
        z.mul_(3)
        return logits


def weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(D, C))


def hooked(logits: Tensor) -> Tensor:
    """Whose gradient is another than the graph says."""
    if logits.requires_grad:
        logits.register_hook(lambda gradient: 2 * gradient)
    return logits


def ids(n: int) -> Tensor:
    return torch.randint(0, 13, (n, 7))


def vectors(n: int) -> Tensor:
    return torch.randn(n, 4)


def functional(net: Vectors, x: Tensor) -> Tensor:
    """A weight in no layer, so that its parameter takes a general route."""
    return torch.tanh(net.first(x) @ net.second.weight.exp() + net.second.bias)


SERVED = [
    Case("whole", Net, ids, C),
    Case("no bias", lambda: Net(head=lambda: nn.Linear(D, C, bias=False)), ids, C),
    Case("body alone", Net, ids, C, parameters=r"body\..*"),
    Case("head alone", Net, ids, C, parameters=r"head\..*"),
    Case("head's bias and body", Net, ids, C, parameters=r"head\.bias|body\..*"),
    Case("head's weight and a norm", Net, ids, C, parameters=r"head\.weight|body\.norm\..*"),
    Case("a general route below", lambda: Vectors(functional), vectors, C),
    Case("no general route", lambda: Vectors(lambda net, x: net.second(net.first(x).tanh())), vectors, C),
    Case("hook on the inputs", lambda: Net(before=hooked), ids, C),
    Case("a dict", Net, lambda n: {"ids": ids(n)}, C, forward=lambda model, x: model(x["ids"])),
]
LEFT_ALONE = [
    Case("tied", Tied, ids, C),
    Case("scaled", lambda: Net(after=lambda logits: 3 * logits), ids, C),
    Case("scaled in place", lambda: Net(after=lambda logits: logits.mul_(3)), ids, C),
    Case("cut", lambda: Net(after=lambda logits: logits[:, 1:]), ids, C - 1),
    Case("softmax", lambda: Net(after=lambda logits: logits.log_softmax(1)), ids, C),
    Case("weight norm", lambda: Net(head=weight_norm), ids, C),
    Case("a hook", lambda: Net(after=hooked), ids, C),
    Case("inputs changed later", InputsChanged, vectors, C),
    Case(
        "as many inputs as classes", lambda: Net(head=lambda: nn.Sequential(nn.Linear(D, 30), nn.Linear(30, C))), ids, C
    ),
]
ALL = pytest.mark.parametrize("case", SERVED + LEFT_ALONE, ids=lambda case: case.name)


def engine_for(case: Case, model: nn.Module, inputs: Any, **options: Any) -> JacobianEngine:
    blocks = parameter_blocks(model, case.parameters)
    return JacobianEngine(model, blocks, forward=case.forward, example=inputs, proj_dim=K, **options)


def put_together(blocks: list[JacobianBlock]) -> Tensor:
    return torch.cat([block.dense() for block in blocks], -1)


def exact(case: Case, inputs: Any) -> Tensor:
    wide = inputs.double() if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs
    return whole(looped(case, case.model(dtype=torch.float64), wide)[1])


@ALL
def test_rows_are_those_of_looped_float64(case: Case):
    inputs = case.batch(6)
    reference = exact(case, inputs)
    engine = engine_for(case, case.model(), inputs)
    assert engine.below == (D if case in SERVED else 0)
    blocks = list(engine(inputs))
    assert relative(put_together(blocks), reference) < 1e-5
    norms = sum(block.sq_norm() for block in blocks)
    torch.testing.assert_close(norms, reference.square().sum(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_blocks_pick_combine_and_multiply_what_their_values_say(case: Case):
    inputs, u = case.batch(4), torch.randn(C, generator=torch.Generator().manual_seed(5))
    values, at = put_together(list(engine_for(case, case.model(), inputs)(inputs))), 0
    for block in engine_for(case, case.model(), inputs)(inputs):
        own = values[..., at : at + block.size]
        at += block.size
        scale = float(own.abs().max())
        for formed in (False, True):
            if formed:
                block.dense()
            torch.testing.assert_close(
                dense(block.combined(2, u, formed=formed), block), u @ own[2], rtol=1e-4, atol=1e-4 * scale
            )
            for c in (0, 7, C - 1):
                torch.testing.assert_close(
                    dense(block.picked(1, c, formed=formed), block), own[1, c], rtol=1e-4, atol=1e-4 * scale
                )
        wide = own.double()
        torch.testing.assert_close(block.sq_norm(), wide.square().sum(2), rtol=1e-5, atol=1e-9 * scale**2)
        torch.testing.assert_close(block.inner_products(), wide @ wide.transpose(1, 2), rtol=1e-4, atol=1e-5 * scale**2)


def dense(part: JacobianBlock, block: JacobianBlock) -> Tensor:
    """The values of one row, wherever in the block they begin."""
    out = torch.zeros(block.size)
    at = part.start - block.start
    out[at : at + part.size] = part.dense()[0, 0]
    return out


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_each_route_is_said_and_only_rules_are_lowered(case: Case):
    inputs = case.batch(3)
    engine = engine_for(case, case.model(), inputs)
    kinds = {block.name: type(block) for block in engine(inputs)}
    for name, route in engine.describe():
        if name.startswith("head."):
            assert (kinds[name], route) == (OwnRowBlock, "linear, own row a class")
        elif "torch.func" in route:
            assert kinds[name] is DenseBlock
        else:
            assert kinds[name] is LoweredBlock
            assert route.endswith(", 5 rows for 40 classes")
    assert [name for name, _ in engine.generic()] == [n for n, k in kinds.items() if k is DenseBlock]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype):
    case = Case("vectors", lambda: Vectors(lambda net, x: net.second(net.first(x).tanh())), vectors, C)
    model, inputs = case.model(dtype=dtype), case.batch(6, dtype=dtype)
    _, reference = looped(case, case.model(dtype=dtype).double(), inputs.double())
    engine = engine_for(case, model, inputs)
    assert engine.below == D
    assert relative(put_together(list(engine(inputs))), whole(reference)) < (1e-6 if dtype == torch.float64 else 0.03)


def test_under_autocast_the_weight_is_another_so_classes_are_differentiated():
    case = Case("vectors", lambda: Vectors(lambda net, x: net.second(net.first(x).tanh())), vectors, C)

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    model = case.model()
    assert JacobianEngine(model, parameter_blocks(model), forward=forward, example=case.batch(3), proj_dim=K).below == 0


def test_only_where_it_is_asked_for_and_pays():
    case = SERVED[0]
    inputs, model = case.batch(3), case.model()
    blocks = parameter_blocks(model)
    assert JacobianEngine(model, blocks, example=inputs).below == 0
    assert JacobianEngine(model, blocks, example=inputs, layout="sum", proj_dim=K).below == 0
    assert not through_head.pays(classes=10, rows=5, K=10240)
    assert not through_head.pays(classes=1000, rows=0, K=10240)
    assert through_head.pays(classes=1000, rows=64, K=1)
    # inner products of so many rows take longer than what they save, unless rows are multiplied by a large P
    assert not through_head.pays(classes=1000, rows=450, K=128)
    assert through_head.pays(classes=1000, rows=450, K=10240)


def test_some_classes_are_differentiated_as_ever():
    case = SERVED[0]
    inputs = case.batch(4)
    engine = engine_for(case, case.model(), inputs)
    blocks = list(engine(inputs, slice(3, 20)))
    assert not any(isinstance(block, (LoweredBlock, OwnRowBlock)) for block in blocks)
    assert relative(put_together(blocks), exact(case, inputs)[:, 3:20]) < 1e-5


# -- batches unlike the probe --------------------------------------------------------------------------------------


def sorts(net: Vectors, x: Tensor) -> Tensor:
    order = x[:, 0].argsort(stable=True)
    return net.second(net.first(x[order]).tanh())[order.argsort()]


def reuses(net: Vectors, x: Tensor) -> Tensor:
    hidden = net.second(net.first(x).tanh())
    if (x > 10).any():
        hidden = hidden + (x > 10).to(x.dtype) @ net.first.weight.T[:, :D] * 0.1
    return hidden


def reuses_head(net: Vectors, x: Tensor) -> Tensor:
    hidden = net.second(net.first(x).tanh())
    if (x > 10).any():
        hidden = hidden + (x > 10).to(x.dtype) @ net.head.weight[:4] * 0.1
    return hidden


def branches(net: Vectors, x: Tensor) -> Tensor:
    hidden = net.first(x).tanh()
    return net.second(hidden) + (net.second(hidden.cos()) * 0.1 if (x > 10).any() else 0)


@pytest.mark.parametrize("hidden", [sorts, reuses, reuses_head, branches], ids=lambda hidden: hidden.__name__)
def test_a_batch_unlike_the_probe_is_still_right(hidden: Callable[[Vectors, Tensor], Tensor]):
    case = Case(hidden.__name__, lambda: Vectors(hidden), vectors, C)
    inputs = case.batch(6)
    inputs[4] *= 40
    engine = engine_for(case, case.model(), inputs[:1])
    assert engine.below == D
    stream = engine(inputs)
    blocks = list(stream)
    assert not stream.trusted
    assert any(isinstance(block, DenseBlock) for block in blocks)
    assert relative(put_together(blocks), exact(case, inputs)) < 1e-5


def test_logits_that_only_a_batch_scales_in_place():
    def after(logits: Tensor) -> Tensor:
        return logits.mul_(2) if len(logits) > 4 else logits

    case = Case("scales", lambda: Net(after=after), ids, C)
    inputs = case.batch(6)
    engine = engine_for(case, case.model(), inputs[:3])
    assert engine.below == D
    blocks = list(engine(inputs))
    assert not any(isinstance(block, LoweredBlock) for block in blocks)
    reference = torch.cat([exact(case, inputs[i : i + 1]) for i in range(6)])
    assert relative(put_together(blocks), 2 * reference) < 1e-5


class Backward(torch.autograd.Function):
    """The identity, whose backward pass gives a gradient of the same length and another direction where classes do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.abs()


def test_a_backward_pass_that_is_not_linear_is_seen_by_the_audit_of_a_batch():
    def hidden(net: Vectors, x: Tensor) -> Tensor:
        out = net.second(net.first(x).tanh())
        return Backward.apply(out) if (x > 10).any() else out

    case = Case("absolute", lambda: Vectors(hidden), vectors, C)
    inputs = case.batch(6)
    inputs[4] *= 40
    stream = engine_for(case, case.model(), inputs[:1])(inputs)
    assert not stream.trusted


# -- blocks --------------------------------------------------------------------------------------------------------


def test_classes_that_cancel_keep_their_norms():
    """Rows below that are almost alike, and classes that are their differences: what is left is 1e-4 of the terms."""
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(3, 1, 1000, generator=draw)
    values = common + 1e-4 * torch.randn(3, 8, 1000, generator=draw)
    weight = torch.randn(50, 8, generator=draw)
    weight -= weight.mean(1, keepdim=True)
    block = LoweredBlock(DenseBlock("p", 0, values), weight)
    reference = torch.einsum("cm,nmp->ncp", weight.double(), values.double())
    torch.testing.assert_close(block.sq_norm(), reference.square().sum(2), rtol=1e-6, atol=0)
    terms = torch.einsum("cm,nm->nc", weight.double().square(), values.double().square().sum(2))
    torch.testing.assert_close(block.added_up(), terms, rtol=1e-9, atol=0)
    # Features and values are float32 sums of the terms: right to what that leaves of so much smaller a sum.
    error = (block.dense().double() - reference).norm(dim=2)
    assert float((error / terms.sqrt()).max()) < 3e-7
    opposite = LoweredBlock(DenseBlock("p", 0, common.expand(3, 2, 1000)), torch.tensor([[1.0, -1.0]]))
    assert opposite.sq_norm().tolist() == [[0.0]] * 3
    alike = LoweredBlock(DenseBlock("p", 0, common.expand(3, 8, 1000)), weight)
    assert float(alike.sq_norm().min()) >= 0  # not a rounding error below
    assert float(opposite.sq_terms(1, torch.ones(1))) == pytest.approx(2 * float(common[1].double().square().sum()))


def test_an_audit_allows_for_the_rounding_of_what_cancels():
    common = torch.randn(1, 1, 1000, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    block = LoweredBlock(DenseBlock("p", 0, common.expand(1, 2, 1000)), weight)
    for mixed, classes in ((False, 1), (True, 2)):
        audit = ProjectionAudit(Projection(dim=8), [range(1)], 2, mixed=mixed, first_k=0, device=torch.device("cpu"))
        audit.look(0, block, formed=False)
        terms = float(audit.compare(torch.zeros(1, 2, 8)).sq_terms)
        assert terms == pytest.approx(classes * 2 * float(common.double().square().sum()))


@pytest.mark.parametrize("positions", [1, 2, 40])
@pytest.mark.parametrize("kind", ["linear", "embedding", "dense"])
def test_inner_products_are_those_of_float64(kind: str, positions: int):
    draw = torch.Generator().manual_seed(positions)
    deltas = torch.randn(3, 4, positions, 6, generator=draw)
    if kind == "linear":
        block: JacobianBlock = LinearBlock("w", 0, torch.randn(3, positions, 9, generator=draw), deltas)
    elif kind == "embedding":
        block = EmbeddingBlock("e", 0, torch.randint(0, 5, (3, positions), generator=draw), deltas, 5)
    else:
        block = DenseBlock("v", 0, deltas.flatten(2))
    found = block.inner_products()
    values = block.dense().double()
    torch.testing.assert_close(found, values @ values.transpose(1, 2), rtol=1e-5, atol=1e-5)
    if kind != "linear" or positions == 1:
        torch.testing.assert_close(found.diagonal(dim1=1, dim2=2), values.square().sum(2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_of_norms_do_not_depend_on_the_batch(threads: int):
    draw = torch.Generator().manual_seed(0)
    values, weight = torch.randn(5, 8, 5000, generator=draw), torch.randn(50, 8, generator=draw)
    alone = [LoweredBlock(DenseBlock("p", 0, row[None]), weight) for row in values]
    with torch_threads(threads):
        together = LoweredBlock(DenseBlock("p", 0, values), weight)
        norms, dense_values = together.sq_norm(), together.dense()
    assert torch.equal(norms, torch.cat([block.sq_norm() for block in alone]))
    assert torch.equal(dense_values, torch.cat([block.dense() for block in alone]))


def test_joined_blocks_are_the_batches_one_after_another():
    case = SERVED[0]
    model = case.model()
    engine = engine_for(case, model, case.batch(3))
    first, second = case.batch(3, seed=1), case.batch(4, seed=2)
    for a, b in zip(engine(first), engine(second), strict=True):
        joined = join_blocks([a, b])
        assert type(joined) is type(a)
        torch.testing.assert_close(joined.dense(), torch.cat([a.dense(), b.dense()]), rtol=1e-6, atol=1e-7)


def test_blocks_are_cut_as_those_of_classes_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MAX_COLUMNS, "cpu", 12)
    monkeypatch.setattr("gradstore.jacobians.footprint._VALUES", 1)
    case = SERVED[0]
    inputs, model = case.batch(4), case.model()
    engine = engine_for(case, model, inputs)
    lowered = list(engine(inputs))
    usual = list(JacobianEngine(model, parameter_blocks(model), example=inputs)(inputs))
    assert [(b.name, b.start, b.size) for b in lowered] == [(b.name, b.start, b.size) for b in usual]
    assert sum(b.name == "head.weight" for b in lowered) > 10
    assert relative(put_together(lowered), put_together(usual).double()) < 1e-5
    u = torch.randn(C)
    for a, b in zip(lowered, usual, strict=True):
        torch.testing.assert_close(
            a.combined(1, u, formed=False).dense(), b.combined(1, u, formed=False).dense(), rtol=1e-4, atol=1e-4
        )
        assert F.mse_loss(a.sq_norm(), b.sq_norm()) < 1e-8
