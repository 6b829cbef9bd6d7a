"""Every rule in every form in which its function is called: route, values, and what happens without the rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_layers import Uses, weight
from torch import Tensor, nn

from gradstore.jacobians import JacobianEngine, forward_record
from gradstore.jacobians.footprint import MAX_COLUMNS
from gradstore.jacobians.rules import RULES
from gradstore.model.parameters import parameter_blocks

pytestmark = [pytest.mark.numerical, pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")]


@dataclass(frozen=True)
class Form:
    """A call of a function with parameters.

    Attributes:
        name: its test id.
        function: of the input and the parts, in their order; what it gives is made logits without parameters.
        parts: makes the parameters, buffers (`fixed…`) and modules, by name.
        route: of every parameter, or of each by name.
        shape: of an example; an integer instead: that many tokens.
        learned: the input itself depends on a parameter.
    """

    name: str
    function: Callable[..., Tensor]
    parts: Callable[[], dict[str, Any]]
    route: str | dict[str, str]
    shape: tuple[int, ...] | int = (4, 5)
    learned: bool = False

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Logits(Uses(self.function, **self.parts()), self.learned, self.batch(2)).double()

    def batch(self, n: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if isinstance(self.shape, int):
            return torch.randint(0, 6, (n, self.shape), generator=generator)
        return torch.randn(n, *self.shape, dtype=torch.float64, generator=generator)

    def routes(self, model: nn.Module) -> dict[str, str]:
        engine = JacobianEngine(model, parameter_blocks(model), example=self.batch(3))
        return {name.removeprefix("inner."): route for name, route in engine.describe() if name != "gain"}


class Logits(nn.Module):
    """Three logits of whatever a module gives; in a fixed way that is no matrix product."""

    def __init__(self, inner: nn.Module, learned: bool, example: Tensor) -> None:
        super().__init__()
        self.inner = inner
        if learned:
            self.gain = nn.Parameter(torch.tensor(0.8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x * self.gain if hasattr(self, "gain") else x).flatten(1)
        steps = torch.arange(1, 3 * y.shape[1] + 1, dtype=y.dtype).view(3, -1)
        return (torch.tanh(y)[:, None] * torch.sin(steps)).sum(-1)


def form(
    name: str, function: Callable[..., Tensor], route: Any, shape: Any = (4, 5), *, learned: bool = False, **parts: Any
) -> Form:
    """A form whose parts are shapes of parameters, or makers of anything else."""
    made = lambda: {k: weight(*v) if isinstance(v, tuple) else v() for k, v in parts.items()}  # noqa: E731
    return Form(name, function, made, route, shape, learned)


LINEAR = [
    form("positional", lambda x, w, b: F.linear(x, w, b), "linear", w=(3, 5), b=(3,)),
    form("by keywords", lambda x, w, b: F.linear(input=x, bias=b, weight=w), "linear", w=(3, 5), b=(3,)),
    form("module", lambda x, m: m(x), "linear", m=lambda: nn.Linear(5, 3)),
    form("no bias", lambda x, m: m(x), "linear", m=lambda: nn.Linear(5, 3, bias=False)),
    form("of rows", lambda x, m: m(x), "linear", (5,), m=lambda: nn.Linear(5, 3)),
    form("second axis", lambda x, m: m(x.transpose(0, 1)).transpose(0, 1), "linear", m=lambda: nn.Linear(5, 3)),
    form("folded", lambda x, m: m(x.reshape(-1, 5)).view(-1, 4, 3), "linear", m=lambda: nn.Linear(5, 3)),
    form(
        "folded, examples last",
        lambda x, m: m(x.transpose(0, 1).reshape(-1, 5)).view(4, -1, 3).transpose(0, 1),
        "linear",
        m=lambda: nn.Linear(5, 3),
    ),
    form("viewed weight", lambda x, w: F.linear(x, w.view(3, 5)), "linear", w=(15,)),
    form("part of a weight", lambda x, w: F.linear(x, w.chunk(2)[1]), "linear of a function", w=(6, 5)),
    form("permuted weight", lambda x, w: F.linear(x, w[[2, 0, 1]]), "linear of a function", w=(3, 5)),
    form("reversed weight", lambda x, w: F.linear(x, w.flip(1).t().t()), "linear of a function", w=(5, 5)),
    form("square, transposed", lambda x, w: F.linear(x, w.t()), "linear of a function", w=(5, 5)),
    form("changed in place", lambda x, w: F.linear(x, w.clone().mul_(2)), "linear of a function", w=(3, 5)),
    form("twice", lambda x, w: F.linear(F.linear(x, w).tanh(), w), "linear", w=(5, 5)),
    form("transposed too", lambda x, w: F.linear(F.linear(x, w), w.t()), "linear + linear of a function", w=(3, 5)),
    form("cast", lambda x, w: F.linear(x.float(), w.float()).double(), "linear", w=(3, 5)),
]


def conv(dims: int, name: str, *args: Any, space: int = 6, channels: int = 4, **options: Any) -> Form:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    shape = (channels, *[space - i for i in range(dims)])
    return form(f"{dims}d {name}", lambda x, m: m(x), "convolution", shape, m=lambda: kind(channels, *args, **options))


def transposed(dims: int, name: str, *args: Any, **options: Any) -> Form:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    shape = (4, *[4 - i for i in range(dims)])
    return form(f"{dims}d {name}", lambda x, m: m(x), "convolution", shape, m=lambda: kind(4, *args, **options))


CONVOLUTIONS = [
    *(conv(dims, "plain", 3, 2) for dims in (1, 2, 3)),
    *(conv(dims, "strided, dilated", 2, 2, stride=2, dilation=2, padding=1) for dims in (1, 2, 3)),
    *(conv(dims, "depthwise", 8, 3, groups=4, padding=1) for dims in (1, 2, 3)),
    *(conv(dims, "depthwise, same", 4, 3, groups=4, padding="same", dilation=2) for dims in (1, 2)),
    conv(1, "depthwise, valid", 4, 2, groups=4, padding="valid"),
    conv(2, "depthwise, same, even", 4, (2, 3), groups=4, padding="same"),
    conv(2, "grouped, large kernel", 4, 5, groups=2, padding=2),
    conv(2, "grouped, strided", 6, (3, 2), groups=2, stride=(2, 1), padding=(1, 0)),
    conv(2, "same", 3, 3, padding="same"),
    conv(2, "circular", 3, 3, padding=1, padding_mode="circular", bias=False),
    form(
        "1d by keywords", lambda x, w, b: F.conv1d(x, bias=b, weight=w, padding=1), "convolution", w=(3, 4, 2), b=(3,)
    ),
    form(
        "2d folded",
        lambda x, m: m(x.flatten(0, 1)).unflatten(0, (-1, 3)),
        "convolution",
        (3, 2, 4, 4),
        m=lambda: nn.Conv2d(2, 3, 2),
    ),
    form(
        "2d folded, depthwise",
        lambda x, m: m(x.flatten(0, 1)).unflatten(0, (-1, 3)),
        "convolution",
        (3, 2, 4, 4),
        m=lambda: nn.Conv2d(2, 4, 2, groups=2),
    ),
    form("2d of few outputs", lambda x, m: m(x), "convolution", (2, 3, 3), m=lambda: nn.Conv2d(2, 9, 3)),
    *(transposed(dims, "transposed", 3, 2) for dims in (1, 2, 3)),
    *(
        transposed(dims, "transposed, all", 6, 2, stride=2, padding=1, output_padding=1, dilation=2, groups=2)
        for dims in (1, 2, 3)
    ),
    transposed(1, "transposed, longer than its steps", 3, 3, dilation=2, output_padding=1),
    transposed(2, "transposed, uneven", 2, (3, 1), stride=(1, 3), output_padding=(0, 2), padding=(1, 0), bias=False),
]

TOKENS = [
    form("ids", lambda ids, m: m(ids), "embedding", 4, m=lambda: nn.Embedding(6, 3)),
    form("padding", lambda ids, m: m(ids), "embedding", 4, m=lambda: nn.Embedding(6, 3, padding_idx=2)),
    form("padding from the end", lambda ids, w: F.embedding(ids, w, -1), "embedding", 4, w=(6, 3)),
    form("sparse", lambda ids, m: m(ids), "embedding", 4, m=lambda: nn.Embedding(6, 3, sparse=True)),
    form("bound norm", lambda ids, m: m(ids), "embedding", 4, m=lambda: nn.Embedding(6, 3, max_norm=0.5)),
    form("by keywords", lambda ids, w: F.embedding(weight=w, input=ids), "embedding", 4, w=(6, 3)),
    form("positions", lambda x, m: x + m(torch.arange(4)), "embedding", m=lambda: nn.Embedding(6, 5)),
    form("positions [1, t]", lambda x, m: x * m(torch.arange(4)[None]), "embedding", m=lambda: nn.Embedding(6, 5)),
    form(
        "positions repeated",
        lambda x, m: x * m(torch.arange(4).expand(len(x), 4)),
        "embedding",
        m=lambda: nn.Embedding(6, 5),
    ),
    *(
        form(
            f"bag, {mode}",
            lambda ids, m: m(ids),
            "embedding bag",
            4,
            m=lambda mode=mode: nn.EmbeddingBag(6, 3, mode=mode, padding_idx=1),
        )
        for mode in ("sum", "mean")
    ),
    form(
        "bag, weighed",
        lambda ids, w: F.embedding_bag(ids, w, mode="sum", per_sample_weights=(ids + 1).to(w)),
        "embedding bag",
        4,
        w=(6, 3),
    ),
    form("bag, sparse", lambda ids, m: m(ids), "embedding bag", 4, m=lambda: nn.EmbeddingBag(6, 3, sparse=True)),
    form(
        "bag, folded",
        lambda ids, m: m(ids.view(-1, 2)).view(-1, 2, 3),
        "embedding bag",
        4,
        m=lambda: nn.EmbeddingBag(6, 3),
    ),
]


def of_module(name: str, route: str, shape: tuple[int, ...], build: Callable[[], nn.Module]) -> Form:
    return form(name, lambda x, m: m(x), route, shape, m=lambda: moved(build()))


def moved(module: nn.Module) -> nn.Module:
    """Weights and statistics that start at 1 or 0 move off it."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.5 * torch.rand_like(tensor))
    return module


NORMS = [
    of_module("batch, rows", "batch norm", (5,), lambda: nn.BatchNorm1d(5)),
    of_module("batch, 1d", "batch norm", (4, 5), lambda: nn.BatchNorm1d(4, eps=0.5)),
    of_module("batch, 2d", "batch norm", (3, 2, 2), lambda: nn.BatchNorm2d(3)),
    of_module("batch, 3d", "batch norm", (3, 2, 2, 2), lambda: nn.BatchNorm3d(3)),
    form(
        "batch, folded",
        lambda x, m: m(x.reshape(-1, 5)).view(-1, 4, 5),
        "batch norm",
        m=lambda: moved(nn.BatchNorm1d(5)),
    ),
    of_module("group, rows", "group norm", (6,), lambda: nn.GroupNorm(2, 6)),
    of_module("group, 2d", "group norm", (4, 2, 3), lambda: nn.GroupNorm(2, 4, eps=0.5)),
    of_module("instance, 1d", "instance norm", (4, 5), lambda: nn.InstanceNorm1d(4, affine=True, eps=0.5)),
    of_module("instance, 2d", "instance norm", (3, 2, 3), lambda: nn.InstanceNorm2d(3, affine=True)),
    of_module(
        "instance, fixed", "instance norm", (3, 4), lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    ),
    of_module("layer, rows", "layer norm", (5,), lambda: nn.LayerNorm(5)),
    of_module("layer, steps", "layer norm", (4, 5), lambda: nn.LayerNorm(5, bias=False)),
    of_module("layer, all axes", "layer norm", (3, 2, 3), lambda: nn.LayerNorm((3, 2, 3), eps=0.5)),
    form(
        "layer, second axis",
        lambda x, m: m(x.transpose(0, 1)).transpose(0, 1),
        "layer norm",
        m=lambda: moved(nn.LayerNorm(5)),
    ),
    of_module("RMS, rows", "RMS norm", (5,), lambda: nn.RMSNorm(5)),
    of_module("RMS, two axes", "RMS norm", (4, 5), lambda: nn.RMSNorm((4, 5), eps=0.1)),
    form("bilinear", lambda x, m: m(x, x.tanh()), "bilinear", m=lambda: nn.Bilinear(5, 5, 3)),
    form("bilinear, rows", lambda x, m: m(x, x.tanh()), "bilinear", (5,), m=lambda: nn.Bilinear(5, 5, 3, bias=False)),
]

A = "arithmetic"
PRELU = [
    form("one slope", lambda x, m: m(x), A, m=nn.PReLU),
    form("a slope a channel", lambda x, m: m(x), A, (4, 2, 2), m=lambda: moved(nn.PReLU(4))),
    form("of rows", lambda x, m: m(x), A, (5,), m=lambda: moved(nn.PReLU(5))),
    form("functional", lambda x, a: F.prelu(x, a) + x.prelu(a) + torch.prelu(x, weight=a), A, a=(4,)),
]


def arithmetic(name: str, function: Callable[..., Tensor], p: tuple[int, ...] = (5,), **options: Any) -> Form:
    return form(f"{name} {list(p)}", function, A, p=p, **options)


PLAIN: dict[str, Callable[..., Tensor]] = {
    "x + p": lambda x, p: x + p,
    "p + x": lambda x, p: p + x,
    "torch.add": lambda x, p: torch.add(x, p, alpha=2),
    "x.add": lambda x, p: x.add(p),
    "x - p": lambda x, p: x - p,
    "p - x": lambda x, p: p - x,
    "torch.sub": lambda x, p: torch.sub(p, x, alpha=0.5),
    "x.sub": lambda x, p: x.sub(p, alpha=0.5),
    "torch.subtract": lambda x, p: torch.subtract(x, p),
    "x.subtract": lambda x, p: x.subtract(other=p),
    "x * p": lambda x, p: x * p,
    "p * x": lambda x, p: p * x,
    "torch.mul": lambda x, p: torch.mul(input=x, other=p),
    "x.mul": lambda x, p: x.mul(p),
    "torch.multiply": lambda x, p: torch.multiply(x, p),
    "x.multiply": lambda x, p: x.multiply(p),
    "x / p": lambda x, p: x / p,
    "p / x": lambda x, p: p / (x.square() + 1),
    "torch.div": lambda x, p: torch.div(x, p),
    "x.div": lambda x, p: x.div(p),
    "torch.true_divide": lambda x, p: torch.true_divide(x, p),
    "x.true_divide": lambda x, p: x.true_divide(p),
    "x ** p": lambda x, p: (x.square() + 1) ** p,
    "torch.pow": lambda x, p: torch.pow(x.square() + 1, p),
    "x.pow": lambda x, p: (x.square() + 1).pow(p),
    "torch.maximum": lambda x, p: torch.maximum(x, p),
    "x.maximum": lambda x, p: x.maximum(p),
    "torch.minimum": lambda x, p: torch.minimum(p, x),
    "x.minimum": lambda x, p: x.minimum(p),
    "torch.where": lambda x, p: torch.where(x > 0, x, p),
    "where(p, x)": lambda x, p: torch.where(x > 0, p, x),
    "x.where": lambda x, p: x.where(x > 0, p),
    "torch.lerp": lambda x, p: torch.lerp(x, p, 0.3),
    "x.lerp": lambda x, p: x.lerp(x.tanh(), p),
    "torch.addcmul": lambda x, p: torch.addcmul(x, p, x.tanh(), value=0.5),
    "x.addcmul": lambda x, p: x.addcmul(x.tanh(), p),
    "torch.addcdiv": lambda x, p: torch.addcdiv(x, p, x.square() + 1),
    "x.addcdiv": lambda x, p: x.addcdiv(p, x.square() + 1, value=2),
    "torch.clamp": lambda x, p: torch.clamp(x, max=p),
    "x.clamp": lambda x, p: x.clamp(p),
    "__add__": lambda x, p: x.__add__(p),
    "__radd__": lambda x, p: x.__radd__(p),
    "__sub__": lambda x, p: x.__sub__(p),
    "__rsub__": lambda x, p: p.__rsub__(x),
    "__mul__": lambda x, p: x.__mul__(p),
    "__rmul__": lambda x, p: x.__rmul__(p),
    "__truediv__": lambda x, p: x.__truediv__(p),
    "__rtruediv__": lambda x, p: p.__rtruediv__(x),
    "__rpow__": lambda x, p: p.__rpow__(x.square() + 1),
    "expand_as": lambda x, p: x * p.expand_as(x),
    "broadcast_to": lambda x, p: x * torch.broadcast_to(p, x.shape),
    "p.broadcast_to": lambda x, p: x * p.broadcast_to(x.shape),
    "expand": lambda x, p: x * p.expand(len(x), 4, 5),
    "expand(shape)": lambda x, p: x * p.expand(x.shape),
}
IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "x += p": lambda x, p: x.__iadd__(p),
    "x -= p": lambda x, p: x.__isub__(p),
    "x *= p": lambda x, p: x.__imul__(p),
    "x /= p": lambda x, p: x.__itruediv__(p),
    "add_": lambda x, p: x.add_(p, alpha=2),
    "sub_": lambda x, p: x.sub_(p),
    "subtract_": lambda x, p: x.subtract_(p),
    "mul_": lambda x, p: x.mul_(p),
    "multiply_": lambda x, p: x.multiply_(p),
    "div_": lambda x, p: x.div_(p),
    "true_divide_": lambda x, p: x.true_divide_(p),
    "pow_": lambda x, p: (x.square() + 1).pow_(p),
    "lerp_": lambda x, p: x.lerp_(p, 0.3),
    "addcmul_": lambda x, p: x.addcmul_(p, x.tanh()),
    "addcdiv_": lambda x, p: x.addcdiv_(p, p.square() + 1),
}
ARITHMETIC = [
    *(arithmetic(name, function) for name, function in PLAIN.items()),
    *(
        arithmetic(name, function, p)
        for name, function in list(PLAIN.items())[::9]
        for p in ((1, 4, 1), (4, 5), (1,), ())
    ),
    *(arithmetic(name, function, learned=True) for name, function in IN_PLACE.items()),
    *(arithmetic(name, function, (4, 1), learned=True) for name, function in list(IN_PLACE.items())[::4]),
    arithmetic("repeat", lambda x, p: x * p.repeat(len(x), 1, 1), (1, 4, 5)),
    arithmetic("repeat(sizes)", lambda x, p: x * p.repeat((len(x), 2, 1)), (1, 2, 5)),
    arithmetic("class token", lambda x, p: torch.cat([p.expand(len(x), -1, -1), x], 1), (1, 1, 5)),
    arithmetic("second axis", lambda x, p: (x.transpose(0, 1) + p).transpose(0, 1), (4, 1, 5)),
    arithmetic(
        "second axis, repeated",
        lambda x, p: torch.cat([x.transpose(0, 1), p.repeat(1, len(x), 1)]).transpose(0, 1),
        (2, 1, 5),
    ),
    arithmetic("reshaped", lambda x, p: x * p.view(-1, 1), (4,)),
    arithmetic("indexed by None", lambda x, p: p[None, :, None] * x, (4,)),
    arithmetic("folded", lambda x, p: (x.reshape(-1, 5) * p).view(-1, 4, 5)),
    form("of a function", lambda x, p: x * p.exp(), "arithmetic of a function", p=()),
    form(
        "gathered",
        lambda x, p, i: x + p[i],
        "arithmetic of a function",
        p=(3,),
        fixed=lambda: torch.tensor([0, 1, 1, 2, 0]),
    ),
]

M = "matrix product"
PRODUCTS = [
    form("x @ w", lambda x, w: x @ w, M, w=(5, 3)),
    form("x @ vector", lambda x, w: x @ w, M, w=(5,)),
    form("w @ x", lambda x, w: w @ x, M, w=(3, 4)),
    form("[1, …] w @ x", lambda x, w: w @ x, M, w=(1, 3, 4)),
    form("vector @ x", lambda x, w: w @ x, M, w=(4,)),
    form("torch.matmul", lambda x, w: torch.matmul(x, w), M, w=(5, 3)),
    form("x.matmul", lambda x, w: x.matmul(other=w), M, w=(5, 3)),
    form("a matrix a step", lambda x, w: x[:, :, None] @ w, M, w=(4, 5, 3)),
    form("x @ w.t()", lambda x, w: x @ w.t(), "linear", w=(3, 5)),
    form("x @ w.T, square", lambda x, w: x @ w.T, "linear", w=(5, 5)),
    form("torch.mm, w.mT", lambda x, w: torch.mm(x, w.mT), "linear", (5,), w=(3, 5)),
    form("x.matmul, transposed", lambda x, w: x.matmul(w.transpose(-1, -2)), "linear", w=(3, 5)),
    form("a view, permuted", lambda x, w: x @ w.view(3, 5).permute(1, 0), "linear", w=(15,)),
    form("transposed by name", lambda x, w: x @ torch.t(input=w), "matrix product of a function", w=(3, 5)),
    form("transposed twice", lambda x, w: x @ w.T.T, "matrix product of a function", w=(5, 3)),
    form("transposed, flipped", lambda x, w: x @ w.T.flip(0), "matrix product of a function", w=(3, 5)),
    form("transposed nothing", lambda x, w: x @ w.transpose(0, 0), "matrix product of a function", w=(5, 5)),
    form("sparse, transposed", lambda x, w: x.to_sparse() @ w.T, "matrix product of a function", (5,), w=(3, 5)),
    form("in place first", lambda x, w: x @ (w * 2).t().mul_(0.5), "matrix product of a function", w=(3, 5)),
    form("torch.mm", lambda x, w: torch.mm(x, w), M, (5,), w=(5, 3)),
    form("x.mm", lambda x, w: x.mm(w), M, (5,), w=(5, 3)),
    form("torch.bmm, second axis", lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), M, w=(4, 5, 3)),
    form("x.bmm", lambda x, w: x.transpose(0, 1).bmm(w).transpose(0, 1), M, w=(4, 5, 3)),
    form("bmm, expanded", lambda x, w: torch.bmm(x, w.expand(len(x), -1, -1)), A, w=(1, 5, 3)),
    form("torch.mv", lambda x, w: torch.mv(x, w)[:, None], M, (5,), w=(5,)),
    form("x.mv", lambda x, w: x.mv(w)[:, None], M, (5,), w=(5,)),
    form("torch.addmm", lambda x, w, b: torch.addmm(b, x, w), M, (5,), w=(5, 3), b=(3,)),
    form("b.addmm", lambda x, w, b: b.addmm(x, w, beta=0.5, alpha=2), M, (5,), w=(5, 3), b=(1, 3)),
    form("addmm, one output", lambda x, w, b: torch.addmm(b, x, w), M, (5,), w=(5, 1), b=(1,)),
    form("addmm, one bias", lambda x, w, b: torch.addmm(b, x, w), M, (5,), w=(5, 3), b=(1,)),
    form("addmm, folded", lambda x, w, b: torch.addmm(b, x.view(-1, 5), w).view(-1, 4, 3), M, w=(5, 3), b=(3,)),
    form("addmm to examples", lambda x, w: torch.addmm(x, x, w, beta=0.3), M, (5,), w=(5, 5)),
    form("einsum", lambda x, w: torch.einsum("nti,io->nto", x, w), M, w=(5, 3)),
    form("einsum, swapped", lambda x, w: torch.einsum("o i, n t i -> n t o", w, x), M, w=(3, 5)),
    form("einsum, other labels", lambda x, w: torch.einsum("xzi,iX->xzX", x, w), M, w=(5, 3)),
    form("einsum, heads", lambda x, w: torch.einsum("ntf,fhd->nhtd", x, w), M, w=(5, 2, 3)),
    form("einsum, in time", lambda x, w: torch.einsum("ntf,ut->nuf", x, w), M, w=(3, 4)),
    form("einsum, a step each", lambda x, w: torch.einsum("ntf,tfo->nto", x, w), M, w=(4, 5, 2)),
    form("sparse", lambda x, w: torch.sparse.mm(x.to_sparse(), w), M, (5,), w=(5, 3)),
    form("many outputs", lambda x, w: x @ w, M, (3, 2), w=(2, 40)),
]


def recurrent(name: str, kind: Any, **options: Any) -> Form:
    first = options.get("batch_first", False)

    def run(x: Tensor, m: nn.Module) -> Tensor:
        return m(x)[0] if first else m(x.transpose(0, 1))[0].transpose(0, 1)

    parts = {f"m.{p}": "linear" if "_ih_" in p else "recurrent" for p, _ in kind(5, 3, **options).named_parameters()}
    return form(f"{kind.__name__} {name}", run, parts, m=lambda: kind(5, 3, **options))


def cell(kind: Any) -> Form:
    def run(x: Tensor, m: nn.Module) -> Tensor:
        state, outputs = None, []
        for step in x.unbind(1):
            state = m(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)

    return form(kind.__name__, run, "linear", m=lambda: kind(5, 3))


def attended(name: str, run: Callable[..., Tensor], route: Any, **options: Any) -> Form:
    return form(name, run, route, (4, 6), m=lambda: nn.MultiheadAttention(6, 2, **options))


def with_mask(x: Tensor, m: nn.Module, p: Tensor) -> Tensor:
    q, k, v = m(x).unflatten(2, (3, 2, 3)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=p)


COMPOSITE = [
    *(recurrent("plain", kind) for kind in (nn.LSTM, nn.GRU, nn.RNN)),
    *(recurrent("all", kind, num_layers=2, bidirectional=True, batch_first=True) for kind in (nn.LSTM, nn.GRU, nn.RNN)),
    recurrent("no bias", nn.GRU, bias=False),
    recurrent("relu", nn.RNN, nonlinearity="relu"),
    *(cell(kind) for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)),
    attended("attention", lambda x, m: m(x, x, x)[0], "linear", batch_first=True),
    attended(
        "attention, cross",
        lambda x, m: m(x[:, :2], x[..., :2], x[..., 3:])[0],
        {
            **dict.fromkeys(("m.q_proj_weight", "m.k_proj_weight", "m.v_proj_weight"), "linear"),
            "m.in_proj_bias": "linear of a function",
            "m.out_proj.weight": "linear",
            "m.out_proj.bias": "linear",
        },
        kdim=2,
        vdim=3,
        batch_first=True,
    ),
    form(
        "attention, learned mask",
        with_mask,
        {"m.weight": "linear", "m.bias": "linear", "p": A},
        (4, 5),
        m=lambda: nn.Linear(5, 18),
        p=(2, 4, 4),
    ),
]


def grouped_queries(x: Tensor, m: nn.Module, p: Tensor) -> Tensor:
    heads = m(x).unflatten(2, (8, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(
        heads[:, :4], heads[:, 4:6], heads[:, 6:], attn_mask=p, scale=0.4, enable_gqa=True
    )


COMPOSITE += [
    form(
        "attention, fewer keys than queries",
        grouped_queries,
        {"m.weight": "linear", "m.bias": "linear", "p": A},
        (4, 5),
        m=lambda: nn.Linear(5, 16),
        p=(4, 4),
    ),
]

FORMS = {
    f"{kind}: {one.name}": one
    for kind, forms in {
        "linear": LINEAR,
        "convolution": CONVOLUTIONS,
        "tokens": TOKENS,
        "norm": NORMS,
        "PReLU": PRELU,
        "arithmetic": ARITHMETIC,
        "product": PRODUCTS,
        "composite": COMPOSITE,
    }.items()
    for one in forms
}
OTHERS = {
    one.name: one
    for one in [
        form(
            "embedding, by frequency",
            lambda ids, m: m(ids),
            "",
            5,
            m=lambda: nn.Embedding(6, 3, scale_grad_by_freq=True),
        ),
        form(
            "bag, by frequency", lambda ids, m: m(ids), "", 5, m=lambda: nn.EmbeddingBag(6, 3, scale_grad_by_freq=True)
        ),
        form("bag, largest", lambda ids, m: m(ids), "", 5, m=lambda: nn.EmbeddingBag(6, 3, mode="max")),
        form(
            "bag, offsets",
            lambda ids, m: m(ids.flatten(), torch.arange(0, ids.numel(), 5)),
            "",
            5,
            m=lambda: nn.EmbeddingBag(6, 3),
        ),
        form("einsum of three", lambda x, w, v: torch.einsum("nti,io,t->no", x, w, v), "", w=(5, 3), v=(4,)),
        form("einsum, ellipsis", lambda x, w: torch.einsum("...i,io->...o", x, w), "", w=(5, 3)),
        form("einsum, implicit", lambda x, w: torch.einsum("nti,io", x, w), "", w=(5, 3)),
        form("einsum, diagonal", lambda x, w: torch.einsum("nti,ii->nti", x, w), "", w=(5, 5)),
        form("einsum, own sum", lambda x, w: torch.einsum("nti,io->nt", x, w), "", w=(5, 3)),
        form("one row at a time", lambda x, m: torch.stack([m(row) for row in x]), "", (5,), m=lambda: nn.Linear(5, 3)),
        form("reversed examples", lambda x, m: m(x.flip(0)).flip(0), "", m=lambda: nn.Linear(5, 3)),
        form("distances", lambda x, w: torch.cdist(x, w), "", w=(3, 5)),
        form("rows that examples choose", lambda x, w: w[x[..., 0].argmax(1)], "", w=(4, 3)),
        form("LSTM, projected", lambda x, m: m(x)[0], "", m=lambda: nn.LSTM(5, 3, proj_size=2, batch_first=True)),
        form("sorted", lambda x, w: (x * w).sort(1)[0] + w.sort()[0], "", w=(5,)),
        form("unused", lambda x, w, v: x * w, "", w=(5,), v=(3,)),
        form("detached", lambda x, w: x * w + (x * w).detach() + w.detach(), "", w=(5,)),
        form("without gradient", lambda x, w: x * w + torch.no_grad()(torch.mul)(x, w), "", w=(5,)),
        form("a view changed after", lambda x, w: _half_changed(x, w), "", w=(2,)),
    ]
}
EACH = pytest.mark.parametrize("one", FORMS.values(), ids=FORMS.keys())


def _half_changed(x: Tensor, w: Tensor) -> Tensor:
    y = 2 * x
    y[..., :2] += w
    y[..., 2:4] *= w
    return y


class _Asked(dict):  # type: ignore[type-arg]
    """A table of rules that knows which functions it was asked for."""

    def __init__(self, rules: dict[Any, Any]) -> None:
        super().__init__(rules)
        self.functions: set[Any] = set()

    def __getitem__(self, function: Any) -> Any:
        self.functions.add(function)
        return super().__getitem__(function)


def asked(one: Form, monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """The functions whose rules a form takes."""
    table = _Asked(RULES)
    with monkeypatch.context() as patch:
        patch.setattr(forward_record, "RULES", table)
        one.routes(one.model())
    return table.functions


def looped(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """By name, the Jacobian [n, classes, size], one example and one class at a time."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = []
    for example in batch:
        logits = model(example[None])[0]
        found = [torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True) for one in logits]
        rows.append(
            [torch.stack([g.to_dense().flatten() for g in gradients]) for gradients in zip(*found, strict=True)]
        )
    return {name: torch.stack(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


def streamed(engine: JacobianEngine, batch: Tensor) -> dict[str, Tensor]:
    """The same from the engine."""
    pieces: dict[str, list[Tensor]] = {}
    for block in engine(batch):
        pieces.setdefault(block.name, []).append(block.dense().double())
    return {name: torch.cat(parts, -1) for name, parts in pieces.items()}


@EACH
@pytest.mark.parametrize(("n", "columns"), [(1, 4), (4, 1 << 16)])
def test_route_and_values(one: Form, n: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAX_COLUMNS, "cpu", columns)
    model, batch = one.model().eval(), one.batch(n, seed=2)
    engine = JacobianEngine(model, parameter_blocks(model), example=one.batch(3))
    values = streamed(engine, batch)
    for name, want in looped(model, batch).items():
        torch.testing.assert_close(values[name], want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
    found = {name.removeprefix("inner."): route for name, route in engine.describe() if name != "gain"}
    assert found == (one.route if isinstance(one.route, dict) else dict.fromkeys(found, one.route))


@pytest.mark.parametrize("one", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_values_of_what_is_close_to_a_rule(one: Form) -> None:
    model, batch = one.model().eval(), one.batch(4, seed=2)
    found = streamed(JacobianEngine(model, parameter_blocks(model), example=one.batch(3)), batch)
    for name, want in looped(model, batch).items():
        torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


@EACH
def test_without_its_rules_a_form_takes_another_route(one: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, before = asked(one, monkeypatch), one.routes(one.model())
    monkeypatch.setattr(forward_record, "RULES", {f: rule for f, rule in RULES.items() if f not in gone})
    after = one.routes(one.model())
    assert not [name for name, route in before.items() if after[name] == route]


def test_every_rule_has_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    covered = set().union(*(asked(one, monkeypatch) for one in FORMS.values()))
    left = {one for one in RULES.keys() - covered if not one.__name__.startswith("__")}
    assert not left  # of operators, torch names some by their functions, other ones in each version
