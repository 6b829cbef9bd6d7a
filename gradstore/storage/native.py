"""The compiled digests of rows, built from ``src/digests.cpp``: BLAKE3 of many rows in one call.

The `blake3` package hashes as fast, but has no call for many rows, and its objects give up and take back the
interpreter lock at each of them: two threads wait for one another, and a row of 1 KB costs more in calls than in
hashing. With AVX-512, in one call, rows of 1 KB took an eighth of the time with one thread and a sixteenth with two;
those of 205 KB 1.08 and 0.95 of it in cache, 0.94 and 0.88 from memory (``benchmarks/bench_digests.py``).

Without the compiled part the package does the same. ``GRADSTORE_SIMD`` (avx512, avx2, plain, none) forces a level.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gradstore.compiled import Library, load

_INTERFACE = 1  # of gradstore_digests_interface() in src/digests.cpp
BYTES = 16
"""Bytes of a row's digest."""


class _DigestJob(ctypes.Structure):
    """Mirror of ``struct DigestJob`` in ``src/digests.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("parts", "sizes", "out")),
        *((name, ctypes.c_int64) for name in ("count", "rows")),
    )


def levels() -> tuple[str, ...]:
    """SIMD levels that this processor can run, fastest first; none where nothing was compiled."""
    library = _library()
    return tuple(library.levels) if library else ()


def level() -> str:
    """The level in use, "" where nothing was compiled."""
    library = _library()
    return library.level() if library else ""


def hash_rows(parts: Sequence[np.ndarray], out: np.ndarray, simd: str) -> None:
    """First 16 bytes of the BLAKE3 hash of each row, in the calling thread, without the interpreter lock.

    Args:
        parts: contiguous uint8 [n, size] each; a row is its slices of all parts, one after another.
        out: contiguous uint8 [n, 16].
        simd: one of `levels()`; all give the same bytes.

    Holds 256 KB, or 1/21 of one row where that is more.

    Raises:
        MemoryError: they could not be had.
    """
    library = _library()
    assert library is not None, "called only where levels() is not empty"
    assert out.shape == (len(out), BYTES), out.shape
    for array in (*parts, out):
        assert array.dtype == np.uint8, array.dtype
        assert array.flags.c_contiguous, array.strides
        assert len(array) == len(out), (array.shape, out.shape)
    pointers = (ctypes.c_void_p * len(parts))(*(part.ctypes.data for part in parts))
    sizes = (ctypes.c_int64 * len(parts))(*(part.shape[1] for part in parts))
    job = _DigestJob(ctypes.addressof(pointers), ctypes.addressof(sizes), out.ctypes.data, len(parts), len(out))
    if library.file.gradstore_digests(ctypes.byref(job), library.levels[simd]):
        raise MemoryError(f"hashing {len(out)} rows")


def _library() -> Library | None:
    library = load(Path(__file__).parent, "gradstore_digests", _INTERFACE)
    return None if isinstance(library, str) else library
