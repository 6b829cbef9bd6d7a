"""The compiled product with a sparse P on the CPU, in ``native/src/sparse.cpp``: several blocks in one call.

The bits are the same at every SIMD level. They depend on which blocks are given together, for their sums go to the
output together, 65,536 columns at a time; not on the rows beside a row, the threads, or which rows k are asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.native.library import call
from gradstore.projection.entries import Entries

SPAN = 1 << 16  # columns whose sums go to the output together
_LANE_PADDING = 16  # a group of lanes may reach beyond the last


@dataclass(frozen=True)
class Values:
    """Gradients of neighbouring parameters.

    Attributes:
        start: flat index of the first parameter.
        values: any float dtype [rows, p].
    """

    start: int
    values: Tensor


@dataclass(frozen=True)
class OuterProducts:
    """Gradients of a linear layer's weight [o, i]: ``sum_t deltas[n, c, t] (outer) activations[n, t]``.

    They are formed in the cache, 2048 at a time, and neither written to memory nor read from it.

    Attributes:
        start: flat index of the weight's first entry.
        activations: any float dtype [n, T, i].
        deltas: any float dtype [n, c, T, o].
    """

    start: int
    activations: Tensor
    deltas: Tensor


class _Segment(ctypes.Structure):
    """Mirror of ``struct Segment`` in ``native/src/sparse_job.h``."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("deltas", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("start", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("columns", "positions", "inputs", "lanes")),
    )


_SEGMENT = np.dtype(_Segment)


class _SparseJob(ctypes.Structure):
    """Mirror of ``struct SparseJob`` in ``native/src/sparse_job.h``."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("segments", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "count", "out_stride", "segment_count", "classes")),
        *((name, ctypes.c_uint64) for name in ("first_k", "seed")),
        ("domain", ctypes.c_uint32),
    )


def accumulate(
    entries: Entries,
    out: Tensor,
    blocks: Sequence[Values | OuterProducts],
    first_k: int,
    *,
    classes: int = 1,
    level: str | None = None,
) -> None:
    """Add the products of some blocks with P[first_k : first_k + K'] to ``out``, without the interpreter lock.

    Uses at most ``torch.get_num_threads()`` threads. Holds 2 MB of codes, and for each thread 64 KB for each non-zero
    of a column and, of outer products, 64 bytes for each activation of an example. Values that are not float32 with
    adjacent columns are copied first.

    Args:
        entries: the matrix P, a sparse one.
        out: float32 [rows, K'] on the CPU.
        blocks: each of as many rows; of outer products n c, row n c' being example n, class c'.
        first_k: the row of P that the first column of ``out`` belongs to.
        classes: c, where there are outer products.
        level: a SIMD level instead of the one in ``GRADSTORE_SIMD`` or the fastest.

    Raises:
        UsageError: there is no compiled code, or this processor lacks the level.
        MemoryError: the working memory could not be had.
    """
    held: list[Tensor] = []  # what the segments point to
    segments = [segment for block in blocks if (segment := _segment(block, held)).columns]
    if out.numel() == 0 or not segments:
        return
    target = out if out.stride(1) == 1 and out.stride(0) >= out.shape[1] else out.contiguous()
    array = (_Segment * len(segments))(*segments)
    job = _SparseJob(
        target.data_ptr(),
        ctypes.addressof(array),
        *(*out.shape, target.stride(0), len(segments), classes),
        *(first_k, entries.seed, entries.domain),
    )
    if call("accumulate_sparse", job, torch.get_num_threads(), simd=level):
        raise MemoryError(f"projecting {len(out)} gradients to {out.shape[1]} dimensions")
    if target is not out:
        out.copy_(target)


def accumulate_rows(entries: Entries, out: Tensor, values: Tensor, starts: Tensor, first_k: int) -> None:
    """Add gradients that stand elsewhere among the parameters in each example: those of the rows of an embedding.

    Args:
        entries: the matrix P, a sparse one.
        out: float32 [n, c, K'], contiguous, on the CPU.
        values: float32 [n, c, S, d].
        starts: int64 [n, S], the flat index of the first of each d parameters; negative where there are none. No two of
            an example are the same.
        first_k: the row of P that out[..., 0] belongs to.

    Holds what `accumulate` does. The bits of an example depend on the order of its rows, and on no other example.

    Raises:
        UsageError: there is no compiled code.
        MemoryError: the working memory could not be had.
    """
    values = values.contiguous()
    n, c, tokens, width = values.shape
    if 0 in (*out.shape, *values.shape):
        return
    threads = torch.get_num_threads()
    segments = np.zeros((n, tokens), _SEGMENT)
    segments["values"] = values.data_ptr() + 4 * width * (tokens * c * np.arange(n)[:, None] + np.arange(tokens))
    segments["stride"], segments["columns"] = tokens * width, width
    segments["start"] = starts.clamp(min=0).numpy()
    for own, present, target in zip(segments, (starts >= 0).numpy(), out, strict=True):
        some = np.ascontiguousarray(own[present])
        job = _SparseJob(
            target.data_ptr(),
            some.ctypes.data,
            *(*target.shape, target.stride(0), len(some), c),
            *(first_k, entries.seed, entries.domain),
        )
        if call("accumulate_sparse", job, threads):
            raise MemoryError(f"projecting {c} x {tokens} rows of an embedding to {out.shape[2]} dimensions")


def _segment(block: Values | OuterProducts, held: list[Tensor]) -> _Segment:
    if isinstance(block, Values):
        values = block.values.to(torch.float32)
        adjacent = values.stride(1) == 1 and values.stride(0) >= values.shape[1]
        values = values if adjacent else values.contiguous()
        held.append(values)
        return _Segment(values.data_ptr(), None, values.stride(0), block.start, values.shape[1], 0, 0, 0)
    n, c, positions, outputs = block.deltas.shape
    inputs, lanes = block.activations.shape[-1], n * c + _LANE_PADDING
    activations = block.activations.to(torch.float32).reshape(-1, inputs).contiguous()
    deltas = torch.zeros(outputs, positions, lanes)
    deltas[:, :, : n * c] = block.deltas.permute(3, 2, 0, 1).flatten(2)
    held += [activations, deltas]
    pointers, columns = (activations.data_ptr(), deltas.data_ptr()), outputs * inputs * min(positions, 1)
    return _Segment(*pointers, inputs, block.start, columns, positions, inputs, lanes)
