"""The compiled inner loops of a search, in ``native/src/search.cpp``; without them torch and numpy do the same."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from gradstore.native.library import call


class _RoundJob(ctypes.Structure):
    """Mirror of ``struct RoundJob`` in ``native/src/search.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "factors", "high", "low", "found")),
        *((name, ctypes.c_int64) for name in ("rows", "classes", "width", "stride", "plane")),
        ("half", ctypes.c_int32),
        ("largest", ctypes.c_int32),
    )


class _DotJob(ctypes.Structure):
    """Mirror of ``struct DotJob``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "factors", "pieces", "rows", "places", "room", "out")),
        *((name, ctypes.c_int64) for name in ("pairs", "classes", "width", "stride", "piece", "apart")),
        ("half", ctypes.c_int32),
    )


class _ScaleJob(ctypes.Structure):
    """Mirror of ``struct ScaleJob``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("products", "row_steps", "column_steps", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
    )


def round_rows(
    values: Tensor, factors: Tensor, high: Tensor, low: Tensor | None, found: np.ndarray, largest: int, simd: str
) -> None:
    """Round `values` times `factors` to one integer or two; see `gradstore.arithmetic.int8_digits.round_stretches`."""
    n, classes, width = values.shape
    job = _RoundJob(
        values.data_ptr(),
        factors.data_ptr(),
        high.data_ptr(),
        None if low is None else low.data_ptr(),
        found.ctypes.data,
        *(n, classes, width, values.stride(0), high.stride(0) // width),
        values.dtype == torch.float16,
        largest,
    )
    call("round", job, simd=simd)


def dot(values: Tensor, factors: Tensor, pieces: Tensor, rows: np.ndarray, places: np.ndarray, simd: str) -> np.ndarray:
    """Inner products of pairs of a row and a query; see `gradstore.search.exact_score.inner_products`."""
    (_, classes, width), piece = values.shape, pieces.shape[2]
    room, out = torch.empty(piece), np.empty(len(rows))
    job = _DotJob(
        values.data_ptr(),
        factors.data_ptr(),
        pieces.data_ptr(),
        rows.ctypes.data,
        places.ctypes.data,
        room.data_ptr(),
        out.ctypes.data,
        *(len(rows), classes, width, values.stride(0), piece, pieces.stride(0)),
        values.dtype == torch.float16,
    )
    call("dot", job, simd=simd)
    return out


def add_scaled(products: Tensor, row_steps: Tensor, column_steps: Tensor, out: Tensor, simd: str) -> None:
    """Add int32 products [m, B] times a float32 step a row and a column to float32 `out`."""
    pointers = (tensor.data_ptr() for tensor in (products, row_steps, column_steps, out))
    call("add_scaled", _ScaleJob(*pointers, *products.shape), simd=simd)
