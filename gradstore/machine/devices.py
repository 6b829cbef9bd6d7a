"""Where things are computed: a processor or a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from gradstore.errors import UsageError
from gradstore.machine.byte_counts import parse_bytes


def choose_device(device: str) -> torch.device:
    """Find what "auto", "cpu", "cuda" or "cuda:1" means here.

    Returns:
        The device; for "auto" a GPU where there is one.

    Raises:
        UsageError: no such device, or none of that kind on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(
            "unknown device", where="--device", expected="auto, cpu, cuda or cuda:<index>", got=repr(device)
        ) from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "this machine has no usable CUDA device", where="--device", got=repr(device), hint="Use --device cpu"
        )
    return chosen


def memory_of(given: int | str, device: torch.device) -> int:
    """Read a memory budget, which may be "auto".

    Returns:
        Bytes; for "auto" 2 GB on a CPU, and three quarters of a GPU's memory, which small batches would leave idle.

    Raises:
        UsageError: it is no positive number of bytes.
    """
    if given != "auto":
        return parse_bytes(given)
    if device.type != "cuda":
        return parse_bytes("2GB")
    return int(torch.cuda.get_device_properties(device).total_memory) * 3 // 4


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """CUDA products in float32 rather than TF32, which has 11 bits and whose error no bound here covers."""
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    before = _matmul_settings()
    settings.allow_tf32 = False  # both names
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def _matmul_settings() -> dict[str, object]:
    """Read what the user has set of float32 products.

    The older name cannot be read, nor a product taken, while the two disagree, as they do once the newer has been set.

    Returns:
        The values by torch's older name and by the one that it has from 2.9 on.
    """
    settings, found = torch.backends.cuda.matmul, {}
    with suppress(RuntimeError):
        found["allow_tf32"] = settings.allow_tf32
    if hasattr(settings, "fp32_precision"):
        found["fp32_precision"] = settings.fp32_precision
    return found
