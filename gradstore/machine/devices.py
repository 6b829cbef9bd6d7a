"""Where things are computed: a processor or a CUDA device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from gradstore.errors import UsageError, shown
from gradstore.machine.byte_counts import AUTO, parse_bytes

# What torch knows besides, such as xpu, mps or meta, is not what anything here was written for or tried on.
_NAMED = re.compile(r"cpu|cuda(?::(\d{1,4}))?", re.ASCII)


def choose_device(device: str) -> torch.device:
    """Find what "auto", "cpu", "cuda" or "cuda:1" means here.

    Returns:
        The device; for "auto" a GPU where there is one.

    Raises:
        UsageError: no such device, or none of that kind on this machine.
    """

    def refuse(problem: str, expected: str = "auto, cpu, cuda or cuda:<index>", hint: str | None = None) -> NoReturn:
        raise UsageError(problem, where="--device", expected=expected, got=shown(device), hint=hint)

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = _NAMED.fullmatch(device) if isinstance(device, str) else None
    if named is None:
        refuse("unknown device")
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        refuse("this machine has no usable CUDA device", hint="Use --device cpu")
    index, count = named.group(1), torch.cuda.device_count()
    if index is not None and int(index) >= count:
        refuse("no such CUDA device", f"an index below {count}")
    return torch.device(device)


def memory_of(given: int | str, device: torch.device, model: int = 0) -> int:
    """Read a memory budget, which may be "auto".

    Args:
        given: bytes, or text like "2GB" or "auto".
        device: where it is.
        model: bytes of the model there, beside which the budget is.

    Returns:
        Bytes; for "auto" 2 GB on a CPU, and on a GPU, which small batches would leave idle, three quarters of what the
        model leaves. What others hold there is not looked at: the groups of rows that fit must be the same every time.

    Raises:
        UsageError: it is no positive number of bytes.
    """
    if given != AUTO:
        return parse_bytes(given, or_auto=True)
    if device.type != "cuda":
        return parse_bytes("2GB")
    total = int(torch.cuda.get_device_properties(device).total_memory)
    return max(1, total - model) * 3 // 4


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Products and convolutions of float32 in float32, whatever the user has allowed and by whichever of torch's names.

    TF32 has 11 bits and bfloat16 has 8, and no bound here covers their error. On leaving, all is as it was.
    """
    general, older, newer = _float32_settings(device)
    before: list[tuple[Any, str, object]] = []
    try:
        # From the general to the special, as what is special reads as the general where it is not set itself.
        for where in general:
            before.insert(0, (where, "fp32_precision", where.fp32_precision))
            where.fp32_precision = "none"
        special = [*older, *((where, "fp32_precision", "ieee") for where in newer)]
        before = [
            (where, name, getattr(where, name)) for where, name, _ in special if _can_be_read(where, name)
        ] + before
        for where, name, value in special:  # the older names change what the newer ones say
            setattr(where, name, value)
        yield
    finally:
        for where, name, was in before:
            setattr(where, name, was)


@contextmanager
def cudnn_as(**values: bool) -> Iterator[None]:
    """Within: `torch.backends.cudnn` has these values; its own `flags` fails where older and newer names disagree."""
    cudnn = torch.backends.cudnn
    before = {name: getattr(cudnn, name) for name in values}
    try:
        for name, value in values.items():
            setattr(cudnn, name, value)
        yield
    finally:
        for name, was in before.items():
            setattr(cudnn, name, was)


@contextmanager
def without_fused_encoders() -> Iterator[None]:
    """Within: `nn.TransformerEncoder` computes without gradients what it does with them.

    Its fused way, which torch takes where gradients are off, gives padded positions other values.
    """
    mha = torch.backends.mha
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before)


class _Legacy:
    """`torch.set_float32_matmul_precision` as an attribute: the older name for products, on a CPU and on a GPU."""

    @property
    def precision(self) -> str:
        return torch.get_float32_matmul_precision()

    @precision.setter
    def precision(self, value: str) -> None:
        torch.set_float32_matmul_precision(value)


def _float32_settings(device: torch.device) -> tuple[list[Any], list[tuple[Any, str, object]], list[Any]]:
    """Find what decides a device's precision.

    Returns:
        What has torch's newer name `fp32_precision`, of 2.9 and later, for several operations; older names, with values
        (they cannot be read, nor a product taken on a GPU, where they disagree with the newer ones); and what has the
        newer name for one kind of operation.
    """
    backends, legacy = torch.backends, (_Legacy(), "precision", "highest")
    on_cpu = [getattr(backends.mkldnn, name, None) for name in ("matmul", "conv", "rnn")]
    if device.type == "cuda":
        on_gpu = [backends.cuda.matmul, *(getattr(backends.cudnn, name, None) for name in ("conv", "rnn"))]
        general, newer = [backends, backends.cudnn, backends.mkldnn], [*on_gpu, on_cpu[0]]
        older = [legacy, (backends.cudnn, "allow_tf32", False)]
    else:
        general, newer = [backends, backends.mkldnn], on_cpu
        older = [] if hasattr(on_cpu[0], "fp32_precision") else [legacy]
    new = hasattr(backends, "fp32_precision")
    return general if new else [], older, [where for where in newer if new and hasattr(where, "fp32_precision")]


def _can_be_read(where: object, name: str) -> bool:
    """Whether torch says what a setting is."""
    try:
        getattr(where, name)
    except RuntimeError:
        return False
    return True
