"""Small layers of every kind that a rule of the Jacobian engine knows, drawn at random for an input's shape.

Each maker takes a source of randomness and the shape [...] of one example, and returns a module that takes [n, ...];
one that raises does not suit that shape. Nothing here looks from one example at another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]
Maker = Callable[[Random, Shape], nn.Module]


class Uses(nn.Module):
    """A function of the input and of parts that are parameters, buffers (named `fixed…`) or modules."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function, self.names = function, list(parts)
        for name, part in parts.items():
            if isinstance(part, Tensor) and name.startswith("fixed"):
                self.register_buffer(name, part)
            else:
                setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Any) -> Tensor:
        return self.function(x, *(getattr(self, name) for name in self.names))


def weight(*shape: int) -> Tensor:
    return torch.randn(shape) / max(1, shape[-1] if shape else 1) ** 0.5


def flag(rng: Random, chance: float = 0.5) -> bool:
    return rng.random() < chance


# Without kinks: near one, two right gradients of different rounding may differ by any amount.
ACTIVATIONS = (torch.tanh, torch.sigmoid, F.silu, F.gelu, F.softplus, F.mish, torch.sin, F.elu)


def activation(rng: Random) -> Callable[[Tensor], Tensor]:
    return rng.choice(ACTIVATIONS)


def _three_or_more(values: int) -> int:
    """The norm of two values is a sign, and its derivative nothing but rounding."""
    if values < 3:
        raise ValueError("too few values for a norm")
    return values


# -- of the last axis: [..., f], whatever the axes before it are -----------------------------------------------------


def linear(rng: Random, shape: Shape) -> nn.Module:
    return nn.Linear(shape[-1], rng.randint(1, 5), bias=flag(rng))


def functional_linear(rng: Random, shape: Shape) -> nn.Module:
    f, g = shape[-1], rng.randint(1, 5)
    forms: list[tuple[Callable[..., Tensor], dict[str, Tensor]]] = [
        (lambda x, w, b: F.linear(x, w, b), {"w": weight(g, f), "b": weight(g)}),
        (lambda x, w, b: F.linear(bias=b, weight=w, input=x), {"w": weight(g, f), "b": weight(g)}),
        (lambda x, w: F.linear(x, w.view(g, f)), {"w": weight(g * f)}),
        (lambda x, w: F.linear(x, w.chunk(2)[1]), {"w": weight(2 * g, f)}),
        (lambda x, w, b: F.linear(x, w[:g], b[g:]), {"w": weight(g + 1, f), "b": weight(2 * g)}),
        (lambda x, w: F.linear(x, w.t()), {"w": weight(f, g)}),
        (lambda x, w: F.linear(F.linear(x, w), w.t()), {"w": weight(g, f)}),
        (lambda x, u, v: F.linear(x, u @ v), {"u": weight(g, 2), "v": weight(2, f)}),
    ]
    function, parts = rng.choice(forms)
    return Uses(function, **parts)


def product(rng: Random, shape: Shape) -> nn.Module:
    f, g = shape[-1], rng.randint(1, 5)

    def labelled(x: Tensor, w: Tensor) -> Tensor:
        axes = "abcde"[: x.ndim - 1]
        return torch.einsum(f"{axes}i,io->{axes}o", x, w)

    def swapped(x: Tensor, w: Tensor) -> Tensor:
        axes = "abcde"[: x.ndim - 1]
        return torch.einsum(f"o i, {axes} i -> {axes} o", w, x)

    def flat(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *parts: function(x.reshape(-1, f), *parts).view(*x.shape[:-1], -1)

    forms: list[tuple[Callable[..., Tensor], dict[str, Tensor]]] = [
        (lambda x, w: x @ w, {"w": weight(f, g)}),
        (lambda x, w: torch.matmul(x, w), {"w": weight(f, g)}),
        (lambda x, w: x.matmul(w.t()), {"w": weight(g, f)}),
        (lambda x, w, b: x @ w.mT + b, {"w": weight(g, f), "b": weight(g)}),
        (lambda x, w: (x @ w)[..., None], {"w": weight(f)}),
        (labelled, {"w": weight(f, g)}),
        (swapped, {"w": weight(g, f)}),
        (flat(lambda x, w: torch.mm(x, w)), {"w": weight(f, g)}),
        (flat(lambda x, w: x.mm(w)), {"w": weight(f, g)}),
        (flat(lambda x, w: torch.mv(x, w)), {"w": weight(f)}),
        (flat(lambda x, w, b: torch.addmm(b, x, w)), {"w": weight(f, g), "b": weight(g)}),
        (flat(lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2.0)), {"w": weight(f, g), "b": weight(1, g)}),
        (flat(lambda x, w, b: b.addmm(x, w)), {"w": weight(f, g), "b": weight(g)}),
        (flat(lambda x, w, b: torch.addmm(b, x, w.t())), {"w": weight(g, f), "b": torch.randn(())}),
        (flat(lambda x, w: torch.addmm(x, x, w, beta=0.3)), {"w": weight(f, f)}),
    ]
    function, parts = rng.choice(forms)
    return Uses(function, **parts)


def norm_of_last(rng: Random, shape: Shape) -> nn.Module:
    f = _three_or_more(shape[-1])
    forms: list[Callable[[], nn.Module]] = [
        lambda: nn.LayerNorm(f, bias=flag(rng)),
        lambda: nn.RMSNorm(f, eps=1e-3),
        lambda: Uses(lambda x, g: g * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-2), g=torch.rand(f) + 0.5),
        lambda: Uses(
            lambda x, g, b: g * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 0.1) + b,
            g=torch.rand(f) + 0.5,
            b=weight(f),
        ),
    ]
    return rng.choice(forms)()


def gated(rng: Random, shape: Shape) -> nn.Module:
    f, g = shape[-1], rng.randint(1, 4)
    return Uses(lambda x, a, b: a(x) * torch.sigmoid(b(x)), a=nn.Linear(f, g), b=nn.Linear(f, g, bias=False))


def bilinear(rng: Random, shape: Shape) -> nn.Module:
    f = shape[-1]
    return Uses(lambda x, m: m(x, torch.tanh(x)), m=nn.Bilinear(f, f, rng.randint(1, 3), bias=flag(rng)))


def scale_of_last(rng: Random, shape: Shape) -> nn.Module:
    f = shape[-1]
    return Uses(lambda x, g, b: x * g + b, g=torch.rand(f) + 0.5, b=weight(f))


LAST: list[Maker] = [linear, functional_linear, product, product, norm_of_last, gated, bilinear, scale_of_last]


# -- of any shape ----------------------------------------------------------------------------------------------------


def broadcast(rng: Random, shape: Shape) -> Shape:
    """A shape that broadcasts to an example's, or to that of a batch of them."""
    shape = tuple(1 if flag(rng, 0.3) else size for size in shape)
    kept = shape[rng.randint(0, len(shape)) :]
    return (1, *shape) if flag(rng, 0.2) else kept


def arithmetic(rng: Random, shape: Shape) -> nn.Module:
    p, q = torch.randn(broadcast(rng, shape)), torch.randn(broadcast(rng, shape))
    forms: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
        lambda x, p, q: x + p - q,
        lambda x, p, q: p - x * q,
        lambda x, p, q: (p + x).mul(q),
        lambda x, p, q: torch.add(x, p, alpha=0.5) * torch.subtract(q, x, alpha=2),
        lambda x, p, q: x / (1 + p.square()) + q / (2 + x.sigmoid()),
        lambda x, p, q: torch.true_divide(q, p.exp() + 1) * x,
        lambda x, p, q: (x.sigmoid() + 0.5) ** p + torch.pow(p.sigmoid() + 0.5, x.tanh()) - q,
        lambda x, p, q: torch.lerp(x, p, 0.3) + torch.lerp(x, torch.sin(x), q.sigmoid()),
        lambda x, p, q: torch.addcmul(x, p, torch.tanh(x), value=0.7) + q,
        lambda x, p, q: torch.addcmul(q, p, torch.tanh(x)) + x,
        lambda x, p, q: torch.addcdiv(x, p, 1 + x.square()) * q,
        lambda x, p, q: torch.where(x.detach() > 0.1, x, p) + q,
        lambda x, p, q: torch.maximum(x, p) - torch.minimum(q, x),
        lambda x, p, q: torch.clamp(x, p - 1, p + 1) + q,
        lambda x, p, q: x.clamp(min=p) * q,
        lambda x, p, q: 1.5 - p + (2 / (1 + q.square())) * x,
        lambda x, p, q: 2 ** p.tanh() * x + q,
        lambda x, p, q: p.expand_as(x) * x + q,
        lambda x, p, q: torch.broadcast_to(p, x.shape) + q * x,
        lambda x, p, q: (2 * torch.tanh(x)).add_(p).mul_(q),
        lambda x, p, q: (2 * x).sub_(p, alpha=0.3).div_(q.square() + 1),
        lambda x, p, q: (2 * x).lerp_(x, p.sigmoid()).addcmul_(q, torch.tanh(x)),
        lambda x, p, q: (x.sigmoid() + 0.2).pow_(p.tanh()).addcdiv_(q, 1 + x.square(), value=0.4),
        _augmented,
        lambda x, p, q: x * (p * q) + p,
        lambda x, p, q: x * p * p + p.detach() * x + q,
    ]
    return Uses(rng.choice(forms), p=p, q=q)


def _augmented(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    y = x - torch.tanh(x)
    y += p
    y *= q
    y -= p
    y /= q.square() + 1
    return y


def scalar(rng: Random, shape: Shape) -> nn.Module:
    forms: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, s: x * s.exp(),
        lambda x, s: x / (1 + s.square()),
        lambda x, s: x + s.sigmoid() * torch.tanh(x),
        lambda x, s: torch.tanh(x) * s,
        lambda x, s: s - x,
    ]
    return Uses(rng.choice(forms), s=torch.randn(rng.choice([(), (1,)])))


def layer_scale(rng: Random, shape: Shape) -> nn.Module:
    """A gain for each channel, the first axis of an example."""
    c, others = shape[0], len(shape) - 1
    forms: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, g: x * g.view(-1, *[1] * others),
        lambda x, g: x * g.reshape(1, -1, *[1] * others),
        lambda x, g: g[(None, slice(None), *[None] * others)] * x,
        lambda x, g: torch.movedim(torch.movedim(x, 1, -1) * g, -1, 1),
        lambda x, g: x.mul(g.unflatten(0, (c, *[1] * others))),
        lambda x, g: x + g.view(c, *[1] * others).expand(c, *x.shape[2:]),
    ]
    return Uses(rng.choice(forms), g=torch.randn(c))


def prelu(rng: Random, shape: Shape) -> nn.Module:
    return nn.PReLU(rng.choice([1, shape[0]]))


def layer_norm_of_all(rng: Random, shape: Shape) -> nn.Module:
    _three_or_more(torch.Size(shape).numel())
    return nn.LayerNorm(shape, bias=flag(rng))


def repeated(rng: Random, shape: Shape) -> nn.Module:
    """A parameter repeated for every example, then added."""
    forms: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, p: x + p.expand(len(x), *shape),
        lambda x, p: p.expand(len(x), *[-1] * len(shape)) * x,
        lambda x, p: x + p.repeat(len(x), *[1] * len(shape)),
        lambda x, p: x - p.repeat([len(x), *[1] * len(shape)]).tanh(),
    ]
    return Uses(rng.choice(forms), p=weight(1, *shape))


ANYWHERE: list[Maker] = [
    arithmetic,
    arithmetic,
    arithmetic,
    scalar,
    layer_scale,
    prelu,
    layer_norm_of_all,
    repeated,
]


# -- of rows [f] -----------------------------------------------------------------------------------------------------


def norm_of_rows(rng: Random, shape: Shape) -> nn.Module:
    f = shape[0]
    groups = [g for g in range(1, f) if f % g == 0 and f // g > 2]
    return nn.GroupNorm(rng.choice(groups), f, eps=1e-2) if groups and flag(rng) else nn.BatchNorm1d(f)


def chosen_rows(rng: Random, shape: Shape) -> nn.Module:
    """Each example takes its row of a table, which it looks up by itself."""
    f = shape[0]
    forms: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, table: x + F.embedding(x.argmax(1) % 3, table),
        lambda x, table: torch.where((x[:, :1] > 0), x, table[0]),
    ]
    return Uses(rng.choice(forms), table=weight(3, f))


def widened(rng: Random, shape: Shape) -> nn.Module:
    """Rows to sequences: an outer product with a parameter, or a learned reshaping."""
    f, t = shape[0], rng.randint(1, 4)
    forms: list[tuple[Callable[..., Tensor], Tensor]] = [
        (lambda x, w: x[:, None, :] * w, weight(t, f)),
        (lambda x, w: x[:, None, :] * w[None, :, None], weight(t)),
        (lambda x, w: torch.einsum("ni,tio->nto", x, w), weight(t, f, 2)),
        (lambda x, w: torch.einsum("ni,t->nti", x, w), weight(t)),
        (lambda x, w: F.linear(x, w).unflatten(1, (t, 2)), weight(2 * t, f)),
    ]
    function, w = rng.choice(forms)
    return Uses(function, w=w)


ROWS: list[Maker] = [norm_of_rows, norm_of_rows, chosen_rows, widened]


# -- of sequences [t, f] ---------------------------------------------------------------------------------------------


def mixed_in_time(rng: Random, shape: Shape) -> nn.Module:
    (t, f), u = shape, rng.randint(1, 4)
    forms: list[tuple[Callable[..., Tensor], Tensor]] = [
        (lambda x, w: w @ x, weight(u, t)),
        (lambda x, w: torch.matmul(w, x), weight(1, u, t)),
        (lambda x, w: (x.transpose(1, 2) @ w).transpose(1, 2), weight(t, u)),
        (lambda x, w: torch.einsum("ut,ntf->nuf", w, x), weight(u, t)),
        (lambda x, w: torch.einsum("ntf,tfo->nto", x, w), weight(t, f, 2)),
        (lambda x, w: torch.einsum("btf,tf->bt", x, w)[..., None], weight(t, f)),
        (lambda x, w: torch.einsum("ntf,fhd->nhtd", x, w).flatten(2), weight(f, 2, 2)),
        (lambda x, w: torch.einsum("bij,jk->bik", x, w), weight(f, u)),
        (lambda x, w: torch.bmm(w.expand(len(x), -1, -1), x), weight(1, u, t)),
        (lambda x, w: torch.bmm(x, w.repeat(len(x), 1, 1)), weight(1, f, u)),
        (lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), weight(t, f, u)),
        (lambda x, w: torch.baddbmm(x, w.expand(len(x), -1, -1), x), weight(1, t, t)),
        (lambda x, w: (x[:, :, None] @ w).squeeze(2), weight(t, f, u)),
    ]
    function, w = rng.choice(forms)
    return Uses(function, w=w)


def class_token(rng: Random, shape: Shape) -> nn.Module:
    _, f = shape
    forms: list[tuple[Callable[..., Tensor], Tensor]] = [
        (lambda x, token: torch.cat([token.expand(len(x), -1, -1), x], 1), weight(1, 1, f)),
        (lambda x, token: torch.cat([x, token.repeat(len(x), 1, 1)], 1), weight(1, 2, f)),
        (lambda x, token: torch.cat((token.expand(x.shape[0], 1, f), x), dim=1), weight(f)),
        (lambda x, token: torch.cat([x, token.unsqueeze(0).expand(len(x), -1, -1)], 1), weight(1, f)),
        (lambda x, token: torch.cat([x.transpose(0, 1), token.expand(1, len(x), f)]).transpose(0, 1), weight(f)),
    ]
    function, token = rng.choice(forms)
    return Uses(function, token=token)


def positions(rng: Random, shape: Shape) -> nn.Module:
    t, f = shape
    forms: list[tuple[Callable[..., Tensor], Any]] = [
        (lambda x, p: x + p(torch.arange(x.shape[1])), nn.Embedding(t + 2, f)),
        (lambda x, p: x + p(torch.arange(x.shape[1])[None]), nn.Embedding(t + 2, f)),
        (lambda x, p: x + p(torch.arange(x.shape[1]).expand(len(x), -1)), nn.Embedding(t + 2, f)),
        (lambda x, p: x + p[: x.shape[1]], weight(t + 1, f)),
        (lambda x, p: x + p[:, : x.shape[1]], weight(1, t + 1, f)),
        (lambda x, p: x * p.weight[: x.shape[1]], nn.Embedding(t + 2, f)),
    ]
    function, p = rng.choice(forms)
    return Uses(function, p=p)


def multi_head(rng: Random, shape: Shape) -> nn.Module:
    _, f = shape
    heads = rng.choice([h for h in (1, 2) if f % h == 0])
    first = flag(rng)
    options = {"bias": flag(rng), "add_bias_kv": flag(rng, 0.3), "add_zero_attn": flag(rng, 0.2), "batch_first": first}
    kdim = rng.choice([None, 3])

    def run(x: Tensor, m: nn.Module, lift: nn.Module) -> Tensor:
        x = x if first else x.transpose(0, 1)
        key = lift(x)
        query = x[:, :2] if first else x[:2]
        found = m(query, key, torch.tanh(key), need_weights=False)[0] if kdim else m(x, x, x, need_weights=weights)[0]
        return found if first else found.transpose(0, 1)

    weights = flag(rng)
    lift = nn.Linear(f, 3) if kdim else nn.Identity()
    return Uses(run, m=nn.MultiheadAttention(f, heads, kdim=kdim, vdim=kdim, **options), lift=lift)


def attention_with_bias(rng: Random, shape: Shape) -> nn.Module:
    """Scores to which a learned mask is added, or entries gathered from a table."""
    t, f = shape
    forms: list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = [
        (lambda p, index: p, weight(t, t)),
        (lambda p, index: p[None], weight(2, t, t)),
        (lambda p, i: p[i.view(-1)].view(t, t, 2).permute(2, 0, 1).contiguous().unsqueeze(0), weight(5, 2)),
        (lambda p, index: 2 * torch.sigmoid(p[index]), weight(5)),
    ]
    mask, p = rng.choice(forms)
    fused, scale = flag(rng), rng.choice([None, 0.7])

    def run(x: Tensor, m: nn.Module, p: Tensor, index: Tensor) -> Tensor:
        q, k, v = m(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        if fused:
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask(p, index), scale=scale)
        else:
            found = ((q @ k.transpose(-1, -2)) + mask(p, index)).softmax(-1) @ v
        return found.transpose(1, 2).flatten(2)

    return Uses(run, m=nn.Linear(f, 6 * rng.randint(1, 2)), p=p, fixed=torch.randint(0, 5, (t, t)))


def encoder_layer(rng: Random, shape: Shape) -> nn.Module:
    f = _three_or_more(shape[1])
    options = {"activation": "gelu", "batch_first": True, "norm_first": flag(rng), "bias": flag(rng)}
    return nn.TransformerEncoderLayer(f, rng.choice([1, f]), 3, **options)


def recurrent(rng: Random, shape: Shape) -> nn.Module:
    _, f = shape
    kind, first = rng.choice([nn.LSTM, nn.GRU, nn.RNN]), flag(rng)
    hidden, both, layers = rng.randint(1, 3), flag(rng, 0.4), rng.randint(1, 2)
    projected = {"proj_size": 1} if kind is nn.LSTM and hidden > 1 and flag(rng, 0.1) else {}
    options = {"num_layers": layers, "bidirectional": both, "bias": flag(rng, 0.8), **projected}
    form = rng.choice(["outputs", "state", "started"])

    def run(x: Tensor, m: Any, start: Tensor) -> Tensor:
        x = x if first else x.transpose(0, 1)
        if form != "started":
            outputs, state = m(x)
            if form == "state":
                return (state[0] if isinstance(state, tuple) else state).transpose(0, 1)
        else:
            n = x.shape[0 if first else 1]
            given = start.expand(-1, n, -1)
            outputs, _ = m(x, (given, given.tanh()) if kind is nn.LSTM else given)
        return outputs if first else outputs.transpose(0, 1)

    start = weight(layers * (1 + both), 1, hidden)
    if projected and form == "started":
        form = "outputs"
    return Uses(run, m=kind(f, hidden, batch_first=first, **options), start=start)


def cell(rng: Random, shape: Shape) -> nn.Module:
    _, f = shape
    kind, hidden = rng.choice([nn.LSTMCell, nn.GRUCell, nn.RNNCell]), rng.randint(1, 3)

    def run(x: Tensor, m: nn.Module) -> Tensor:
        state, outputs = None, []
        for step in x.unbind(1):
            state = m(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)

    return Uses(run, m=kind(f, hidden, bias=flag(rng, 0.8)))


SEQUENCES: list[Maker] = [
    mixed_in_time,
    mixed_in_time,
    class_token,
    positions,
    multi_head,
    attention_with_bias,
    encoder_layer,
    recurrent,
    recurrent,
    cell,
]


# -- of channels [c, *space] -----------------------------------------------------------------------------------------

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _each(rng: Random, dims: int, low: int, high: int) -> Any:
    return rng.randint(low, high) if flag(rng) else tuple(rng.randint(low, high) for _ in range(dims))


def _groups(rng: Random, inputs: int) -> tuple[int, int]:
    groups = rng.choice([1, 1, inputs, *(g for g in range(1, inputs) if inputs % g == 0)])
    return groups, groups * rng.randint(1, 2) if groups > 1 else rng.randint(1, 4)


def convolution(rng: Random, shape: Shape) -> nn.Module:
    dims = len(shape) - 1
    groups, outputs = _groups(rng, shape[0])
    options: dict[str, Any] = {"groups": groups, "bias": flag(rng), "dilation": _each(rng, dims, 1, 2)}
    if flag(rng, 0.25):
        options["padding"] = rng.choice(["same", "valid"])
    else:
        options |= {"padding": _each(rng, dims, 0, 2), "stride": _each(rng, dims, 1, 2)}
    if flag(rng, 0.2):
        options["padding_mode"] = rng.choice(["circular", "replicate", "reflect"])
    return _CONV[dims - 1](shape[0], outputs, _each(rng, dims, 1, 3), **options)


def transposed_convolution(rng: Random, shape: Shape) -> nn.Module:
    dims = len(shape) - 1
    groups, outputs = _groups(rng, shape[0])
    stride, dilation = rng.randint(1, 3), rng.randint(1, 2)
    more = rng.randint(0, max(stride, dilation) - 1)
    return _TRANSPOSED[dims - 1](
        shape[0],
        outputs,
        _each(rng, dims, 1, 3),
        stride=stride,
        dilation=dilation,
        output_padding=more,
        padding=_each(rng, dims, 0, 1),
        groups=groups,
        bias=flag(rng),
    )


def norm_of_channels(rng: Random, shape: Shape) -> nn.Module:
    c, dims, space = shape[0], len(shape) - 1, torch.Size(shape[1:]).numel()
    groups = [g for g in range(1, c + 1) if c % g == 0 and c // g * space > 2]
    batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1]
    forms: list[Callable[[], nn.Module]] = [
        lambda: batch(c),
        lambda: nn.GroupNorm(rng.choice(groups), c, eps=1e-2),
        lambda: instance(c, affine=_three_or_more(space) > 2, eps=1e-2),
        lambda: instance(c, affine=True, track_running_stats=True),
    ]
    return rng.choice(forms)()


def pool(rng: Random, shape: Shape) -> nn.Module:
    dims = len(shape) - 1
    kinds = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    return kinds[dims - 1](rng.randint(1, 2))


CHANNELS: list[Maker] = [convolution, convolution, convolution, transposed_convolution, norm_of_channels, pool]


# -- of tokens -------------------------------------------------------------------------------------------------------

TOKENS = 7


def embedding(rng: Random, shape: Shape) -> nn.Module:
    """Tokens [t] to a sequence, or by a bag of them to a row."""
    width = rng.randint(1, 4)
    padding = rng.choice([None, None, 0, 3])
    norm = {"max_norm": 0.8} if flag(rng, 0.2) else {}
    options = {"padding_idx": padding, "sparse": flag(rng, 0.2)}
    if flag(rng, 0.7):
        if flag(rng, 0.3):
            return Uses(lambda ids, w: F.embedding(ids, w, padding), w=weight(TOKENS, width))
        return nn.Embedding(TOKENS, width, **options, **norm)
    mode = rng.choice(["sum", "mean"])
    if mode == "sum" and flag(rng):
        return Uses(
            lambda ids, bag: bag(ids, per_sample_weights=(ids + 1.0).to(bag.weight) / 5),
            bag=nn.EmbeddingBag(TOKENS, width, mode="sum", padding_idx=padding),
        )
    return nn.EmbeddingBag(TOKENS, width, mode=mode, **options, **norm)


def makers(shape: Shape) -> Sequence[Maker]:
    """All that may suit an example of this shape."""
    own = {1: ROWS, 2: [*SEQUENCES, *CHANNELS], 3: CHANNELS, 4: CHANNELS}[len(shape)]
    return [*own, *own, *ANYWHERE, *LAST]


def unknown(rng: Random, shape: Shape) -> nn.Module:
    """Of the last axis, by functions that no rule knows."""
    f, g = shape[-1], rng.randint(1, 3)
    forms: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
        lambda x, w, p: torch.cdist(x.unsqueeze(-2), w).squeeze(-2).square(),
        lambda x, w, p: torch.tensordot(x, w, dims=([-1], [1])),
        lambda x, w, p: F.cosine_similarity(x[..., None, :], w + 2, dim=-1, eps=1e-2),
        lambda x, w, p: torch.logaddexp(x, p),
        lambda x, w, p: torch.atan2(x, p.exp()),
        lambda x, w, p: torch.logsumexp(torch.stack([x, p.expand_as(x)]), 0),
        lambda x, w, p: torch.hypot(x, p) + p.cumsum(0)[x.argmax(-1)][..., None],
        lambda x, w, p: torch.einsum("...i,oi->...o", x, w),
        lambda x, w, p: torch.cat([x, torch.outer(p, p).sum(0).expand_as(x)], -1),
        lambda x, w, p: F.softmax(torch.baddbmm(p.expand(1, g, f), w[None], p.diag()[None])[0] @ x[..., None], -2)[
            ..., 0
        ],
        lambda x, w, p: x.index_add(-1, torch.arange(f), p.expand_as(x)),
        lambda x, w, p: torch.xlogy(x, 1 + p.square()) + torch.special.expit(p) * x,
    ]
    return Uses(rng.choice(forms), w=weight(g, f), p=weight(f))
