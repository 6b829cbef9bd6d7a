"""Time and memory of a batch's per-class Jacobians: the engine's stream against `vmap(jacrev)` of torch.func."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from gradstore.jacobians import JacobianEngine
from gradstore.model.parameters import parameter_blocks

from .entry import CLASSES, Entry

CHUNKS = (32, 8, 2, 1)
HELD = 1.5e9  # bytes that a chunk may hold: the rival forms all values of a chunk at once, the engine what it estimates
MOST = 50  # repeats
FEW = 8  # examples on which chunks of so many or fewer are tried
SIDES = ("gradstore", "jacrev")


def rows(inputs: Any, first: int, last: int) -> Any:
    """Examples [first, last) of a batch."""
    return inputs[first:last] if isinstance(inputs, Tensor) else {key: v[first:last] for key, v in inputs.items()}


def stream(engine: JacobianEngine, inputs: Any, step: int, count: int) -> None:
    """Form every block of the first `count` examples, `step` of them at a time."""
    for first in range(0, count, step):
        for block in engine(rows(inputs, first, first + step)):
            block.dense()


def functional(entry: Entry, model: nn.Module, inputs: Any, step: int, count: int) -> None:
    """`vmap(jacrev)` of the first `count` examples, `step` at a time; Jacobians are dropped, as the stream's blocks."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    call = entry.forward or (lambda module, x: module(x))

    def logits(values: dict[str, Tensor], example: Any) -> Tensor:
        one = example[None] if isinstance(example, Tensor) else {key: v[None] for key, v in example.items()}
        return functional_call(_Called(model, call), _prefixed(values | buffers), (one,))[0]

    of_batch = vmap(jacrev(logits), in_dims=(None, 0), randomness="same")
    for first in range(0, count, step):
        of_batch(parameters, rows(inputs, first, first + step))


class _Called(nn.Module):
    """A model with its way to be called, for `functional_call`."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, inputs: Any) -> Tensor:
        return self.call(self.model, inputs)


def _prefixed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in values.items()}


def side(
    entry: Entry, which: str, model: nn.Module, inputs: Any
) -> tuple[Callable[[int, int], None], Callable[[int], float]]:
    """One of the two, called with how many examples to take at a time and in all; and the bytes that some take."""
    if which == "jacrev":
        size = sum(p.numel() for p in model.parameters())
        return partial(functional, entry, model, inputs), lambda step: 4.0 * CLASSES * size * step
    engine = JacobianEngine(model, parameter_blocks(model), forward=entry.forward, example=inputs)
    return partial(stream, engine, inputs), engine.bytes_needed


def steps(n: int, held: Callable[[int], float]) -> list[int]:
    """Chunks that fit."""
    return [step for step in dict.fromkeys(min(step, n) for step in CHUNKS) if held(step) <= HELD] or [1]


def peak(entry: Entry, which: str, n: int, step: int) -> int:
    """Bytes that one batch, and what comes before it, take beside model and inputs, of this fresh process (Linux)."""
    model, inputs = entry.model(), entry.batch(n)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    side(entry, which, model, inputs)[0](step, n)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)


def speed(entry: Entry, n: int, repeats: int) -> dict[str, Any]:
    """Alternate both, each in the chunks that are fastest for it, at least so often, and quick ones for a second.

    Returns:
        Seconds, chunks, rows (example, class) a second, and the ratio; "cannot" and why where one of them raises.
    """
    row: dict[str, Any] = {"n": n}
    chosen: dict[str, Callable[[], None]] = {}
    slowest = 0.0  # of the two, as tried
    for which in SIDES:
        model, inputs = entry.model(), entry.batch(n)
        try:
            work, held = side(entry, which, model, inputs)
            work(1, 1)  # whatever is done once
            tried = {step: _tried(work, step, n) for step in steps(n, held)}
        except Exception as error:
            row[f"{which}_why"] = f"cannot: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
            continue
        best = min(tried, key=lambda step: tried[step])
        row |= {f"{which}_chunk": best, f"{which}_why": ""}
        chosen[which] = partial(work, best, n)
        slowest = max(slowest, tried[best])
    times = max(repeats, min(MOST, int(1 / slowest))) if chosen else 0
    runs = [{which: _seconds(work) for which, work in chosen.items()} for _ in range(times)]
    row["repeats"] = times
    for which in chosen:
        row[f"{which}_s"] = round(median(run[which] for run in runs), 5)
    if "gradstore" in chosen:
        row["rows_per_s"] = round(n * CLASSES / row["gradstore_s"])
    if len(chosen) == len(SIDES):
        row["speedup"] = round(median(run["jacrev"] / run["gradstore"] for run in runs), 2)
    return row


def _tried(work: Callable[[int, int], None], step: int, n: int) -> float:
    """Seconds that a batch takes in such chunks; where they are many, by those of some examples."""
    count = min(n, max(step, FEW))
    seconds = _seconds(partial(work, step, count)) * n / count
    return seconds if seconds > 1 else min(_seconds(partial(work, step, n)) for _ in range(3))


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
