"""Large arrays in memory of their own, which goes back to the system the moment that they are dropped.

What a batch stores is made in one thread and dropped in another, several batches at a time. Freed to the allocator,
such pieces stay in the process, in as many places as there are threads, and a run holds up to twice what it uses.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from typing import Any

import numpy as np

_LARGE = 1 << 20  # bytes; smaller pieces are the allocator's
_PRIVATE = hasattr(mmap, "MAP_PRIVATE")


def mapped_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Allocate zeros of this shape and dtype, in huge pages where there are any."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE:
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if _PRIVATE else mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.ndarray(shape, dtype, buffer=memory)
