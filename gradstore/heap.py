"""Memory from the system and back to it: large pages, and what the C library keeps of freed memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

# What glibc calls M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, where it raises them to by itself, and how a user sets them.
_THRESHOLDS = {-3: 32 << 20, -1: 64 << 20}
_CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
# Bytes of a piece that is worth mapping by itself, and of the end of a heap that may stay: a part of a budget.
_KEPT, _KEPT_SHARE = 1 << 20, 64


def pages(size: int) -> np.ndarray:
    """Zeroed bytes, uint8, of their own mapping, in huge pages where there are any.

    They begin at a page, and are gone to the last page when they are dropped. From the C library they would leave holes
    that it keeps, many times a block, between pieces that are still in use.
    """
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has no large pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, np.uint8)


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc); else do nothing.

    glibc otherwise keeps freed pieces below 32 MB between pieces in use, and they would count beside a byte budget.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class _Users:
    """The sizes that computations in progress want large pieces to have."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a generator that is collected while it is held leaves its context here
        self.sizes: list[int] = []

    def apply(self) -> None:
        """Set the thresholds that the least of them asks for."""
        least = min(self.sizes, default=max(_THRESHOLDS.values()))
        with suppress(AttributeError, OSError, TypeError):
            library = ctypes.CDLL(None)
            for number, most in _THRESHOLDS.items():
                library.mallopt(number, min(least, most))


_users = _Users()


@contextmanager
def freed_at_once(wanted: bool = True, budget: int = 0) -> Iterator[None]:
    """Inside, large pieces of memory go back to the system when they are freed, on every thread, where it is glibc's.

    By itself glibc raises the size from which it does so to 32 MB, and to 64 MB what it keeps at the end of each
    thread's heap, which `return_freed_memory` does not reach. Both hold for the process, and are left as raised at the
    end. Faulting in new pages takes time, so this is for work that is short of memory. Nothing is done where the user
    chose the sizes by environment.

    Args:
        wanted: False does nothing.
        budget: bytes of which a 64th, at least 1 MB, makes a piece large; so much may stay at the end of a heap.
    """
    if not wanted or any(name in os.environ for name in _CHOSEN):
        yield
        return
    size = max(budget // _KEPT_SHARE, _KEPT)
    with _users.lock:
        _users.sizes.append(size)
        _users.apply()
    try:
        yield
    finally:
        with _users.lock:
            _users.sizes.remove(size)
            _users.apply()
