"""Tensors as kernels take them: of the formats that they read, with adjacent columns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def operands(out: Tensor, block: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Within: an output and gradients that kernels can take.

    Args:
        out: float32 [rows, K'].
        block: any float dtype [rows, p]; other than float32, float16 and bfloat16 it is copied to float32.

    Yields:
        `out` and `block`, or copies; what was added to a copy of the output is in the output afterwards.
    """
    source = block if block.dtype in _DTYPES else block.to(torch.float32)
    target = out if out.stride(1) == 1 else out.contiguous()
    yield target, source if source.stride(1) == 1 else source.contiguous()
    if target is not out:
        out.copy_(target)
