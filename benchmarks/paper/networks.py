"""The architectures of the paper's experiments; layer sizes as in its text and published scripts."""

from __future__ import annotations

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class SmallMLP(nn.Module):
    """Three hidden layers of 100 in the tangent-kernel parametrisation: standard normal weights, scaled in forward."""

    def __init__(self, inputs: int = 784, width: int = 100) -> None:
        super().__init__()
        sizes = (inputs, width, width, width, 1)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.scale = math.sqrt(width)
        self.apply(standard_normal)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x) / self.scale)
        return self.layers[-1](x)


class SmallCNN(nn.Module):
    """Three stages of one or two convolutions and a pooling, then three linear layers, in the same parametrisation.

    Args:
        repeats: convolutions a stage; one with average pooling for MNIST, two with maximum pooling for CIFAR.
    """

    def __init__(self, channels: int = 1, side: int = 28, width: int = 8, repeats: int = 1) -> None:
        super().__init__()
        self.repeats, stages, i = repeats, [], channels
        for o in (8 * width, 4 * width, width):
            for _ in range(repeats):
                stages.append(nn.Conv2d(i, o, 3, padding=1))
                i = o
        self.convolutions = nn.ModuleList(stages)
        left = (side // 8) ** 2 * width
        self.linear = nn.ModuleList(nn.Linear(i, o) for i, o in ((left, 128), (128, 64), (64, 1)))
        self.apply(standard_normal)

    def forward(self, x: Tensor) -> Tensor:
        pool = F.avg_pool2d if self.repeats == 1 else F.max_pool2d
        for number, layer in enumerate(self.convolutions, 1):
            x = F.relu(layer(x)) / math.sqrt(9 * layer.out_channels)
            x = pool(x, 2) if number % self.repeats == 0 else x
        x = x.flatten(1)
        for layer in self.linear[:-1]:
            x = F.relu(layer(x)) / math.sqrt(layer.out_features)
        return self.linear[-1](x)


def standard_normal(module: nn.Module) -> None:
    """Weights and biases from N(0, 1)."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)


class BadNetCNN(nn.Sequential):
    """The classifier of the poisoned CIFAR-10 experiment; 820,394 parameters."""

    def __init__(self, classes: int = 10) -> None:
        layers: list[nn.Module] = []
        for i, o in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(o)]
            layers += [nn.Conv2d(o, o, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(o), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Unflatten(1, (1, 2048)), nn.MaxPool1d(4), nn.Flatten()]
        for _ in range(2):
            layers += [nn.Linear(512, 512), nn.ReLU(), nn.BatchNorm1d(512)]
        super().__init__(*layers, nn.Linear(512, classes))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv(i, o, 3, stride), nn.ReLU(), *conv(o, o, 3, 1))
        self.shortcut = nn.Sequential(*(conv(i, o, 1, stride) if stride > 1 or i != o else ()))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(depths: tuple[int, ...], classes: int = 10) -> nn.Sequential:
    """A residual network for 32 × 32 images: (2, 2, 2, 2) is ResNet18, (3, 4, 6, 3) ResNet34."""
    layers: list[nn.Module] = [*conv(3, 64, 3, 1), nn.ReLU()]
    i = 64
    for stage, depth in enumerate(depths):
        o = 64 * 2**stage
        for block in range(depth):
            layers.append(BasicBlock(i, o, 2 if stage and not block else 1))
            i = o
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, classes))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project (Sandler et al. 2018)."""

    def __init__(self, i: int, o: int, stride: int, expand: int) -> None:
        super().__init__()
        h = i * expand
        wide = (*conv(i, h, 1, 1), nn.ReLU6()) if expand > 1 else ()
        self.body = nn.Sequential(*wide, *conv(h, h, 3, stride, groups=h), nn.ReLU6(), *conv(h, o, 1, 1))
        self.residual = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet_v2(classes: int = 10) -> nn.Sequential:
    """MobileNetV2 for 32 × 32 images: the first two strides are 1."""
    layers: list[nn.Module] = [*conv(3, 32, 3, 1), nn.ReLU6()]
    i = 32
    for expand, o, repeats, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for repeat in range(repeats):
            layers.append(InvertedResidual(i, o, stride if repeat == 0 else 1, expand))
            i = o
    head = [*conv(i, 1280, 1, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes)]
    return nn.Sequential(*layers, *head)


def conv(i: int, o: int, size: int, stride: int, groups: int = 1) -> tuple[nn.Module, ...]:
    """A convolution without bias and its batch normalisation."""
    return nn.Conv2d(i, o, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(o)
