"""The compiled inner loops of a search: where they are, which SIMD level they use, and the calls.

The library is built from ``src/search.cpp`` when the package is installed and a C++ compiler is there. Without it torch
and numpy do the same more slowly. ``GRADSTORE_SIMD`` (avx512, avx2, plain) forces a level.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_INTERFACE = 1  # of gradstore_search_interface() in src/search.cpp


class _RoundJob(ctypes.Structure):
    """Mirror of ``struct RoundJob`` in ``src/search.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "factors", "high", "low", "found")),
        *((name, ctypes.c_int64) for name in ("rows", "classes", "width", "stride", "plane")),
        ("half", ctypes.c_int32),
    )


class _DotJob(ctypes.Structure):
    """Mirror of ``struct DotJob``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("row", "pieces", "places", "out")),
        *((name, ctypes.c_int64) for name in ("queries", "count", "width", "stride")),
    )


class _ScaleJob(ctypes.Structure):
    """Mirror of ``struct ScaleJob``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("high", "low", "also_low", "row_steps", "column_steps", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
    )


def levels() -> tuple[str, ...]:
    """SIMD levels that this processor can run, fastest first; none where nothing was compiled."""
    loaded = _load()
    return tuple(loaded[1]) if loaded else ()


def level() -> str:
    """The level in use, "" where nothing was compiled."""
    wanted = os.environ.get("GRADSTORE_SIMD", "")
    return wanted if wanted in levels() else next(iter(levels()), "")


def round_rows(values: Tensor, factors: Tensor, high: Tensor, low: Tensor | None, found: np.ndarray, simd: str) -> None:
    """Round `values` times `factors` to 8 or 16 bits; see `gradstore.search.rounding.round_stretches`."""
    n, classes, width = values.shape
    job = _RoundJob(
        values.data_ptr(),
        factors.data_ptr(),
        high.data_ptr(),
        None if low is None else low.data_ptr(),
        found.ctypes.data,
        *(n, classes, width, values.stride(0), high.stride(0) // width),
        values.dtype == torch.float16,
    )
    _call("gradstore_round", job, simd)


def dot(row: Tensor, pieces: Tensor, places: np.ndarray, simd: str) -> np.ndarray:
    """Inner products of a row and some queries; see `gradstore.search.exact_score.inner_products`."""
    out = np.empty(len(places))
    job = _DotJob(
        row.data_ptr(),
        pieces.data_ptr(),
        places.ctypes.data,
        out.ctypes.data,
        len(places),
        len(pieces),
        pieces.shape[2],
        pieces.stride(0),
    )
    _call("gradstore_dot", job, simd)
    return out


def add_scaled(
    high: Tensor, low: Tensor, also_low: Tensor, row_steps: Tensor, column_steps: Tensor, out: Tensor, simd: str
) -> None:
    """Add (high + (low + also_low) / 254), int32 [m, B], times a float32 step a row and a column, to float32 `out`."""
    pointers = (tensor.data_ptr() for tensor in (high, low, also_low, row_steps, column_steps, out))
    _call("gradstore_add_scaled", _ScaleJob(*pointers, *high.shape), simd)


def _call(name: str, job: ctypes.Structure, simd: str) -> None:
    loaded = _load()
    assert loaded, "called only where levels() is not empty"
    getattr(loaded[0], name)(ctypes.byref(job), loaded[1][simd])


@cache
def _load() -> tuple[ctypes.CDLL, dict[str, int]] | None:
    """The compiled library and the numbers of the levels that this processor has."""
    folder = Path(__file__).parent
    path = next((p for p in (folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES) if p.exists()), None)
    if path is None:
        return None
    try:
        file = ctypes.CDLL(str(path))
        file.gradstore_search_level.restype = ctypes.c_char_p
        if file.gradstore_search_interface() != _INTERFACE:
            return None
    except (OSError, AttributeError):
        return None
    found, flag, index = {}, ctypes.c_int(), 0
    while name := file.gradstore_search_level(index, ctypes.byref(flag)):
        if flag.value:
            found[name.decode()] = index
        index += 1
    return file, found
