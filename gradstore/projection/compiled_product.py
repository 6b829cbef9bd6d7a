"""The compiled products with P for tensors on the CPU, in ``native/src/projection.cpp``.

Without them the reference is used, with results that agree to float32 rounding. The bits of a dense product with signs
are the same at every SIMD level, for there is nothing to fuse in it. Those of other products are the same at "amx"
(which runs the code of "avx512"), "avx512" and "avx2"; "plain" rounds each product before it is added, where the others
fuse the two.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from gradstore.errors import UsageError
from gradstore.native.library import call
from gradstore.projection import compiled_sparse
from gradstore.projection.entries import Entries
from gradstore.projection.kinds import KINDS, kind_of

_LANE_PADDING = 16  # a group of lanes may reach beyond the last
_NO_MEMORY = 1  # a status of the library


class _Job(ctypes.Structure):
    """Mirror of ``struct Job`` in ``native/src/projection_job.h``."""

    _fields_ = (
        ("block", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "count", "block_stride", "out_stride")),
        *((name, ctypes.c_uint64) for name in ("start", "first_k", "seed")),
        ("domain", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
    )


class _SharedJob(ctypes.Structure):
    """Mirror of ``struct SharedJob`` in ``native/src/projection_job.h``."""

    _fields_ = (
        ("weight", _Job),
        ("deltas", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("examples", "classes", "positions", "outputs", "inputs", "lanes")),
    )


def accumulate(
    entries: Entries, out: Tensor, block: Tensor, start: int, first_k: int, *, level: str | None = None
) -> None:
    """Add ``block @ P[first_k : first_k + K', start : start + p].T`` to ``out`` in place, without the interpreter lock.

    Uses at most ``torch.get_num_threads()`` threads. Each holds up to 6 MB for signs (words of 2560 x 4096 entries and
    float64 totals of 256 rows), 2 MB for normals. Blocks that are not float32 with adjacent columns are copied first.

    Args:
        entries: the matrix P.
        out: float32 [rows, K'] on the CPU.
        block: any float dtype [rows, p] on the CPU.
        start: flat parameter index of the first column; any non-negative integer.
        first_k: the row of P that column 0 of ``out`` belongs to.
        level: a SIMD level instead of the one in ``GRADSTORE_SIMD`` or the fastest.

    Raises:
        UsageError: there is no compiled code, or this processor lacks the level.
        MemoryError: the working memory could not be had.
    """
    if entries.record.sparse is not None:
        compiled_sparse.accumulate(entries, out, [compiled_sparse.Values(start, block)], first_k, level=level)
        return
    if out.numel() == 0 or block.shape[1] == 0:
        return
    source, target = _adjacent(block.to(torch.float32)), _adjacent(out)
    job = _job(entries, target, source, start, first_k)
    status = call("accumulate", job, torch.get_num_threads(), simd=level)
    _require_done(status, entries, f"projecting {list(source.shape)} gradients to {out.shape[1]} dimensions")
    if target is not out:
        out.copy_(target)


def accumulate_shared(
    entries: Entries,
    out: Tensor,
    activations: Tensor,
    deltas: Tensor,
    start: int,
    first_k: int,
    *,
    level: str | None = None,
) -> None:
    """Add the projected gradients of a linear layer's weight [o, i] to ``out`` in place, without forming them.

    The gradient of example n and class c is ``sum_t deltas[n, c, t] (outer) activations[n, t]``. Its product with row k
    of P is ``sum_t sum_j deltas[n, c, t, j] * (P_k at the weight's row j . activations[n, t])``, and the bracket is
    computed once for all classes. For T = 1 that is c times less work than the dense product. With a sparse P the
    values are formed in the cache; see `compiled_sparse`.

    Args:
        entries: the matrix P, of signs or sparse.
        out: float32 [n, c, K'] on the CPU.
        activations: any float dtype [n, T, i].
        deltas: any float dtype [n, c, T, o].
        start: flat parameter index of the weight's first entry.
        first_k: the row of P that out[..., 0] belongs to.
        level: as in `accumulate`.

    Raises:
        UsageError: there is no compiled code, this processor lacks the level, or P is not of signs.
        MemoryError: the working memory (about 10 MB a thread) could not be had.
    """
    if not entries.record.shares_layers:
        expected = ", ".join(name for name in KINDS if kind_of(name).shares_layers)
        raise UsageError(
            "no product shares this kind's layers across classes", where="kind", expected=expected, got=entries.kind
        )
    n, c, positions, outputs = deltas.shape
    if entries.record.sparse is not None:
        outer = compiled_sparse.OuterProducts(start, activations, deltas)
        compiled_sparse.accumulate(entries, out.view(n * c, -1), [outer], first_k, classes=c, level=level)
        return
    if 0 in (*out.shape, *deltas.shape, *activations.shape):
        return
    source = activations.to(torch.float32).reshape(n * positions, -1).contiguous()
    lanes = n * positions + _LANE_PADDING
    factors = torch.zeros(outputs, c, lanes)
    factors[:, :, : n * positions] = deltas.permute(3, 1, 0, 2).flatten(2)
    target = out.reshape(n * c, -1).contiguous()
    weight = _job(entries, target, source, start, first_k)
    job = _SharedJob(weight, factors.data_ptr(), n, c, positions, outputs, source.shape[1], lanes)
    status = call("accumulate_shared", job, torch.get_num_threads(), simd=level)
    _require_done(status, entries, f"projecting {n} x {c} gradients of a {outputs} x {source.shape[1]} weight")
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view_as(out))


def _require_done(status: int, entries: Entries, what: str) -> None:
    if status == _NO_MEMORY:
        raise MemoryError(what)
    if status:
        raise UsageError("the compiled code does not know this kind", where="kind", got=entries.kind)


def _job(entries: Entries, out: Tensor, block: Tensor, start: int, first_k: int) -> _Job:
    return _Job(
        block.data_ptr(),
        out.data_ptr(),
        *(*block.shape, out.shape[1], block.stride(0), out.stride(0)),
        *(start, first_k, entries.seed, entries.domain, entries.record.compiled),
    )


def _adjacent(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()
