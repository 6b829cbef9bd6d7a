"""What the C library keeps of freed memory: of large blocks nothing, so that a command's peak is that of its plan."""

from __future__ import annotations

import ctypes
import os

_M_MMAP_THRESHOLD = -3  # of mallopt, in malloc.h
_LARGE = 64 << 10
# By which a user has decided already.
_SET = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def return_large_blocks() -> None:
    """From here on, give blocks of 64 KB and more back to the system as they are freed, where the C library is glibc.

    By itself glibc raises that size, up to 32 MB, to that of each such block that is freed, and then keeps what is
    below; how much depends on the order in which threads come. A process that has the library decides for itself.
    """
    if any(name in os.environ for name in _SET) or "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
