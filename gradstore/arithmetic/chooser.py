"""Which arithmetic: of a Gram matrix by what this machine has, of anything else by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from gradstore.arithmetic.bfloat16_limbs import LimbOperand
from gradstore.arithmetic.float32 import Float32Operand
from gradstore.arithmetic.int8 import IntegerOperand
from gradstore.arithmetic.names import ARITHMETICS, require_one_of
from gradstore.arithmetic.product import Operand
from gradstore.errors import UsageError

_CPU = torch.device("cpu")
_OPERANDS: dict[str, type[Operand]] = {
    kind.choice.name: kind for kind in (LimbOperand, Float32Operand, IntegerOperand)
}  # what "auto" prefers first


def choose_arithmetic(name: str, device: torch.device = _CPU) -> type[Operand]:
    """Look up an arithmetic.

    Returns:
        The class of its operands; for "auto" that of bfloat16x2 on a processor with a matrix unit, and of float32
        elsewhere.

    Raises:
        UsageError: there is none of that name, or none on this machine or device.
    """
    require_one_of(ARITHMETICS, name, "--arithmetic")
    if name not in _OPERANDS:
        return next(kind for kind in _OPERANDS.values() if _refusal(kind, device) is None)
    refused = _refusal(_OPERANDS[name], device)
    if refused is not None:
        raise refused
    return _OPERANDS[name]


def runs_on_gpu(name: str) -> bool:
    """Whether rows may be multiplied on a GPU in the arithmetic of a name, "auto" among them."""
    return name not in _OPERANDS or _OPERANDS[name].on_gpu


def _refusal(kind: type[Operand], device: torch.device) -> UsageError | None:
    if device.type == "cpu" or kind.on_gpu:
        return kind.refusal()
    return UsageError(
        "not an arithmetic of a GPU",
        where="--arithmetic",
        expected=", ".join(name for name, other in _OPERANDS.items() if other.on_gpu),
        got=repr(kind.choice.name),
        hint="Use --device cpu for another",
    )


def fastest(calls: Mapping[str, Callable[[], object]]) -> str:
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
