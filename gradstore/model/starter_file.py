"""The commented project file that `gradstore init` writes."""

from __future__ import annotations

STARTER = '''\
"""A gradstore project: your model, your weights, your data. This file is the only code gradstore runs."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import gradstore as gs


class SmallCNN(nn.Module):
    """Replace this with your own model, or import it. Its output must be logits [n, c], before any softmax."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.head = nn.Linear(8 * 4 * 4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def examples(n: int, seed: int) -> TensorDataset:
    """Replace this with your own data: anything with len(ds) and ds[i] -> (x, label). No shuffling, no augmentation."""
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 1, 8, 8, generator=generator), torch.randint(0, 10, (n,), generator=generator))


# Of a folder that transformers saved: return gs.huggingface("folder", {"train": (texts, labels)}), or (images, labels).
def project(seed: int = 0) -> gs.Project:  # arguments are set with -o seed=3
    return gs.Project(
        model=SmallCNN(classes=10),
        weights=None,  # "cnn.safetensors", "cnn.pt", "last.ckpt", a folder, …; None keeps the model as built
        splits={"train": examples(256, seed), "test": examples(64, seed + 1)},
        # Everything below is optional.
        classes=[str(digit) for digit in range(10)],
        show=gs.image(mean=0.5, std=0.5),  # how to show an example; gs.text(decode) for text
        poisoned=None,  # {"train": mask or row indices} of poisoned examples, for `gradstore forensics`
        forward=None,  # (model, x) -> logits, for example lambda m, x: m(**x).logits
        parameters=".*",  # which parameters to differentiate; a regular expression on their names
    )


torch.manual_seed(0)  # the weights of the model above; of no use once you load your own
'''
