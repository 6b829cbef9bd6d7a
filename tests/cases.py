"""The models that tests share: each a seeded factory, a batch of inputs, and how to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradstore as gs


@dataclass(frozen=True)
class Case:
    """A model of the test list.

    Attributes:
        name: its test id.
        build: makes the module, in training mode and float32, the same at each call with one seed.
        inputs: makes a batch (Tensor or dict of Tensors, first axis n) from a number of examples.
        classes: number of logits.
        forward: how to call the model where `model(inputs)` does not do.
        parameters: which parameters are differentiated.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    classes: int
    forward: Callable[[nn.Module, Any], Tensor] | None = None
    parameters: str = ".*"

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module in eval mode, its batch statistics moved off their trivial start."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.build()
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    if name.endswith(("running_mean", "running_var")):
                        buffer.add_(torch.rand_like(buffer))
                for parameter in module.parameters():
                    if parameter.ndim == 1:  # affine weights and biases start at exactly 1 and 0
                        parameter.add_(0.1 * torch.randn_like(parameter))
        return module.to(dtype).eval()

    def batch(self, n: int = 4, seed: int = 1, dtype: torch.dtype = torch.float32) -> Any:
        """A batch of n different examples; floating-point tensors in `dtype`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inputs = self.inputs(n)
        if isinstance(inputs, Tensor):
            return _cast(inputs, dtype)
        return {key: _cast(value, dtype) for key, value in inputs.items()}

    def logits(self, module: nn.Module, inputs: Any) -> Tensor:
        """The model's output, [n, classes]."""
        return module(inputs) if self.forward is None else self.forward(module, inputs)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def rows(inputs: Any, start: int, stop: int) -> Any:
    """Examples [start, stop) of a batch."""
    if isinstance(inputs, Tensor):
        return inputs[start:stop]
    return {key: value[start:stop] for key, value in inputs.items()}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7, bias=False), nn.ReLU(), nn.Linear(7, 3))


class SmallCNN(nn.Module):
    """Two convolutions with BatchNorm and in-place ReLU, as the digits demo has."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
        )
        self.head = nn.Linear(8, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


class SmallTransformer(nn.Module):
    """An encoder over tokens with learned positions and a padding mask; the input is a dict."""

    def __init__(self, vocabulary: int = 23, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=0)
        self.positions = nn.Embedding(16, width)
        layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        ids, mask = inputs["ids"], inputs["mask"]
        hidden = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        hidden = self.encoder(hidden, src_key_padding_mask=~mask)
        weight = mask.to(hidden.dtype).unsqueeze(-1)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


def tokens_and_mask(n: int, length: int = 7, vocabulary: int = 23) -> dict[str, Tensor]:
    ids = torch.randint(1, vocabulary, (n, length))
    mask = torch.arange(length) < torch.randint(3, length + 1, (n, 1))
    return {"ids": ids * mask, "mask": mask}


class TiedAutoencoder(nn.Module):
    """One matrix used by an embedding and, transposed roles, by the output layer."""

    def __init__(self, vocabulary: int = 11, width: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.decode = nn.Linear(width, vocabulary)
        self.decode.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.mix(self.embed(ids))).mean(1))


class SharedLayer(nn.Module):
    """One linear layer called three times, with a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.shared, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.enter(x))
        for _ in range(3):
            hidden = hidden + torch.tanh(self.shared(hidden))
        return self.head(hidden)


class FunctionalWeights(nn.Module):
    """Weights used outside their modules: functional calls, a transposed use, a penalty on the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(x, self.first.weight, self.first.bias))
        hidden = self.second(hidden) + hidden @ self.second.weight
        back = F.linear(hidden, self.first.weight.t())
        return self.head(back) + self.second.weight.square().mean()


class ResidualBlockNet(nn.Module):
    """Residual blocks written with in-place additions and in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shortcut = nn.Conv2d(4, 4, 1, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.stem(x)))
        y = F.relu_(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.head(F.relu_(y).mean((2, 3)))


class SequenceFirstAttention(nn.Module):
    """Multi-head attention in its default layout, [length, batch, width], then cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.lift(x).transpose(0, 1)
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        hidden = self.norm(hidden + self.cross(hidden[:2], hidden, hidden)[0].mean(0))
        return self.head(hidden.mean(0))


class RecurrentNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 5)
        self.lstm = nn.LSTM(5, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(ids))[0][:, -1])


class CustomParameters(nn.Module):
    """A class token, learned positions, a layer scale and a hand-written norm: parameters outside any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(4, 6)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(1, 6, 6))
        self.gain = nn.Parameter(torch.randn(6))
        self.mixing = nn.Parameter(torch.randn(6, 6))
        self.unused = nn.Parameter(torch.randn(3))
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.cat([self.token.expand(x.shape[0], -1, -1), self.lift(x)], 1) + self.positions
        hidden = hidden + self.gain * torch.einsum("nti,io->nto", hidden, self.mixing).tanh()
        return self.head(hidden[:, 0] * torch.rsqrt(hidden.square().mean((1, 2)) + 1e-5)[:, None]) / self.temperature


class ConvolutionVariants(nn.Module):
    """Stride, dilation, groups, depthwise, 'same' and circular padding."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding="same", dilation=2),
            nn.GroupNorm(2, 8),
            nn.ELU(inplace=True),
            nn.Conv2d(8, 8, (3, 2), groups=8, padding=(1, 0), padding_mode="circular"),
            nn.InstanceNorm2d(8, affine=True),
            nn.Conv2d(8, 12, 3, stride=(2, 1), groups=4, padding_mode="reflect", padding=1),
            nn.SiLU(),
            nn.Conv2d(12, 6, (1, 4), padding="same", bias=False),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.RMSNorm(24),
            nn.Linear(24, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Convolution1dAnd3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Sequential(nn.Conv1d(2, 4, 4, stride=2, padding=1), nn.BatchNorm1d(4), nn.GELU())
        self.volume = nn.Sequential(nn.Conv3d(1, 3, (2, 3, 1), dilation=(1, 1, 2), groups=1), nn.BatchNorm3d(3))
        self.transposed = nn.ConvTranspose1d(4, 3, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        line = self.transposed(self.line(inputs["line"])).mean(-1)
        return self.head(torch.cat([line, self.volume(inputs["volume"]).mean((2, 3, 4))], 1))


def parametrised() -> nn.Module:
    """Weight normalisation: the module's weight is computed from two other parameters."""
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 3))


class PackedRecurrence(nn.Module):
    """Sorts its examples by length and drops padding, so rows do not stay where their example was."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 5)
        self.inner = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        ids, mask = inputs["ids"], inputs["mask"]
        order = mask.sum(1).argsort(descending=True)
        kept = torch.tanh(self.inner(self.embed(ids[order][mask[order]])))
        owner = torch.arange(len(ids), device=ids.device)[order][:, None].expand_as(mask)[mask[order]]
        pooled = kept.new_zeros(len(ids), 5).index_add(0, owner, kept)
        return self.head(pooled)


def _normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape)


def _ids(length: int, vocabulary: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(0, vocabulary, (n, length))


CASES = [
    Case("mlp", mlp, _normal(6), 3),
    Case("cnn-batchnorm", SmallCNN, _normal(1, 8, 8), 4),
    Case("transformer-dict", SmallTransformer, tokens_and_mask, 3),
    Case("one-logit", lambda: nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 1)), _normal(5), 1),
    Case("tied-weights", TiedAutoencoder, _ids(6, 11), 11),
]
"""The models that every part of the library is tested on."""

HARD_CASES = [
    Case("shared-layer", SharedLayer, _normal(5), 3),
    Case("functional-weights", FunctionalWeights, _normal(5), 3),
    Case("residual-inplace", ResidualBlockNet, _normal(2, 6, 6), 3),
    Case("sequence-first-attention", SequenceFirstAttention, _normal(5, 4), 3),
    Case("lstm", RecurrentNet, _ids(6, 13), 3),
    Case("custom-parameters", CustomParameters, _normal(5, 4), 3),
    Case("convolution-variants", ConvolutionVariants, _normal(4, 7, 6), 3),
    Case(
        "convolution-1d-3d",
        Convolution1dAnd3d,
        lambda n: {"line": torch.randn(n, 2, 9), "volume": torch.randn(n, 1, 4, 5, 3)},
        4,
    ),
    Case("weight-norm", parametrised, _normal(5), 3),
    Case("packed-rows", PackedRecurrence, tokens_and_mask, 3),
    Case("head-only", SmallCNN, _normal(1, 8, 8), 4, parameters=r"head\..*|features\.5\..*"),
    Case("positional-call", mlp, lambda n: {"x": torch.randn(n, 6)}, 3, forward=lambda model, x: model(x["x"])),
]
"""Models on which a per-example Jacobian taken from layers goes wrong unless their traps are seen."""


def project_of(case: Case, n: int = 5, **changes: Any) -> gs.Project:
    """A project of a case, with n examples in its split "train"."""
    inputs = case.batch(n)
    items = [(_first(rows(inputs, i, i + 1)), i % case.classes) for i in range(n)]
    settings = {
        "model": case.model(),
        "splits": {"train": items},
        "forward": case.forward,
        "parameters": case.parameters,
    }
    return gs.Project(**{**settings, **changes})


def _first(batch: Any) -> Any:
    return batch[0] if isinstance(batch, Tensor) else {name: x[0] for name, x in batch.items()}
