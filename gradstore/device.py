"""Where things are computed: a processor or a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradstore.errors import UsageError


def choose_device(device: str) -> torch.device:
    """The torch device that "auto", "cpu", "cuda" or "cuda:1" means here.

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


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """CUDA products in float32 rather than TF32, which has 11 bits and whose error no bound here covers."""
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    # From 2.9 on torch has another name for it, and refuses the old one once somebody has used the new one.
    name, full = ("fp32_precision", "ieee") if hasattr(settings, "fp32_precision") else ("allow_tf32", False)
    before = getattr(settings, name)
    setattr(settings, name, full)
    try:
        yield
    finally:
        setattr(settings, name, before)
