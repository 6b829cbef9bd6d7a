"""Small networks drawn at random: a pure function of a seed.

The layers of `random_layers` in random arrangements: residual, shared, nested, in place, tied, folded, transposed,
reparametrised, in another dtype, without gradients, with buffers that count. The logits of an example never depend on
other examples, so the engine has to serve every one of them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from random_layers import (
    LAST,
    TOKENS,
    Maker,
    Shape,
    Uses,
    activation,
    embedding,
    flag,
    makers,
    unknown,
    weight,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

Batches = Callable[[int, int], Any]  # (examples, steps in time more than usual)

_MOST_VALUES = 150  # of an example between two layers


@dataclass(frozen=True)
class Drawn:
    """A network and batches for it.

    Attributes:
        model: in float32 or float64, maybe in part in another dtype.
        exact: the same model in float64, all of it.
        probe: a batch to make an engine with.
        batch: another, of another size.
        classes: number of logits.
        parameters: which are differentiated.
        dtype: the coarsest in the model.
        layout: for the engine.
        served_by_rules: False where it holds what no rule is meant for.
    """

    model: nn.Module
    exact: nn.Module
    probe: Any
    batch: Any
    classes: int
    parameters: str
    dtype: torch.dtype
    layout: str
    served_by_rules: bool


class Cast(nn.Module):
    """A part in another dtype."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        own = next(self.inner.parameters()).dtype
        return self.inner(x.to(own)).to(x.dtype)


class Counting(nn.Module):
    """Counts its calls and follows the mean of what it sees, of which nothing comes back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return self.inner(x)


class Standardised(nn.Module):
    """A parametrization: each row of a weight with mean 0 and variance 1."""

    def forward(self, w: Tensor) -> Tensor:
        rows = w.flatten(1)
        rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, unbiased=False, keepdim=True) + 0.1).sqrt()
        return rows.view_as(w)


class Gained(nn.Module):
    """A parametrization that has a parameter of its own."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(rows) + 0.5)

    def forward(self, w: Tensor) -> Tensor:
        return torch.tanh(w) * self.gain.view(-1, *[1] * (w.ndim - 1))


# -- arrangements of layers: each makes one of others ----------------------------------------------------------------


class _Draw:
    """The networks of one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.coarsest = torch.float32
        self.unknown = False

    def flag(self, chance: float = 0.5) -> bool:
        return flag(self.rng, chance)

    def fitting(self, shape: Shape, choose: Callable[[], Maker]) -> nn.Module:
        """The first drawn module that takes examples of this shape and gives not too much."""
        while True:
            unknown, coarsest = self.unknown, self.coarsest
            try:
                made = choose()(self.rng, shape)
                output = after(made, shape)
                if 0 < torch.Size(output).numel() <= _MOST_VALUES and 1 <= len(output) <= 4:
                    return made
            except (RuntimeError, ValueError, IndexError, AssertionError):
                pass
            self.unknown, self.coarsest = unknown, coarsest

    def layer(self, shape: Shape) -> nn.Module:
        return self.fitting(shape, lambda: self.rng.choice(makers(shape)))

    def part(self, shape: Shape, depth: int) -> nn.Module:
        """A layer, or an arrangement of layers."""
        if depth == 0 or self.flag(0.45):
            return self.layer(shape)
        arrangements = [
            self.sequence,
            self.residual,
            self.shared,
            self.nested,
            self.reparametrised,
            self.without_gradient,
            self.in_another_dtype,
            self.counting,
            self.branches,
            self.rarely_known,
        ]
        if len(shape) == 2:
            arrangements += [self.folded, self.transposed, self.windows]
        return self.fitting(shape, lambda: lambda rng, shape: rng.choice(arrangements)(shape, depth - 1))

    def sequence(self, shape: Shape, depth: int) -> nn.Module:
        parts: list[nn.Module] = []
        for _ in range(self.rng.randint(1, 3)):
            parts.append(self.part(shape, depth))
            shape = after(parts[-1], shape)
            if self.flag():
                function = activation(self.rng)
                parts.append(Uses(lambda x, function=function: function(x)))
        return nn.Sequential(*parts)

    def same_shape(self, shape: Shape, depth: int) -> nn.Module:
        for _ in range(20):
            inner = self.part(shape, depth)
            if after(inner, shape) == shape:
                return inner
        raise ValueError("nothing that keeps the shape")

    def residual(self, shape: Shape, depth: int) -> nn.Module:
        def augmented(x: Tensor, inner: nn.Module) -> Tensor:
            y = 1.5 * inner(x)
            y += x
            return y

        function = self.rng.choice([augmented, lambda x, inner: x + inner(x), lambda x, inner: torch.add(x, inner(x))])
        return Uses(function, inner=self.same_shape(shape, depth))

    def shared(self, shape: Shape, depth: int) -> nn.Module:
        forms = [
            lambda x, inner: inner(torch.tanh(inner(x))),
            lambda x, inner: inner(x) + inner(x.sin()),
            lambda x, inner: inner(inner(x.cos())) * x,
        ]
        return Uses(self.rng.choice(forms), inner=self.same_shape(shape, depth))

    def nested(self, shape: Shape, depth: int) -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Identity(), self.part(shape, depth)), nn.Dropout())

    def branches(self, shape: Shape, depth: int) -> nn.Module:
        left, right = self.part(shape, depth), self.part(shape, depth)
        if after(left, shape) == after(right, shape):
            join = self.rng.choice([lambda a, b: a * torch.tanh(b), lambda a, b: a - b])
        else:
            join = lambda a, b: torch.cat([a.flatten(1), b.flatten(1)], 1)  # noqa: E731
        return Uses(lambda x, left, right: join(left(x), right(x)), left=left, right=right)

    def reparametrised(self, shape: Shape, depth: int) -> nn.Module:
        inner = self.part(shape, depth)
        owners = [m for m in inner.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
        owners = [m for m in owners if m.weight.ndim >= 2 and not isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
        if not owners:
            raise ValueError("no weight")
        owner = self.rng.choice(owners)
        forms: list[Callable[[], Any]] = [
            lambda: parametrizations.weight_norm(owner, dim=self.rng.choice([0, None])),
            lambda: parametrizations.spectral_norm(owner),
            lambda: parametrize.register_parametrization(owner, "weight", Standardised()),
            lambda: parametrize.register_parametrization(owner, "weight", Gained(len(owner.weight))),
        ]
        self.rng.choice(forms)()
        return inner

    def without_gradient(self, shape: Shape, depth: int) -> nn.Module:
        def under_no_grad(x: Tensor, inner: nn.Module) -> Tensor:
            with torch.no_grad():
                return inner(x)

        quiet = self.rng.choice([under_no_grad, lambda x, inner: inner(x).detach()])
        inner = self.part(shape, depth)
        if after(inner, shape) == shape:
            return Uses(lambda x, inner: x * torch.sigmoid(quiet(x, inner)), inner=inner)
        return Uses(lambda x, inner: torch.cat([x.flatten(1), quiet(x, inner).flatten(1)], 1), inner=inner)

    def in_another_dtype(self, shape: Shape, depth: int) -> nn.Module:
        dtype = self.rng.choice([torch.float64, torch.float64, torch.bfloat16])
        inner = self.part(shape, depth)
        if any(isinstance(module, Cast) for module in inner.modules()) or not list(inner.parameters()):
            raise ValueError("no part of its own")
        if dtype is torch.bfloat16:
            self.coarsest = dtype
        return Cast(inner.to(dtype))

    def counting(self, shape: Shape, depth: int) -> nn.Module:
        return Counting(self.part(shape, depth))

    def of_last(self, shape: Shape) -> nn.Module:
        return self.fitting(shape, lambda: self.rng.choice(LAST))

    def folded(self, shape: Shape, depth: int) -> nn.Module:
        """Steps in time as if they were examples: inside, the batch is t times as long."""
        inner = self.fitting(shape[1:], lambda: self.rng.choice(makers(shape[1:])))
        forms = [
            lambda x, inner: inner(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:2]),
            lambda x, inner: inner(x.transpose(0, 1).flatten(0, 1)).unflatten(0, x.shape[1::-1]).transpose(0, 1),
        ]
        return Uses(self.rng.choice(forms), inner=inner)

    def transposed(self, shape: Shape, depth: int) -> nn.Module:
        """Examples on the second axis."""
        parts = nn.Sequential(self.of_last(shape))
        if self.flag():
            parts.append(self.of_last(after(parts, shape)))
        return Uses(lambda x, inner: inner(x.transpose(0, 1)).transpose(0, 1), inner=parts)

    def windows(self, shape: Shape, depth: int) -> nn.Module:
        t, f = shape
        size = self.rng.choice([s for s in range(1, t + 1) if t % s == 0])
        inner = self.part((size, f), depth)

        def run(x: Tensor, inner: nn.Module) -> Tensor:
            return inner(x.reshape(-1, size, f)).unflatten(0, (len(x), t // size)).flatten(2)

        return Uses(run, inner=inner)

    def rarely_known(self, shape: Shape, depth: int) -> nn.Module:
        """What no rule can serve, or a route of its own."""
        if not self.flag(0.3):
            raise ValueError("rarely")
        self.unknown = True
        if self.flag():
            return unknown(self.rng, shape)
        forms: list[Callable[..., Tensor]] = [
            lambda x, inner: inner(x.flip(0)).flip(0),
            lambda x, inner: checkpoint(inner, x, use_reentrant=False),
            lambda x, inner: torch.cat([inner(one) for one in x.split(1)]),
            lambda x, inner: inner(x[torch.arange(len(x)).roll(1)]).roll(-1, 0),
            lambda x, inner: torch.stack([inner(one[None])[0] for one in x]),
        ]
        return Uses(self.rng.choice(forms), inner=self.part(shape, depth))

    # -- whole networks ----------------------------------------------------------------------------------------------

    def stem(self) -> tuple[nn.Module, Batches, Shape]:
        """What makes a tensor of the inputs, the inputs of n examples, and the shape of an example of that."""
        draw = self.rng
        sizes = [draw.randint(2, 5) for _ in range(4)]
        kind = draw.choice(["row", "sequence", "1d", "2d", "3d", "tokens", "tokens", "both", "pair"])
        if kind == "tokens":
            return self.tokens(sizes[0])
        if kind == "both":
            return self.dictionary(sizes)
        if kind == "pair":
            module = nn.Bilinear(sizes[0], sizes[1], sizes[2])
            shape: Shape = () if self.flag() else (sizes[3],)
            return (
                Uses(lambda x, m: m(x["a"], x["b"]), m=module),
                lambda n, _: {"a": torch.randn(n, *shape, sizes[0]), "b": torch.randn(n, *shape, sizes[1])},
                (*shape, sizes[2]),
            )
        shape = {
            "row": (sizes[0],),
            "sequence": (sizes[0], sizes[1]),
            "1d": (sizes[0], sizes[1] + 3),
            "2d": (sizes[0], sizes[1] + 2, sizes[2] + 2),
            "3d": (draw.randint(1, 2), 3, draw.randint(2, 4), 3),
        }[kind]
        return (
            Uses(lambda x: x),
            lambda n, more: torch.randn(n, shape[0] + more * (kind == "sequence"), *shape[1:]),
            shape,
        )

    def tokens(self, length: int) -> tuple[nn.Module, Batches, Shape]:
        module = embedding(self.rng, (length,))
        with torch.no_grad():
            shape = tuple(module(torch.zeros(2, length, dtype=torch.long)).shape[1:])
        return module, lambda n, more: torch.randint(0, TOKENS, (n, length + more)), shape

    def dictionary(self, sizes: list[int]) -> tuple[nn.Module, Batches, Shape]:
        """Tokens with a mask, beside numbers."""
        length, width = sizes[0], 2 * (sizes[1] // 2)
        attention = self.flag()

        def run(x: dict[str, Tensor], tokens: nn.Module, numbers: nn.Module, m: nn.Module, p: Tensor) -> Tensor:
            hidden = tokens(x["ids"]) + numbers(x["numbers"])[:, None]
            if attention:
                return hidden + m(hidden, hidden, hidden, key_padding_mask=~x["mask"], need_weights=False)[0]
            return torch.where(x["mask"][..., None], hidden, p)

        module = Uses(
            run,
            tokens=nn.Embedding(TOKENS, width, padding_idx=0),
            numbers=nn.Linear(3, width),
            m=nn.MultiheadAttention(width, 2, batch_first=True),
            p=weight(width),
        )

        def inputs(n: int, more: int) -> dict[str, Tensor]:
            mask = torch.arange(length + more) < torch.randint(1, length + 1, (n, 1))
            return {
                "ids": torch.randint(1, TOKENS, (n, length + more)) * mask,
                "mask": mask,
                "numbers": torch.randn(n, 3),
            }

        return module, inputs, (length, width)

    def head(self, shape: Shape, classes: int) -> nn.Module:
        """From whatever comes out of the body to logits."""
        axes = len(shape)
        pooled = axes > 1 and self.flag()
        width = (shape[-1] if self.flag() else shape[0]) if pooled else torch.Size(shape).numel()
        last = pooled and width == shape[-1]

        def row(x: Tensor) -> Tensor:
            if not pooled:
                return x.flatten(1)
            return x.flatten(1, -2).mean(1) if last else x.flatten(2).mean(2)

        forms: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
            (lambda x, m: m(row(x)), {"m": nn.Linear(width, classes, bias=self.flag())}),
            (lambda x, m, s: m(row(x)) * s.exp(), {"m": nn.Linear(width, classes), "s": torch.tensor(0.3)}),
            (lambda x, w, b: row(x) @ w + b, {"w": weight(width, classes), "b": weight(classes)}),
            (lambda x, w, b: torch.addmm(b, row(x), w), {"w": weight(width, classes), "b": weight(classes)}),
            (lambda x, w: torch.einsum("ni,ci->nc", row(x), w), {"w": weight(classes, width)}),
        ]
        forms += (
            []
            if width < 3
            else [  # a normalised number is a sign
                (
                    lambda x, w, s: s.exp() * F.normalize(row(x) + 0.3, eps=1e-2) @ F.normalize(w, dim=1, eps=1e-2).t(),
                    {"w": weight(classes, width), "s": torch.tensor(0.5)},
                ),
            ]
        )
        function, parts = self.rng.choice(forms)
        return Uses(function, **parts)

    def tie(self, model: nn.Module) -> None:
        """Some weights of one shape become one."""
        places = [
            (module, name, parameter)
            for module in model.modules()
            if not getattr(module, "max_norm", None) and not isinstance(module, nn.RNNBase)
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.ndim > 1
        ]
        self.rng.shuffle(places)
        for i, (module, name, parameter) in enumerate(places):
            others = [p for owner, _, p in places[:i] if owner is not module]  # no norm's weight is its bias
            twins = [p for p in others if p.shape == parameter.shape and p.dtype == parameter.dtype]
            if twins and self.flag():
                module._parameters[name] = twins[0]

    def chosen(self, model: nn.Module) -> str:
        """Which parameters are differentiated, some of the head's among them."""
        names = [name for name, _ in model.named_parameters()]
        if self.flag(0.75):
            return ".*"
        kept = [name for name in names if name.endswith("bias")] if self.flag(0.3) else []
        kept = kept or [name for name in names if self.flag()]
        return "|".join(f"^{re.escape(name)}$" for name in dict.fromkeys([*kept, *_of_head(names)]))


def _of_head(names: list[str]) -> list[str]:
    return [name for name in names if name.startswith("head.")] or names[-1:]


class Network(nn.Module):
    def __init__(self, stem: nn.Module, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.stem, self.body, self.head = stem, body, head

    def forward(self, inputs: Any) -> Tensor:
        return self.head(self.body(self.stem(inputs)))


def after(module: nn.Module, shape: Shape) -> Shape:
    """The shape of an example of what a module returns."""
    with torch.no_grad():
        output = module.eval()(torch.randn(2, *shape))
    if len(output) != 2 or not bool(output.isfinite().all()):
        raise ValueError("not one finite row an example")
    return tuple(output.shape[1:])


def draw(seed: int) -> Drawn:
    """The network of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawing = _Draw(seed)
        rng = drawing.rng
        while True:
            found = _drawn(drawing, rng)
            if found is not None:
                return found


def _drawn(drawing: _Draw, rng: Random) -> Drawn | None:
    drawing.unknown, drawing.coarsest = False, torch.float32
    classes = rng.choice([1, 2, 2, 3, 3, 4, 6, 12])
    stem, inputs, shape = drawing.stem()
    body = drawing.sequence(shape, 2)
    model = Network(stem, body, drawing.head(after(body, shape), classes))
    if drawing.flag(0.25):
        drawing.tie(model)
    _off_their_start(model)
    if drawing.flag():
        model, drawing.coarsest = model.double(), torch.float64
    model.train(drawing.flag())
    exact = copy.deepcopy(model).double().eval()
    probe, more = inputs(rng.choice([1, 2, 3, 4]), 0), rng.choice([0, 0, 0, 0, 1, 2])
    n = rng.choice([1, 2, 3, 4, 5, 8])
    batch = inputs(n, more)
    if not _served(exact, batch):
        batch = inputs(n, 0)
    parameters = drawing.chosen(model)
    if not (_served(exact, batch) and _served(exact, probe)):
        return None
    own = next(iter(model.head.parameters())).dtype
    return Drawn(
        model=model,
        exact=exact,
        probe=cast(probe, own),
        batch=cast(batch, own),
        classes=classes,
        parameters=parameters,
        dtype=drawing.coarsest,
        layout="sum" if drawing.flag(0.15) else "per-class",
        served_by_rules=not drawing.unknown,
    )


def _served(exact: nn.Module, batch: Any) -> bool:
    """Whether autograd can differentiate the model on a batch, and the logits are of a sound size."""
    try:
        logits = copy.deepcopy(exact)(cast(batch, torch.float64))
        torch.autograd.backward(logits.sum())
        return bool((logits.abs() < 1e4).all())
    except (RuntimeError, IndexError, ValueError):
        return False


def _off_their_start(model: nn.Module) -> None:
    """Weights, biases and statistics that start at exactly 1 or 0 move off it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """A batch whose floating-point tensors have this dtype."""
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    return {name: cast(value, dtype) for name, value in inputs.items()}
