"""Train a small network from its own seed; the same seed gives the same weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]


def squared_sigmoid(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error of the sigmoid of one logit, the loss of the paper's small binary models."""
    return (torch.sigmoid(logits[:, 0]) - labels).square().mean()


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of one logit."""
    return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))


def train(
    build: Callable[[], nn.Module],
    inputs: Tensor | dict[str, Tensor],
    labels: Tensor,
    seed: int,
    *,
    loss: Loss = cross_entropy,
    forward: Callable[[nn.Module, object], Tensor] = lambda model, x: model(x),
    optimizer: Callable[[object], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=1e-2),
    epochs: int = 20,
    batch: int = 64,
) -> nn.Module:
    """A trained network in eval mode; torch's global random state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().train()
        steps = optimizer(model.parameters())
        for _ in range(epochs):
            # A last batch of one example would have no variance for BatchNorm.
            for rows in (r for r in torch.randperm(len(labels)).split(batch) if len(r) > 1):
                x = {name: v[rows] for name, v in inputs.items()} if isinstance(inputs, dict) else inputs[rows]
                steps.zero_grad()
                loss(forward(model, x), labels[rows]).backward()
                steps.step()
    return model.eval()
