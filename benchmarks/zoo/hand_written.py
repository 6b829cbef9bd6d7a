"""What people write by hand: one model for each way in which a parameter is used that libraries seldom have."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from .entry import CLASSES, Entry, images, rows, tokens

_small_images = partial(images, size=8)
_digits = partial(images, size=8, channels=1)


def _cnn(*activation: nn.Module, width: int = 8) -> nn.Module:
    """Two convolutions for 8 × 8 digits, each with what is between layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), activation[0], nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), activation[-1], nn.Flatten()),
        nn.Linear(2 * width * 16, CLASSES),
    )


def prelu_cnn() -> nn.Module:
    return _cnn(nn.PReLU(8), nn.PReLU())


def batch_norm_mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU()),
        *(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, CLASSES)),
    )


def group_norm_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.GroupNorm(4, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def instance_norm_cnn() -> nn.Module:
    return _cnn(
        nn.Sequential(nn.InstanceNorm2d(8, affine=True), nn.ReLU()), nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU())
    )


class LayerScale(nn.Module):
    """Residual branches, each times a vector, as in ConvNeXt and CaiT."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(20, 32), nn.Linear(32, CLASSES)
        self.branches = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.gamma = nn.Parameter(torch.full((2, 32), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for branch, gamma in zip(self.branches, self.gamma, strict=True):
            x = x + gamma * F.gelu(branch(x))
        return self.head(x)


class ReshapedScale(nn.Module):
    """A scale [channels] reshaped to [channels, 1, 1], and a scalar temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.gamma, self.temperature = nn.Parameter(torch.ones(8)), nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        x = x + self.second(x) * self.gamma.reshape(1, -1, 1, 1)
        return self.head(x.mean((2, 3))) / self.temperature


class AddedBias(nn.Module):
    """`x + beta`, and `x += bias` in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.first, self.second = nn.Linear(20, 32, bias=False), nn.Linear(32, CLASSES, bias=False)
        self.inner, self.outer = nn.Parameter(torch.zeros(32)), nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.in_place:
            x += self.inner
        else:
            x = x + self.inner
        y = self.second(torch.relu(x))
        if self.in_place:
            y += self.outer
            return y
        return y + self.outer


class WindowAttention(nn.Module):
    """Self-attention with a learnt table of relative biases, as in Swin."""

    def __init__(self, width: int = 16, heads: int = 2, side: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.cut = nn.Conv2d(3, width, 2, stride=2)
        self.qkv, self.mix, self.head = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, CLASSES)
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        apart = (places[:, :, None] - places[:, None, :]) + side - 1
        self.register_buffer("index", apart[0] * (2 * side - 1) + apart[1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.cut(x).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.flatten()].view(*self.index.shape, -1).permute(2, 0, 1)
        weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias).softmax(-1)
        x = x + self.mix((weights @ value).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


class Conv1D(nn.Module):
    """GPT-2's layer: a weight [in, out] used by `torch.addmm`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


def addmm_net() -> nn.Module:
    return nn.Sequential(Conv1D(20, 32), nn.Tanh(), Conv1D(32, 32), nn.Tanh(), nn.Flatten(), nn.Linear(96, CLASSES))


class MatmulNet(nn.Module):
    """Weights used by `@` and `torch.einsum`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(20, 32) / 5)
        self.second = nn.Parameter(torch.randn(32, CLASSES) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,io->bo", torch.tanh(x @ self.first), self.second)


class BilinearNet(nn.Module):
    """`nn.Bilinear` of two projections of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(20, 8), nn.Linear(20, 6), nn.Bilinear(8, 6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(x)), torch.tanh(self.right(x)))


def transposed_1d() -> nn.Module:
    return nn.Sequential(
        *(nn.ConvTranspose1d(4, 8, 3, stride=2, padding=1, output_padding=1), nn.GELU()),
        *(nn.ConvTranspose1d(8, 6, 3, dilation=2, groups=2, bias=False), nn.GELU()),
        *(nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(12, CLASSES)),
    )


def transposed_2d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.GELU()),
        *(nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=4), nn.GELU()),
        *(nn.ConvTranspose2d(8, 4, (2, 3), stride=(2, 1), dilation=(1, 2)), nn.GELU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)),
    )


class Bag(nn.Module):
    """A bag of words."""

    def __init__(self, bag: nn.EmbeddingBag) -> None:
        super().__init__()
        self.bag, self.head = bag, nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bag(x))


class Words(nn.Module):
    """The mean of embeddings, through two layers."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding
        self.body = nn.Sequential(nn.Linear(embedding.embedding_dim, 32), nn.Tanh(), nn.Linear(32, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.embedding(x).mean(1))


def depthwise_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 5, stride=2, padding=2, groups=32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)),
    )


def grouped_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, groups=4), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, stride=2, dilation=2, padding="valid", groups=8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)),
    )


def circular_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Flatten(), nn.Linear(512, CLASSES)),
    )


def volume_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2)),
        *(nn.Conv3d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)),
    )


def normed_weights(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A digits CNN whose convolutions and first linear layer have a function of a weight in its place."""
    model = nn.Sequential(
        *(norm(nn.Conv2d(1, 8, 3, padding=1)), nn.Tanh(), nn.MaxPool2d(2)),
        *(norm(nn.Conv2d(8, 16, 3, padding=1)), nn.Tanh(), nn.Flatten()),
        *(norm(nn.Linear(256, 32)), nn.Tanh(), nn.Linear(32, CLASSES)),
    )
    for _ in range(20):  # the power iterations of a spectral norm go on while training
        model(images(2, 8, 1))
    return model


class StandardisedConv2d(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019)."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding)


def standardised_cnn() -> nn.Module:
    return nn.Sequential(
        *(StandardisedConv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2)),
        *(StandardisedConv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)),
    )


class Recurrent(nn.Module):
    """Tokens through a recurrent layer; the last state is classified."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(100, 16), layer
        self.head = nn.Linear(layer.hidden_size * (1 + layer.bidirectional), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.words(x))[0][:, -1])


class CellLoop(nn.Module):
    """A recurrent cell in a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(6, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 16)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


class Tied(nn.Module):
    """One matrix as embedding and, with a projection, as output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(60, 16), nn.Linear(16, 16)
        self.out, self.head = nn.Linear(16, 60), nn.Linear(60, CLASSES)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.out(torch.tanh(self.body(self.words(x).mean(1))))))


class SharedLayer(nn.Module):
    """One layer used three times, once under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(20, 32), nn.Linear(32, 32), nn.Linear(32, CLASSES)
        self.again = self.layer

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.again(torch.tanh(self.layer(torch.tanh(self.layer(x)))))))


class ResidualMlp(nn.Module):
    """Norms before, shortcuts around."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(20, 32), nn.Linear(32, CLASSES)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


class Sine(nn.Module):
    """sin(30 x), the activation of SIREN."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


class Siren(nn.Module):
    """SIREN (Sitzmann et al. 2020) with its initialisation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), Sine(), nn.Linear(32, 32), Sine(), nn.Linear(32, CLASSES))
        with torch.no_grad():
            self.net[0].weight.uniform_(-1 / 4, 1 / 4)
            for layer in (self.net[2], self.net[4]):
                layer.weight.uniform_(-math.sqrt(6 / 32) / 30, math.sqrt(6 / 32) / 30)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class SoftExperts(nn.Module):
    """A mixture of experts, all of them weighted by a softmax."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(20, experts), nn.Linear(32, CLASSES)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(20, 32), nn.ReLU()) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        each = torch.stack([expert(x) for expert in self.experts], dim=1)
        return self.head((self.gate(x).softmax(-1)[..., None] * each).sum(1))


class BatchedExperts(nn.Module):
    """The same with all experts in one tensor, multiplied by `torch.einsum`."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(20, experts), nn.Linear(32, CLASSES)
        self.weight = nn.Parameter(torch.randn(experts, 20, 32) / 5)

    def forward(self, x: Tensor) -> Tensor:
        each = torch.relu(torch.einsum("bi,eio->beo", x, self.weight))
        return self.head((self.gate(x).softmax(-1)[..., None] * each).sum(1))


class TopOneExpert(nn.Module):
    """A mixture of experts in which each example goes through one expert only."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(20, experts), nn.Linear(32, CLASSES)
        self.experts = nn.ModuleList(nn.Linear(20, 32) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        best, chosen = shares.max(-1)
        out = x.new_zeros(len(x), 32)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero().flatten()
            out = out.index_add(0, mine, torch.tanh(expert(x[mine])) * best[mine, None])
        return self.head(out)


class DoubleLogits(nn.Module):
    """A float32 body whose logits are float64."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).double()


class FloatLogits(nn.Module):
    """A body of half precision whose logits are float32."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Linear(20, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, CLASSES))
        )

    def forward(self, x: Tensor) -> Tensor:
        logits = self.body(x)
        return logits if logits.dtype == torch.float64 else logits.float()


def audio_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(1, 8, 16, stride=4), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(8, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(16, 16, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, CLASSES)),
    )


def transformer() -> nn.Module:
    """PyTorch's own encoder."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(96, CLASSES))


def scripted() -> nn.Module:
    return torch.jit.script(_cnn(nn.Tanh()))


def compiled() -> nn.Module:
    return torch.compile(batch_norm_mlp(), backend="eager")  # type: ignore[return-value]


class Counting(nn.Module):
    """Counts its calls, and keeps a running mean of its inputs, in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, CLASSES))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(20))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.body(x)


class FastAndSlow(nn.Module):
    """Parts under `torch.no_grad` and behind `detach`; some parameters never matter."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.body, self.head = nn.Linear(20, 20), nn.Linear(20, 32), nn.Linear(32, CLASSES)
        self.unused = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.tanh(self.frozen(x))
        return self.head(torch.tanh(self.body(x)))


class RootMeanSquare(nn.Module):
    """A norm as people write it: x · rsqrt(mean x²) · gain."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.gain = nn.Linear(20, 32), nn.Linear(32, CLASSES), nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain)


class ClassToken(nn.Module):
    """A ViT's start: a class token expanded over the batch, and positions that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 16, 4, stride=4)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.zeros(1, 5, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cut(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.places
        return self.head(self.layer(x)[:, 0])


class ConvolutionalStem(nn.Module):
    """Tokens from a batch norm's output, whose gradient is transposed then, as in LeViT and CvT."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16))
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head((x + torch.tanh(self.body(x))).mean(1))


class CachedBias(nn.Module):
    """Picks biases from a table once in eval mode and keeps them, as LeViT and EfficientFormer do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.table = nn.Linear(20, 32), nn.Linear(32, CLASSES), nn.Parameter(torch.zeros(8))
        self.register_buffer("index", torch.arange(32) % 8)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if str(x.device) not in self.cache:
            self.cache[str(x.device)] = self.table[self.index]
        return self.head(torch.tanh(self.body(x) + self.cache[str(x.device)]))


class EndsInRelu(nn.Module):
    """Logits behind a ReLU, as SqueezeNet has them: some classes have none."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, CLASSES, 1), nn.ReLU())
        with torch.no_grad():
            self.body[2].bias.fill_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


class Cosine(nn.Module):
    """A head of cosines: normalised features, normalised class vectors, one learnt scale."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 32), nn.Tanh())
        self.vectors, self.scale = nn.Parameter(torch.randn(CLASSES, 32)), nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(self.body(x)), F.normalize(self.vectors))


class LowRank(nn.Module):
    """A frozen-looking weight plus a low-rank update, W + B A, as LoRA merges it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 20) / 5)
        self.up, self.down = nn.Parameter(torch.randn(32, 4) / 5), nn.Parameter(torch.randn(4, 20) / 5)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(x, self.weight + self.up @ self.down)))


def _entry(name: str, build: Callable[[], nn.Module], inputs: Callable[[int], Any], **more: Any) -> Entry:
    return Entry(name, "hand", build, inputs, **more)


_vectors = partial(_entry, inputs=lambda n: rows(n, 20))
_words = partial(_entry, inputs=tokens)

ENTRIES = (
    _entry("PReLU CNN", prelu_cnn, _digits),
    _vectors("BatchNorm1d on [n, C]", batch_norm_mlp),
    _vectors("GroupNorm on [n, C]", group_norm_mlp),
    _entry("InstanceNorm CNN", instance_norm_cnn, _digits),
    _vectors("layer scale x * gamma", LayerScale),
    _entry("reshaped layer scale", ReshapedScale, _small_images),
    _vectors("x + beta", partial(AddedBias, False)),
    _vectors("x += bias in place", partial(AddedBias, True)),
    _entry("relative bias table", WindowAttention, _small_images),
    _entry("addmm layers", addmm_net, lambda n: rows(n, 3, 20)),
    _vectors("matmul and einsum", MatmulNet),
    _vectors("nn.Bilinear", BilinearNet),
    _entry("ConvTranspose1d", transposed_1d, lambda n: rows(n, 4, 9)),
    _entry("ConvTranspose2d", transposed_2d, _digits),
    *(
        _words(f"EmbeddingBag {mode}", partial(lambda mode: Bag(nn.EmbeddingBag(100, 16, mode=mode)), mode))
        for mode in ("sum", "mean", "max")
    ),
    _words("EmbeddingBag sparse", lambda: Bag(nn.EmbeddingBag(100, 16, mode="sum", sparse=True))),
    _words("Embedding sparse", lambda: Words(nn.Embedding(100, 16, sparse=True))),
    _words("Embedding max_norm", lambda: Words(nn.Embedding(100, 16, max_norm=2.0))),
    _words("Embedding scale_grad_by_freq", lambda: Words(nn.Embedding(100, 16, scale_grad_by_freq=True))),
    _entry("depthwise CNN", depthwise_cnn, _small_images),
    _entry("grouped CNN", grouped_cnn, partial(images, size=12)),
    _entry("circular padding CNN", circular_cnn, _small_images),
    _entry("3-D CNN", volume_cnn, lambda n: rows(n, 1, 8, 8, 8)),
    _entry("weight_norm", partial(normed_weights, weight_norm), _digits),
    _entry("spectral_norm", partial(normed_weights, spectral_norm), _digits),
    _entry("parametrizations.weight_norm", partial(normed_weights, parametrizations.weight_norm), _digits),
    _entry("parametrizations.spectral_norm", partial(normed_weights, parametrizations.spectral_norm), _digits),
    _vectors(
        "parametrizations.orthogonal",
        lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(20, 20)), nn.Tanh(), nn.Linear(20, CLASSES)),
    ),
    _entry("weight standardisation", standardised_cnn, _small_images),
    _words("LSTM", lambda: Recurrent(nn.LSTM(16, 16, batch_first=True))),
    _words("GRU", lambda: Recurrent(nn.GRU(16, 16, num_layers=2, batch_first=True))),
    _words("bidirectional LSTM", lambda: Recurrent(nn.LSTM(16, 16, batch_first=True, bidirectional=True))),
    _entry("GRUCell loop", CellLoop, lambda n: rows(n, 7, 6)),
    _words("tied embedding", Tied, inputs=lambda n: tokens(n, vocabulary=60)),
    _vectors("shared layer", SharedLayer),
    _vectors("residual MLP", ResidualMlp),
    _entry("SIREN", Siren, lambda n: rows(n, 4)),
    _vectors("soft mixture of experts", SoftExperts),
    _vectors("experts in one tensor", BatchedExperts),
    _vectors("top-1 mixture of experts", TopOneExpert),
    _vectors("float32 body, float64 logits", DoubleLogits),
    _vectors("bfloat16 body, float32 logits", FloatLogits, dtype=torch.bfloat16),
    _vectors("float16 body, float32 logits", FloatLogits, dtype=torch.float16),
    _entry("1-D audio CNN", audio_cnn, lambda n: rows(n, 1, 256)),
    _entry("nn.TransformerEncoder", transformer, lambda n: rows(n, 6, 16)),
    _entry("class token", ClassToken, _small_images),
    _entry("torch.jit.script", scripted, _digits),
    _vectors("torch.compile, eager backend", compiled),
    _vectors("counts its calls", Counting),
    _vectors("no_grad and unused parts", FastAndSlow),
    _vectors("RMS norm by hand", RootMeanSquare),
    _entry("tokens from a batch norm", ConvolutionalStem, _small_images),
    _vectors("biases cached in eval mode", CachedBias),
    _entry("ends in ReLU", EndsInRelu, _small_images),
    _vectors("cosine head", Cosine),
    _vectors("low-rank update", LowRank),
)
