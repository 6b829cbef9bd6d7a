"""Trying a project before spending hours on it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import GradstoreError, ProjectError
from gradstore.featurization.bad_rows import BadRows, skips
from gradstore.featurization.batch import project_rows, row_columns
from gradstore.featurization.parameter_costs import ParameterCost, parameter_costs
from gradstore.featurization.plan import GROUP, Plan, to_device
from gradstore.featurization.repeated_inputs import repeated_inputs
from gradstore.featurization.settings import Given, Settings, takes_settings
from gradstore.indices import spans
from gradstore.machine.byte_counts import format_bytes
from gradstore.model.project import Project
from gradstore.store.feature_store import FeatureStore

if TYPE_CHECKING:
    from typing_extensions import Unpack

# A Jacobian of float32 sums may differ from looped autograd's by rounding.
_JACOBIAN_TOLERANCE = 1e-4
# A parameter whose gradient is less than this share of the whole one is compared with that share: the bias of an
# attention's keys changes no logit, and what comes out for it is the rounding of larger terms, another one each time.
_ROUNDED = 1e-2
_NAMED = 8  # parameters that a line lists


@dataclass(frozen=True)
class Check:
    """One property of a project.

    Attributes:
        name: of the property.
        detail: what was found.
        error: why it does not hold; None where it does.
        costs: of each parameter, where that is the property.
    """

    name: str
    detail: str
    error: GradstoreError | None = None
    costs: tuple[ParameterCost, ...] = ()


@takes_settings
def checks(
    project: Project,
    *,
    split: str = "train",
    device: str = "auto",
    memory: int | str = "auto",
    alone: bool = False,
    on_bad_row: str = "stop",
    like: FeatureStore | str | Path | None = None,
    **settings: Unpack[Given],
) -> Iterator[Check]:
    """Check a project for `featurize` with the same arguments; stops after the first property that fails.

    Writes nothing. Reads every label, and inputs of all splits for some three seconds; computes Jacobians of one
    example twice and features of one group of rows.

    Yields:
        One result after another, as soon as it is known.
    """
    found: dict[str, Any] = {}

    def prepare() -> str:
        skipping = skips(on_bad_row)
        asked = Settings(**settings) if like is None else Settings.like(like, settings)
        found["plan"] = Plan(project, split, asked, device, memory, alone=alone, skipping=skipping)
        found["bad rows"] = BadRows(found["plan"], found["plan"].manifest, on_bad_row)
        return "; ".join((f"{type(project.model).__name__} in eval mode on {found['plan'].device}", *project.notes))

    def parameters() -> str:
        found["costs"] = tuple(parameter_costs(found["plan"]))
        return _parameters(found["costs"])

    steps: list[tuple[str, Callable[[], str]]] = [
        ("project", prepare),
        ("logits", lambda: _logits(found["plan"])),
        ("data", lambda: _data(found["plan"])),
        ("inputs", lambda: repeated_inputs(project, split)),
        ("parameters", parameters),
        ("Jacobians", lambda: _jacobians(found["plan"])),
        ("rows", lambda: _rows(found["plan"], found["bad rows"])),
        ("store", lambda: _store(found["plan"])),
        ("time", lambda: _time(found["plan"], found["bad rows"])),
    ]
    for name, step in steps:
        try:
            detail = step()
            yield Check(name, detail, costs=found["costs"] if name == "parameters" else ())
        except GradstoreError as error:
            yield Check(name, str(error), error)
            return


def _logits(plan: Plan) -> str:
    names = ", ".join(plan.manifest.classes[:10]) + (" …" if plan.classes > 10 else "")
    return "; ".join((f"[n, {plan.classes}]: {names}", *plan.notes))


def _data(plan: Plan) -> str:
    table, n = plan.examples.label_table, len(plan.examples)
    labelled = "" if table is None else f", {int((table >= 0).sum())} labelled"
    return f"split {plan.split!r}: {n} rows{labelled}, sampled rows read the same twice"


def _parameters(costs: Sequence[ParameterCost]) -> str:
    routes: dict[str, int] = {}
    for cost in costs:
        routes[cost.route] = routes.get(cost.route, 0) + 1
    listed = ", ".join(f"{route} × {count}" for route, count in routes.items())
    size = sum(cost.size for cost in costs)
    found = f"{size:,} in {len(costs)} tensors ({listed})"
    slow = [cost for cost in costs if cost.general]
    if not slow:
        return found
    named = ", ".join(cost.name for cost in slow[:_NAMED])
    more = f" and {len(slow) - _NAMED} more" if len(slow) > _NAMED else ""
    values, time_ = sum(cost.size for cost in slow) / size, sum(cost.share for cost in slow)
    return f"{found}; slower, by a general route: {named}{more}, {values:.1%} of the values and {time_:.0%} of the time"


def _jacobians(plan: Plan) -> str:
    """Compare the streamed Jacobian of the first sound example with one autograd pass a class."""
    row = plan.first_sound
    inputs = to_device(plan.examples.read([row])[0], plan.device)
    worst, name = 0.0, ""
    expected = plan.engine.looped(inputs)
    norms = {parameter: float(torch.linalg.vector_norm(g.double())) for parameter, g in expected.items()}
    least = max(_ROUNDED * math.hypot(*norms.values()), 1e-30)
    streamed: dict[str, list[Tensor]] = {}
    stream = plan.engine(inputs)
    allowed = max(_JACOBIAN_TOLERANCE, plan.engine.rounding(stream.logits))
    for block in stream:
        streamed.setdefault(block.name, []).append(block.dense()[0].detach())
    for parameter, parts in streamed.items():
        ours, theirs = torch.cat(parts, dim=-1).double(), expected[parameter].double()
        error = float(torch.linalg.vector_norm(ours - theirs)) / max(norms[parameter], least)
        if not error <= worst:
            worst, name = error, parameter
    if not worst <= allowed:
        raise ProjectError(
            f"the Jacobian of row {row} differs from looped autograd",
            where=f"parameter {name}",
            expected=f"a relative difference below {allowed:g}",
            got=f"{worst:.2g}",
            hint="Is the model deterministic? Report it otherwise",
        )
    return f"row {row} equals looped autograd to {worst:.1g} relative"


def _rows(plan: Plan, bad_rows: BadRows) -> str:
    """Compute one group as a run does, and look at it a second time."""
    rows = range(min(plan.manifest.group, len(plan.examples)))
    absent = np.flatnonzero(next(row_columns(plan, [rows], bad_rows)).get("absent", ()))
    left_out = f"; {len(absent)} are left out: {spans(absent)}" if len(absent) else ""
    if plan.alone:
        return f"each computed by itself, and the same the second time{left_out}"
    return f"{len(rows)} rows are the same alone, beside others and read again{left_out}"


def _store(plan: Plan) -> str:
    n, c, K = plan.manifest.n, plan.manifest.schema.c, plan.manifest.schema.K
    rows = min(plan.manifest.shard_rows, n)
    return f"[{n}, {c}, {K}] {plan.manifest.schema.dtype}: {format_bytes(plan.bytes)} in shards of {rows} rows"


def _time(plan: Plan, bad_rows: BadRows) -> str:
    """Featurize one group of rows twice; the second time is the measure."""
    rows = range(min(max(plan.manifest.group, GROUP), len(plan.examples)))
    project_rows(plan, rows, bad_rows)
    began = time.perf_counter()
    project_rows(plan, rows, bad_rows)
    seconds = (time.perf_counter() - began) / len(rows) * len(plan.examples)
    return (
        f"about {_duration(seconds)} ({plan.flops:.2g} flops of projection, {plan.projection.path(plan.device)} path)"
    )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
