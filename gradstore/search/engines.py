"""Ways to multiply queries and rows, and which is the fastest here.

"numpy", "torch" and "cuda" multiply pieces in float32, "int8" two digits of 8 bits, "bfloat16" limbs of rows as they
are stored, by the processor's matrix unit.
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
from gradstore.matrix_unit import product
from gradstore.rounding import integer_products_are_exact
from gradstore.search.rounding import add_integer_product, round_rows


@dataclass(frozen=True)
class Engine:
    """One way to multiply queries and rows.

    Attributes:
        name: one of `ENGINES`.
        device: where the rows must be.
    """

    name: str
    device: torch.device

    def add_product(self, queries: Tensor, rows: Tensor, out: Tensor) -> None:
        """Add queries [m, w] times rows [B, w] transposed to float32 `out` [m, B]; numpy, torch and cuda."""
        if self.name == "numpy":
            out.add_(torch.from_numpy(np.matmul(queries.numpy(), rows.numpy().T)))
        else:
            out.addmm_(queries, rows.T)


ENGINES = ("numpy", "torch", "int8", "bfloat16", "cuda")
_CPU = torch.device("cpu")


def choose_engine(name: str, queries: int, rows: int, width: int, dtype: torch.dtype = torch.float16) -> Engine:
    """The engine of a name, or the one that a measurement of some milliseconds finds fastest.

    Args:
        name: one of `ENGINES`; "auto" for the fastest; "float32" for the faster of numpy and torch.
        queries: of the products to come.
        rows: a block.
        width: columns of a piece.
        dtype: of the rows as stored.

    Raises:
        UsageError: an unknown engine, or one that this machine does not have.
    """
    if name not in ("auto", "float32", *ENGINES):
        raise UsageError("unknown engine", where="--engine", expected=f"auto, {', '.join(ENGINES)}", got=repr(name))
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "this machine has no usable CUDA device", where="--engine", got="'cuda'", hint="Use --engine auto"
        )
    if name == "int8" and not integer_products_are_exact():
        raise UsageError(
            "torch's products of 8-bit integers are missing or overflow on this processor",
            where="--engine",
            got="'int8'",
            hint="Use --engine auto",
        )
    if name == "bfloat16" and not product.available():
        raise UsageError(
            "this processor has no matrix unit that gradstore was compiled for",
            where="--engine",
            got="'bfloat16'",
            hint="Use --engine auto",
        )
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    if name in ("auto", "float32"):
        name = _fastest(name == "auto", _round_up(queries), _round_up(rows), width, dtype)
    return Engine(name, torch.device("cuda") if name == "cuda" else _CPU)


@lru_cache(maxsize=32)
def _fastest(rounded_too: bool, queries: int, rows: int, width: int, dtype: torch.dtype) -> str:
    """Measured on one thread, as the workers of a search run it, from rows as stored at the sizes of its products."""
    q, stored = torch.ones(queries, width), torch.ones(rows, width).to(dtype)
    factors, out, piece = torch.ones(rows), torch.zeros(queries, rows), torch.empty(rows, width)

    def in_float32(engine: Engine) -> None:
        engine.add_product(q, piece.copy_(stored).mul_(factors[:, None]), out)

    def in_int8() -> None:
        values = stored.float() if dtype == torch.int8 else stored
        round_rows(values, factors, *digits)
        add_integer_product(rounded, steps, digits[0], digits[1], factors, out)

    def in_limbs() -> None:
        values = stored.float() if dtype == torch.int8 else stored
        product.add_product(values, packed, out.view(rows, queries), left_factors=factors, limbs=(1, 1))

    packed = product.pack(q, 1) if product.available() else q
    digits, rounded = (torch.empty(2, size, width, dtype=torch.int8) for size in (rows, queries))
    steps = torch.from_numpy(round_rows(q, torch.ones(queries), *rounded).step).float()
    calls: dict[str, Callable[[], object]] = {
        name: partial(in_float32, Engine(name, _CPU)) for name in ("torch", "numpy")
    }
    if rounded_too and integer_products_are_exact():
        calls["int8"] = in_int8
    if rounded_too and product.available():
        calls["bfloat16"] = in_limbs
    with single_threaded():
        return fastest_call(calls)


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
def one_torch_thread() -> Iterator[None]:
    """No threads within an operation of torch: small ones take less time than threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Linear algebra libraries use one thread each: a search runs a worker a core, and none waits for another."""
    with threadpool_limits(1), one_torch_thread():
        yield


def _round_up(size: int, steps: Sequence[int] = (1, 8, 32, 128, 512)) -> int:
    """Few distinct sizes, so that a session measures seldom."""
    return next((step for step in steps if size <= step), steps[-1])
