"""New memory for blocks and deltas without paying for page faults each time.

A block is up to hundreds of megabytes, made, read once and dropped, and deltas are kept for a batch. Handing such
memory back to the system and faulting it in again for the next takes longer than writing the values, and threads that
fault at once wait for each other.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

from gradstore.machine.mapped_memory import mapped_zeros

_NOTHING = np.empty(0, np.uint8)
_SMALL = 1 << 16  # bytes; smaller pieces are the allocator's
_MORE = 1.25  # a piece may serve what is so much smaller, and so much more is held than was in use: sizes differ
_LITTLE = 1 << 25  # bytes that are held in any case: the pieces of a small model, of many sizes
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class _Spare:
    """Memory that dropped blocks had, for the next ones: with what is in use little more than was in use at one time.

    A piece serves a block that is little smaller: what is asked for comes again, batch after batch.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._returned: deque[np.ndarray] = deque()  # by whoever collects garbage, within a call too
        self._held: list[np.ndarray] = []
        self._used = self._most = 0

    def take(self, size: int) -> np.ndarray:
        """Uninitialised bytes, at least `size` of them, and a quarter more at most where others had them before."""
        with self._lock:
            self._collect()
            fitting = [piece for piece in self._held if size <= piece.nbytes <= _MORE * size]
            memory = min(fitting, key=len, default=_NOTHING)
            self._held = [piece for piece in self._held if piece is not memory]
            if memory is _NOTHING:
                memory = mapped_zeros((size,), np.uint8)
            self._used += memory.nbytes
            self._most = max(self._most, self._used)
            excess = self._used + sum(map(len, self._held)) - max(_MORE * self._most, _LITTLE)
            self._held.sort(key=len, reverse=True)
            while excess > 0:  # the smallest goes first: pieces come round once a batch, so each is as likely needed
                excess -= len(self._held.pop())
        return memory

    def keep(self, memory: np.ndarray) -> None:
        """Hold these bytes, which are in use no longer."""
        self._returned.append(memory)

    def drop(self) -> None:
        """Hold nothing."""
        with self._lock:
            self._collect()
            self._held.clear()
            self._most = self._used

    def _collect(self) -> None:
        while self._returned:
            self._held.append(self._returned.popleft())
            self._used -= len(self._held[-1])


_spare = _Spare()


def reused(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Allocate a tensor of `like`'s dtype and device, in memory that others were dropped from where there is some.

    Memory returns when the last tensor that shares it is gone, and is held until `drop_spare`: with what is in use
    never more than 1.25 times what was in use at one time, or than 32 MB.

    Returns:
        It, uninitialised.
    """
    size = math.prod(shape) * like.element_size()
    if size < _SMALL or like.device.type != "cpu" or like.dtype not in _NUMPY:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    dtype = np.dtype(_NUMPY[like.dtype])
    memory = _spare.take(size)
    array: np.ndarray = np.ndarray(shape, dtype, buffer=memory.data[:size])
    weakref.finalize(array, _spare.keep, memory).atexit = False
    return torch.from_numpy(array)


def drop_spare() -> None:
    """Give what is held back to the system."""
    _spare.drop()
