"""Squared norms of float32 rows in float64, compiled in ``native/src/squares.cpp``; without it torch does the same."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from gradstore.native import library

# Values that torch holds in float64 at once, unless one row has more; a GPU is asked for few large pieces.
_WIDENED = {"cpu": 1 << 19, "cuda": 1 << 24}


class _SquaresJob(ctypes.Structure):
    """Mirror of ``struct SquaresJob`` in ``native/src/squares.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "stride")),
    )


def squared_norms(rows: Tensor) -> Tensor:
    """Σ of the squares of each row.

    The bits are the same at every SIMD level and for any number of threads, and depend on no other row. Without
    compiled code, or on a GPU, they differ by rounding, about 1e-15 of the sum.

    Args:
        rows: float32 [n, p].

    Returns:
        float64 [n], on the rows' device. Holds 134 MB at most on a GPU and, without compiled code, 4 MB or one row.
    """
    if rows.device.type == "cpu" and library.available():
        return _compiled(rows if rows.stride(1) == 1 else rows.contiguous())
    # Some rows at a time, because torch widens all that it is given before it adds up.
    some = rows.split(max(1, _WIDENED.get(rows.device.type, _WIDENED["cpu"]) // max(1, rows.shape[1])))
    return torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in some]).square()


def _compiled(rows: Tensor) -> Tensor:
    out = torch.empty(len(rows), dtype=torch.float64)
    job = _SquaresJob(rows.data_ptr(), out.data_ptr(), *rows.shape, rows.stride(0))
    library.call("squares", job, torch.get_num_threads())
    return out
