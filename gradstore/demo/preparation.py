"""The demo's folder before featurize: the project file, and the weights it names, trained in a few seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from gradstore.errors import UsageError
from gradstore.machine.threads import one_torch_thread
from gradstore.model.project import Project, load_project
from gradstore.store.files.output import write_output


def project_text(seed: int = 0) -> str:
    """The demo's project file, whose default seed is `seed`."""
    text = files("gradstore.demo").joinpath("digits.py").read_text(encoding="utf-8")
    return text.replace("def project(seed: int = 0)", f"def project(seed: int = {int(seed)})")


def trained_project(folder: Path, seed: int, say: Callable[[str], None]) -> Project:
    """The project in `folder`, written and trained unless it is there already.

    Args:
        folder: made if need be.
        seed: decides the split, which images are poisoned, and the weights.
        say: told what is done.

    Returns:
        The project, its weights loaded.

    Raises:
        UsageError: the folder cannot be written, or holds another `project.py`.
    """
    file, text = folder / "project.py", project_text(seed)
    if not file.exists():
        write_output(file, [text.encode()])
    elif file.read_text(encoding="utf-8") != text:
        raise UsageError(
            "the folder holds another project.py",
            where=file,
            expected=f"the demo's, with seed {seed}",
            hint="Choose another folder",
        )
    project = load_project(file)
    weights = folder / "cnn.safetensors"
    if not weights.exists():
        kind, digits = type(project.model), project.splits["train"]
        poisoned = int(project.poisoned_mask("train").sum())  # type: ignore[union-attr]
        say(f"training a small network on {len(digits):,} digits, {poisoned} of them poisoned")
        write_output(weights, [save(train(lambda: kind(classes=10), digits, seed))])
    return project.prepare()


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
    with torch.random.fork_rng(devices=[]), one_torch_thread():
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
