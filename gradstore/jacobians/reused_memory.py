"""New memory for blocks and deltas without paying for page faults each time.

A block is tens to hundreds of megabytes, made, read once and dropped. Handing such memory back to the system and
faulting it in again for the next block takes longer than writing the values, and threads that fault at once wait for
each other.
"""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
_NOTHING = np.empty(0, np.uint8)


class _Spare:
    """The largest piece of memory that a dropped block had, for the next block."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory = _NOTHING

    def take(self, size: int) -> np.ndarray:
        """Uninitialised bytes, at least `size` of them; nothing is held any more."""
        with self._lock:
            kept, self._memory = self._memory, _NOTHING
        return kept if kept.nbytes >= size else np.empty(size, np.uint8)

    def keep(self, memory: np.ndarray) -> None:
        """Hold these bytes, unless more are held."""
        with self._lock:
            self._memory = max(self._memory, memory, key=len)

    def drop(self) -> None:
        """Hold nothing."""
        with self._lock:
            self._memory = _NOTHING


_spare = _Spare()


def fresh(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Allocate a tensor of `like`'s dtype and device, in huge pages where there are any.

    NumPy asks Linux for them, torch does not; faulting in 4 KB pages takes half of the time of writing them.

    Returns:
        It, uninitialised.
    """
    if like.device.type != "cpu" or like.dtype not in _NUMPY:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    return torch.from_numpy(np.empty(shape, _NUMPY[like.dtype]))


def reused(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Allocate the same, in the memory of a block that was dropped where there is one.

    Memory returns when the last tensor that shares it is gone. Beside the tensors in use at most one piece is held, of
    the size of the largest block, until `drop_spare`.

    Returns:
        It, uninitialised.
    """
    if like.device.type != "cpu" or like.dtype not in _NUMPY:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    dtype = np.dtype(_NUMPY[like.dtype])
    size = math.prod(shape) * dtype.itemsize
    memory = _spare.take(size)
    array: np.ndarray = np.ndarray(shape, dtype, buffer=memory.data[:size])
    weakref.finalize(array, _spare.keep, memory).atexit = False
    return torch.from_numpy(array)


def drop_spare() -> None:
    """Give the held piece back to the system."""
    _spare.drop()
