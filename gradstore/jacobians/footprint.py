"""How much memory a batch needs, scaled up from what the probe was seen to hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradstore.jacobians.forward_record import Tap
from gradstore.jacobians.terms import OuterTerm, Term

MAX_COLUMNS = {"cpu": 1 << 16, "cuda": 1 << 18}
"""Columns of the largest block, unless one row of a weight is longer; fixed, so that bits do not depend on memory.

By type of device: a GPU has little to do in a small block, beside what it costs to launch.
"""
_VALUES = 1 << 22  # of an example in a block of more columns than a CPU's


def max_columns(device: torch.device, classes: int) -> int:
    """`MAX_COLUMNS` of a device; where there are many classes, a block has enough values with fewer columns."""
    least = MAX_COLUMNS["cpu"]
    return max(least, min(MAX_COLUMNS.get(device.type, least), _VALUES // max(1, classes)))


@dataclass(frozen=True)
class Footprint:
    """Bytes per example.

    Attributes:
        graph: activations that autograd and the taps hold during the backward passes, and what terms made of them.
        kept: deltas and small gradients, per class.
        deltas: every tap's delta for one class.
        activations: inputs of the hungriest weight, unfolded.
        lazy: whether blocks of some weight have no structure, so that keeping them takes dense ones.
    """

    graph: int
    kept: int
    deltas: int
    activations: int
    lazy: bool


@dataclass
class Saved:
    """Distinct storages that autograd saved, by address."""

    storages: dict[int, int] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage once."""
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return sum(self.storages.values())


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Saved]:
    """Count what autograd saves for the backward pass; the model's parameters and buffers are not counted."""
    saved = Saved()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        return tensor if tensor.untyped_storage().data_ptr() in own else saved.add(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def measured(taps: Sequence[Tap], terms: dict[str, list[Term]], saved: int, n: int) -> Footprint:
    """Per-example figures from a probe of n examples and one class."""
    flat = [term for several in terms.values() for term in several]
    size = torch.finfo(torch.float32).bits // 8
    deltas = sum(tap.shape.numel() for tap in taps) * size
    inputs = sum(tensor.nbytes for tap in taps for tensor in tap.use.saved)
    unfolded = [term.deltas.shape[-1] * term.width * size for term in flat if isinstance(term, OuterTerm)]
    grouped = any(isinstance(term, OuterTerm) and term.grouped for term in flat)
    return Footprint(
        graph=(saved + inputs + sum(term.read for term in flat)) // n,
        kept=sum(term.held for term in flat) // n,
        deltas=deltas // n,
        activations=max(unfolded, default=0),
        lazy=grouped or any(len(several) > 1 for several in terms.values()),
    )
