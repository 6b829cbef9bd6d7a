"""Matrix products for a search: several ways to compute them, how wrong each can be, and which is fastest here.

An engine's error bound holds for any order of summation (Higham, Accuracy and Stability of Numerical Algorithms, 2nd
ed., §3.1): products are added up within a piece of columns, and the pieces one after another, so each passes through at
most N = width + pieces roundings, and |computed − ⟨q, t⟩| ≤ γ Σ|q_i t_i| ≤ γ ‖q‖ ‖t‖, γ = N u / (1 − N u), u = 2^-24.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from gradstore.errors import UsageError

_UNIT = 2.0**-24
# Roundings beside those of the sum: scaling, normalising, and underflow of entries below 2^-100 of the norm.
_EXTRA = 16


@dataclass(frozen=True)
class Engine:
    """One way to multiply pieces of queries and rows.

    Attributes:
        name: "numpy", "torch" or "cuda".
        device: where the pieces must be.
    """

    name: str
    device: torch.device

    def bound(self, width: int, pieces: int) -> float:
        """γ: the error of an inner product, in units of ‖q‖ ‖t‖."""
        roundings = (width + pieces + _EXTRA) * _UNIT
        return roundings / (1 - roundings)

    def add_product(self, queries: Tensor, rows: Tensor, out: Tensor) -> None:
        """Add queries [m, w] times rows [B, w] transposed to float32 `out` [m, B]."""
        if self.name == "numpy":
            out.add_(torch.from_numpy(np.matmul(queries.numpy(), rows.numpy().T)))
        else:
            out.addmm_(queries, rows.T)


ENGINES = ("numpy", "torch", "cuda")


def choose_engine(name: str, queries: int, rows: int, width: int) -> Engine:
    """The engine of a name, or for "auto" the one that a measurement of some milliseconds finds fastest.

    Args:
        name: "auto", "numpy", "torch" or "cuda".
        queries: of the products to come.
        rows: a block.
        width: columns of a piece.

    Raises:
        UsageError: an unknown engine, or one that this machine does not have.
    """
    if name not in ("auto", *ENGINES):
        raise UsageError("unknown engine", where="--engine", expected=f"auto, {', '.join(ENGINES)}", got=repr(name))
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "this machine has no usable CUDA device", where="--engine", got="'cuda'", hint="Use --engine auto"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else _fastest(_round_up(queries), _round_up(rows), width)
    return Engine(name, torch.device("cuda" if name == "cuda" else "cpu"))


@lru_cache(maxsize=32)
def _fastest(queries: int, rows: int, width: int) -> str:
    """Measured on one thread, as the workers of a search run it, at the sizes of its products."""
    q, t = torch.ones(queries, width), torch.ones(rows, width)
    out = torch.zeros(queries, rows)
    engines = [Engine(name, torch.device("cpu")) for name in ("torch", "numpy")]
    with single_threaded():
        return fastest_call({engine.name: partial(engine.add_product, q, t, out) for engine in engines})


def fastest_call(calls: Mapping[str, Callable[[], object]]) -> str:
    """The name of the call with the least time of three, after one to warm up."""
    times = {}
    for name, call in calls.items():
        call()
        times[name] = min(_seconds(call) for _ in range(3))
    return min(times, key=lambda name: times[name])


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@contextmanager
def single_threaded() -> Iterator[None]:
    """Linear algebra libraries use one thread each: a search runs a worker a core, and none waits for another."""
    threads = torch.get_num_threads()
    with threadpool_limits(1):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@contextmanager
def full_float32(engine: Engine) -> Iterator[None]:
    """CUDA products in float32 rather than TF32, whose error the bound does not cover."""
    if engine.device.type != "cuda":
        yield
        return
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _round_up(size: int, steps: Sequence[int] = (1, 8, 32, 128, 512)) -> int:
    """Few distinct sizes, so that a session measures seldom."""
    return next((step for step in steps if size <= step), steps[-1])
