"""From a forward pass whose last call is linear to the terms of d rows below it and the blocks of its own parameters.

Where logits = z Wᵀ + b, the Jacobian below is `g^c = Σ_m W_cm ∂z_m/∂θ`: one vector-Jacobian product for each of the d
inputs, not for each class. That z leads to the logits in this way and no other is proved for every batch by the audit
that other passes have, which begins at the logits: the deltas' sum over the d rows, weighted by `uᵀ W`, must be the
deltas of `Σ_c u_c logits_c`, each example's its own, and no graph may lead to a noted parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradstore.jacobians.blocks import JacobianBlock
from gradstore.jacobians.forward_record import Recording
from gradstore.jacobians.head_blocks import LoweredBlock, OwnRowBlock
from gradstore.jacobians.pullback import Pulled, absorb, audit
from gradstore.jacobians.row_owners import FIRST, weights
from gradstore.jacobians.side_by_side import uncut_if_small

_VALUE = 3.0  # nanoseconds of a core for a value of a row: to differentiate it, and its square
_PROJECTED = 100.0  # multiplications by P of a value in a nanosecond
_PRODUCTS = 10.0  # multiply-adds in float64 in a nanosecond, of values with one another


@dataclass(frozen=True)
class Head:
    """The linear call that gives the logits of a batch.

    Attributes:
        weight: W [c, d], float32 or wider.
        inputs: z [n, d], the same.
        names: the differentiated parameters among "weight" and "bias".
    """

    weight: Tensor
    inputs: Tensor
    names: Mapping[str, str]

    @property
    def rows(self) -> int:
        """How many inputs it has, d."""
        return self.weight.shape[1]

    def lowered(self, block: JacobianBlock) -> LoweredBlock:
        """Of a block of the rows below, the rows of all classes."""
        return LoweredBlock(block, self.weight)

    def owns(self, name: str) -> bool:
        """Whether a parameter is the call's own."""
        return name in self.names.values()

    def own_rows(self, name: str, start: int, first: int, last: int) -> OwnRowBlock:
        """The block of rows [first, last) of one of the call's own parameters."""
        bias = name == self.names.get("bias")
        inputs = self.inputs.new_ones(len(self.inputs), 1) if bias else self.inputs
        return OwnRowBlock(name, start, inputs, len(self.weight), first, last)

    def combined(self, name: str, factors: Tensor, cotangent: Tensor) -> Tensor:
        """Σ_i w_i Σ_c u_c g_i^c of one of the call's own parameters for factors w [n] and a cotangent u [c]; [size]."""
        inputs = self.own_rows(name, 0, 0, 1).inputs
        return torch.outer(cotangent.to(inputs), factors.to(inputs) @ inputs).flatten()


def pays(classes: int, rows: int, K: int) -> bool:
    """Whether so many rows below the last call are clearly less work than its classes, with K values of each stored."""
    value = _VALUE + K / _PROJECTED
    return 0 < 2 * rows < classes and rows * (value + rows / _PRODUCTS) < 0.7 * classes * value


def rows_below(recording: Recording) -> int:
    """d, the inputs of the last call; 0 where logits are not just that call's, or its parameters' values."""
    last = recording.last
    if last is None:
        return 0
    others = [tap for number, tap in enumerate(recording.taps) if number != last.tap]
    if last.tap is not None:
        tap = recording.taps[last.tap]
        if set(tap.roots) != set(tap.names.values()) or any(set(tap.roots) & set(other.roots) for other in others):
            return 0
    return last.inputs.shape[1] if last.inputs.requires_grad or not others else 0


def pull_back_through(
    recording: Recording,
    arrangements: Sequence[str],
    parameters: Mapping[str, Tensor],
    tolerance: float,
    at_once: int = 1,
    *,
    combined: bool = False,
) -> tuple[Pulled, Head]:
    """Differentiate the inputs of the last call one by one, never the logits class by class, and audit.

    Args:
        recording: a forward pass with `rows_below`; its graph is freed.
        arrangements: how each tap's rows are assigned to examples.
        parameters: the noted parameters.
        tolerance: relative difference that rounding may make.
        at_once: inputs whose backward passes are vectorised into one.
        combined: differentiate one combination of the inputs, that which stands for `weights` of the logits.

    Returns:
        Terms of the parameters below, of d rows, or of one; what is held and marked is as in `pull_back`. And the call.
    """
    last, n = recording.last, len(recording.logits)
    assert last is not None
    weight = last.weight.to(torch.promote_types(last.weight.dtype, torch.float32))
    u = weights(len(weight), recording.logits)
    taps = [tap for t, tap in enumerate(recording.taps) if t != last.tap]
    below = Recording(last.inputs, taps, recording.functions)
    arranged = [how for t, how in enumerate(arrangements) if t != last.tap]
    factors = (u.to(weight) @ weight).to(last.inputs)
    if combined:
        pulled, totals = absorb(below, arranged, parameters, factors[None], torch.ones(1), 1)
    else:
        each = torch.eye(len(factors), dtype=factors.dtype, device=factors.device)
        pulled, totals = absorb(below, arranged, parameters, each, factors, at_once)
    names: Mapping[str, str] = {}
    if last.tap is not None:
        tap = recording.taps[last.tap]
        names = tap.names
        if tap.stale or arrangements[last.tap] != FIRST:
            pulled.distrust(tap, "rows not by example")
        totals.insert(last.tap, u.expand(n, -1))
    with uncut_if_small(sum(total.nbytes for total in totals)):
        audit(recording, arrangements, parameters, totals, u, tolerance, pulled)
    return pulled, Head(weight, last.inputs.detach().to(weight), names)
