"""The stand-in for every data set of the paper: scikit-learn's 1,797 handwritten digits, 8 × 8."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradstore as gs
from benchmarks.paper.training import binary_cross_entropy, train
from gradstore.demo.digits import TARGET, SmallCNN, stamp

PAIRS = ((0, 1), (3, 8), (4, 9), (1, 8))


class DigitsMLP(nn.Sequential):
    """Two hidden layers of 64."""

    def __init__(self, outputs: int) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs)
        )


def images() -> tuple[Tensor, Tensor]:
    """(images float32 [n, 1, 8, 8] within [-1, 1], labels int64 [n])."""
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)


def ten_classes(seed: int, build: Callable[[int], nn.Module] = SmallCNN, n: int = 800, m: int = 500) -> gs.Project:
    """A network trained on n digits of all ten classes."""
    x, y = images()
    train_rows, test_rows = _split(np.arange(len(y)), seed, n, m)
    model = train(lambda: build(10), x[train_rows], y[train_rows], seed, epochs=15)
    return gs.Project(
        model=model,
        splits={name: TensorDataset(x[r], y[r]) for name, r in (("train", train_rows), ("test", test_rows))},
        show=gs.image(mean=0.5, std=0.5),
    )


def two_classes(pair: tuple[int, int], seed: int, build: Callable[[int], nn.Module] = SmallCNN) -> gs.Project:
    """A network with one logit that tells two digits apart, trained on half of them."""
    x, y = images()
    rows = np.flatnonzero(np.isin(y.numpy(), pair))
    train_rows, test_rows = _split(rows, seed, len(rows) // 2, len(rows))
    labels = (y == pair[1]).long()
    model = train(
        lambda: build(1), x[train_rows], labels[train_rows], seed, loss=binary_cross_entropy, epochs=6, batch=16
    )
    return gs.Project(
        model=model,
        splits={name: TensorDataset(x[r], labels[r]) for name, r in (("train", train_rows), ("test", test_rows))},
    )


def poisoned(seed: int, n: int = 800, m: int = 400) -> gs.Project:
    """A tenth of the training digits carry a bright square and the label TARGET; a clean and a stamped test split."""
    x, y = images()
    train_rows, test_rows = _split(np.arange(len(y)), seed, n, m)
    pixels, labels = x[train_rows].clone(), y[train_rows].clone()
    others = np.flatnonzero(labels.numpy() != TARGET)
    chosen = np.random.default_rng(seed + 1000).permutation(others)[: n // 10]
    pixels[chosen], labels[chosen] = stamp(pixels[chosen]), TARGET
    attacked = test_rows[y[test_rows].numpy() != TARGET]
    model = train(lambda: SmallCNN(10), pixels, labels, seed, epochs=20)
    return gs.Project(
        model=model,
        splits={
            "train": TensorDataset(pixels, labels),
            "clean": TensorDataset(x[test_rows], y[test_rows]),
            "poisoned": TensorDataset(stamp(x[attacked]), y[attacked]),
        },
        poisoned={"train": chosen, "clean": [], "poisoned": np.arange(len(attacked))},
    )


def _split(rows: np.ndarray, seed: int, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(rows)
    return order[:n], order[n : n + m]
