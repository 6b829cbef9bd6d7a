"""Train the demo's classifier: a few seconds, the same weights for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset


def train(
    build: Callable[[], nn.Module],
    dataset: TensorDataset,
    seed: int,
    *,
    epochs: int = 20,
    batch: int = 64,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
) -> dict[str, Tensor]:
    """Train a fresh model with AdamW under a one-cycle learning rate.

    Torch's global random state and thread count are as before afterwards. One thread: layers this small gain nothing
    from more, wait long for them on a busy machine, and the weights must not depend on how many cores there are.

    Args:
        build: makes the model; called after seeding, so that its initial weights follow from `seed`.
        dataset: inputs [n, ...] and labels int64 [n] in memory.
        seed: of the initial weights and of the order of the examples.
        epochs: passes over the data.
        batch: examples a step; a last incomplete batch is left out of its epoch.
        learning_rate: the largest of the cycle.
        weight_decay: of AdamW.

    Returns:
        The state dict of the trained model.
    """
    inputs, labels = dataset.tensors
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = build().train()
        optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
        steps = epochs * (len(inputs) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
        for rows in _batches(len(inputs), batch, epochs):
            optimizer.zero_grad()
            cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.state_dict()


def _batches(n: int, batch: int, epochs: int) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.randperm(n)[: n - n % batch].split(batch)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
