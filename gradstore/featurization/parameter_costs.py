"""What the Jacobian of each parameter costs, by the clock, on one group of rows."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from gradstore.featurization.plan import GROUP, Plan, to_device


@dataclass(frozen=True)
class ParameterCost:
    """A parameter, how it is differentiated, and how long that takes.

    Attributes:
        name: the parameter's.
        size: its elements.
        route: as `JacobianEngine.describe` says it.
        general: whether no rule covers it.
        share: of the seconds that all parameters take together, 0 to 1. The passes that all rules share are divided
            among the parameters that have one by their sizes.
    """

    name: str
    size: int
    route: str
    general: bool
    share: float


def parameter_costs(plan: Plan) -> list[ParameterCost]:
    """Differentiate one group of rows twice, and time the second.

    Returns:
        One entry a parameter, in order. Holds what a group of rows takes.
    """
    rows = [row for row in range(min(GROUP, len(plan.examples))) if row not in plan.examples.unreadable]
    inputs = to_device(plan.examples.read(rows)[0], plan.device)
    _seconds(plan, inputs)
    shared, own = _seconds(plan, inputs)
    general = dict(plan.engine.generic())
    ruled = sum(block.size for block in plan.blocks if block.name not in general)
    total = shared + sum(own.values())
    return [
        ParameterCost(
            block.name,
            block.size,
            route,
            block.name in general,
            (own.get(block.name, 0.0) + (0.0 if block.name in general else shared * block.size / ruled)) / total,
        )
        for block, (_, route) in zip(plan.blocks, plan.engine.describe(), strict=True)
    ]


def _seconds(plan: Plan, inputs: object) -> tuple[float, dict[str, float]]:
    """Seconds until the first block can be asked for, and those of each parameter's blocks."""
    began = _now(plan.device)
    stream = iter(plan.engine(inputs))
    last = _now(plan.device)
    shared, own = last - began, dict[str, float]()
    for block in stream:
        block.dense()
        now = _now(plan.device)
        own[block.name] = own.get(block.name, 0.0) + now - last
        last = now
        block.forget()
    return shared, own


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
