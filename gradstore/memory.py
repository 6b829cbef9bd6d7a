"""Byte counts as people write them; memory in large pages, and freed memory given back."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

from gradstore.errors import UsageError

# What glibc calls M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, where it raises them to by itself, and how a user sets them.
_THRESHOLDS = {-3: 32 << 20, -1: 64 << 20}
_CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
# Bytes of a piece that is worth mapping by itself, and of the end of a heap that may stay: a part of a budget.
_KEPT, _KEPT_SHARE = 1 << 20, 64

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}


def parse_bytes(value: int | str) -> int:
    """Bytes of "2GB", "512 MiB", "1e9" or a plain number.

    Raises:
        UsageError: it is no positive number of bytes.
    """
    if isinstance(value, int):
        count = float(value)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?i?b?)\s*", value, re.IGNORECASE)
        unit = match.group(2).upper() if match else "?"
        unit = unit if unit in _UNITS else unit + "B"
        if match is None or unit not in _UNITS:
            raise UsageError(
                "not a number of bytes", where="--memory", expected="for example 2GB or 512MiB", got=repr(value)
            )
        count = float(match.group(1)) * _UNITS[unit]
    if count < 1:
        raise UsageError("not a number of bytes", where="--memory", expected="at least 1", got=repr(value))
    return int(count)


def format_bytes(count: float) -> str:
    """Bytes for people, such as "1.50 GB", "20.5 MB", "3.1 kB" or "17 bytes"."""
    for unit, size, digits in (("TB", 1e12, 2), ("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{int(count)} bytes"


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
    """How many computations want freed memory returned at once."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a generator that is collected while it is held leaves its context here
        self.count = 0


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
    with _users.lock:
        _users.count += 1
        _set_thresholds({number: min(max(budget // _KEPT_SHARE, _KEPT), most) for number, most in _THRESHOLDS.items()})
    try:
        yield
    finally:
        with _users.lock:
            _users.count -= 1
            if not _users.count:
                _set_thresholds(_THRESHOLDS)


def _set_thresholds(sizes: dict[int, int]) -> None:
    with suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        for number, size in sizes.items():
            library.mallopt(number, size)
