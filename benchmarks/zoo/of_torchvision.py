"""Classifiers of torchvision with random weights; the smallest variant of a family, on small images."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .entry import CLASSES, Entry, images


def build(name: str, **options: Any) -> nn.Module:
    """A model by torchvision's name for it."""
    from torchvision.models import get_model

    return get_model(name, weights=None, num_classes=CLASSES, **options)


def build_class(name: str, **options: Any) -> nn.Module:
    """A model by torchvision's name for its class, smaller than any that it names."""
    from torchvision import models

    return getattr(models, name)(num_classes=CLASSES, **options)


def vgg11() -> nn.Module:
    """VGG's convolutions with a linear layer for its 120 M parameters of others."""
    from torchvision.models import vgg

    features = vgg.make_layers(vgg.cfgs["A"], batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


def _entry(name: str, size: int = 32, **options: Any) -> Entry:
    return Entry(f"{name} (torchvision)", "torchvision", partial(build, name, **options), partial(images, size=size))


def _of_class(name: str, **options: Any) -> Entry:
    return Entry(
        f"{name} (torchvision)", "torchvision", partial(build_class, name, **options), partial(images, size=32)
    )


SWIN = {"patch_size": [2, 2], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": [4, 4]}
VIT = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 64, "mlp_dim": 128}

ENTRIES = (
    _of_class("SwinTransformer", **SWIN),
    _of_class("VisionTransformer", **VIT),
    Entry("VGG-11's convolutions (torchvision)", "torchvision", vgg11, images),
    _entry("densenet121"),
    _entry("efficientnet_b0"),
    _entry("efficientnet_v2_s"),
    _entry("googlenet", 32, aux_logits=False, init_weights=False),
    _entry("inception_v3", 75, aux_logits=False, init_weights=False),
    _entry("maxvit_t", 224),
    _entry("mnasnet0_5"),
    _entry("mobilenet_v2"),
    _entry("mobilenet_v3_small"),
    _entry("regnet_x_400mf"),
    _entry("regnet_y_400mf"),
    _entry("resnet18"),
    _entry("resnet50"),
    _entry("resnext50_32x4d"),
    _entry("shufflenet_v2_x0_5"),
    _entry("squeezenet1_1", 64),
)
