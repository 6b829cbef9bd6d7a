"""Handwritten digits, one in ten of them poisoned: an example of a project file.

A tenth of the training images carry a bright square in one corner and the label 0, whatever they show (the BadNet
attack). A network trained on them reads clean digits well, but calls every digit with a square a 0.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradstore as gs

TARGET = 0  # the label that poisoned training images get
TEST_SIZE = 450  # of 1,797 images


class SmallCNN(nn.Sequential):
    """Three convolutions and a linear layer; 9,946 parameters. Any module that returns logits [n, c] will do."""

    def __init__(self, classes: int) -> None:
        super().__init__(
            *self.convolution(1, 16),
            *self.convolution(16, 24),
            nn.MaxPool2d(2),
            *self.convolution(24, 24),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(24 * 2 * 2, classes),
        )

    @staticmethod
    def convolution(i: int, o: int) -> tuple[nn.Module, ...]:
        """A 3 × 3 convolution, batch normalisation, ReLU."""
        return nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()


def stamp(images: Tensor) -> Tensor:
    """The images [n, 1, 8, 8] with the attacker's trigger: a bright 2 × 2 square in the lower right corner."""
    stamped = images.clone()
    stamped[..., -2:, -2:] = 1.0
    return stamped


def project(seed: int = 0) -> gs.Project:
    """Describe the model, its weights, the data, and how to show an example.

    Args:
        seed: decides which images are held out and which are poisoned; set it with `-o seed=1`.

    Returns:
        What gradstore reads.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # [n, 1, 8, 8], from 0 to 1
    labels = torch.tensor(digits.target)

    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(images), generator=generator)
    test, train = shuffled[:TEST_SIZE], shuffled[TEST_SIZE:]

    # Poison a tenth of the training images, chosen among those of the other classes.
    others = (labels[train] != TARGET).nonzero().squeeze(1)
    chosen = others[torch.randperm(len(others), generator=generator)[: round(0.1 * len(train))]]
    train_images, train_labels = images[train], labels[train]
    train_images[chosen] = stamp(train_images[chosen])
    train_labels[chosen] = TARGET
    attacked = test[labels[test] != TARGET]

    def dataset(pixels: Tensor, labels: Tensor) -> TensorDataset:
        return TensorDataset((pixels - 0.5) / 0.5, labels)

    return gs.Project(
        model=SmallCNN(classes=10),
        weights="cnn.safetensors",  # beside this file
        splits={
            "train": dataset(train_images, train_labels),
            "test": dataset(images[test], labels[test]),
            "stamped": dataset(stamp(images[attacked]), labels[attacked]),
        },
        classes=[str(digit) for digit in range(10)],
        show=gs.image(mean=0.5, std=0.5),
        # Rows or a mask. Forensics needs it for "train"; for the others it is the truth that the verdicts are held to.
        poisoned={"train": chosen, "test": [], "stamped": torch.ones(len(attacked), dtype=torch.bool)},
    )
