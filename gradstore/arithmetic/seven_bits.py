"""Exact products of rows of integers within ±63, compiled: what processors without a matrix unit multiply fastest.

``native/src/seven_bits.cpp`` says why seven bits. Where nothing was compiled, torch multiplies 8-bit integers instead.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from gradstore.arithmetic import int8
from gradstore.errors import UsageError
from gradstore.native import library

MOST = 63
"""The largest integer."""
_STEP = 128  # STEP in native/src/seven_bits.cpp


class _IntegerJob(ctypes.Structure):
    """Mirror of ``struct IntegerJob`` in ``native/src/seven_bits.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("left", "sums", "right", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "width")),
    )


class _PairJob(ctypes.Structure):
    """Mirror of ``struct PairJob``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("left", "sums", "right", "places", "columns", "out")),
        *((name, ctypes.c_int64) for name in ("pairs", "width")),
    )


def refusal(where: str) -> UsageError | None:
    """Say why this machine has no right products of integers, as `gradstore.arithmetic.int8.refusal` does."""
    return None if library.available() else int8.refusal(where)


class LeftRows:
    """Rows that many others are multiplied by.

    Args:
        values: int8 [m, w] within ±63, w ≤ 2^18.

    Attributes:
        values: a copy, int8 [m, w rounded up to a multiple of 128], zeros behind w.
        sums: int32 [m], of the values.
        width: w.
    """

    def __init__(self, values: Tensor) -> None:
        m, self.width = values.shape
        self.values = torch.zeros(m, self.row_bytes(self.width), dtype=torch.int8)
        self.values[:, : self.width] = values
        self.sums = values.sum(dim=1, dtype=torch.int32)

    @staticmethod
    def row_bytes(width: int) -> int:
        """Bytes of a row of so many values."""
        return -(-width // _STEP) * _STEP

    def times(self, right: Tensor, simd: str | None = None) -> Tensor:
        """Multiply.

        Args:
            right: int8 [n, w] within ±63, contiguous.
            simd: a level of the compiled code, or "" for torch; default the fastest there is.

        Returns:
            int32 [m, n], exact.
        """
        assert right.shape[1] == self.width, (right.shape, self.width)
        assert right.is_contiguous()
        simd = library.level() if simd is None else simd
        if not simd:
            return int8.integer_product(self.values[:, : self.width], right.T)
        out = torch.empty(len(self.values), len(right), dtype=torch.int32)
        pointers = (tensor.data_ptr() for tensor in (self.values, self.sums, right, out))
        job = _IntegerJob(*pointers, *out.shape, self.width)
        library.call("multiply_seven_bits", job, simd=simd)
        return out

    def times_pairs(self, right: Tensor, places: Tensor, columns: Tensor, simd: str | None = None) -> Tensor:
        """Multiply some pairs alone.

        Args:
            right: as `times` takes them.
            places: int64 [pairs], which of the m rows.
            columns: int64 [pairs], which of the n rows; equal ones should follow one another.
            simd: as `times` takes it; torch multiplies all pairs.

        Returns:
            int32 [pairs], the same as ``times(right)[places, columns]``.
        """
        simd = library.level() if simd is None else simd
        if not simd:
            return self.times(right, simd)[places, columns]
        assert right.shape[1] == self.width, (right.shape, self.width)
        assert right.is_contiguous()
        assert places.is_contiguous()
        assert columns.is_contiguous()
        out = torch.empty(len(places), dtype=torch.int32)
        pointers = (tensor.data_ptr() for tensor in (self.values, self.sums, right, places, columns, out))
        library.call("multiply_seven_bit_pairs", _PairJob(*pointers, len(places), self.width), simd=simd)
        return out
