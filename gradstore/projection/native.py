"""The compiled projection for tensors on the CPU: where it is, which SIMD level it uses, and the call.

The library is built from ``src/native.cpp`` when the package is installed and a C++ compiler is there. Its interface is
plain C, so one build serves every Python and needs no Python header. Without it the reference is used, with results
that agree to float32 rounding. ``GRADSTORE_SIMD`` (amx, avx512, avx2, neon, plain) forces a level, for tests and for
comparison, and "none" the reference. The bits of a dense Rademacher product are the same at every level. Those of a
Gaussian product are not: "amx", the matrix unit of some x86 processors, takes normals to the nearest multiple of 2^-20
and gradients as integers, with a relative error of features of 1e-6 (below 2e-6 for uneven gradients too) where the
other levels have 4e-7.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradstore.compiled import FORBIDDEN, Library, load
from gradstore.errors import UsageError
from gradstore.projection.entries import Entries
from gradstore.projection.kinds import KINDS, kind_of

_INTERFACE = 3  # of gradstore_interface() in src/native.cpp
# Gradients held as digits: so many columns, or so many bytes if more. SPAN and CHUNK_BYTES in src/gaussian_amx.h
_DIGIT_COLUMNS, _DIGIT_BYTES = 1 << 14, 16 << 20
_LANE_PADDING = 16  # a group of lanes may reach beyond the last
_REBUILD = "install a C++ compiler (g++ or clang++), then install gradstore again"


@dataclass(frozen=True)
class Status:
    """Which projection the CPU uses.

    Attributes:
        path: "native" or "reference".
        level: the SIMD level in use, or "" for the reference.
        levels: every level that this processor can run, fastest first.
        library: the compiled file, if there is one.
        why: the reason for the reference, or "".
        hint: how to get the faster path, or "".
    """

    path: str
    level: str = ""
    levels: tuple[str, ...] = ()
    library: str = ""
    why: str = ""
    hint: str = ""


class _Job(ctypes.Structure):
    """Mirror of ``struct Job`` in ``src/job.h``."""

    _fields_ = (
        ("block", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "count", "block_stride", "out_stride")),
        *((name, ctypes.c_uint64) for name in ("start", "first_k", "seed")),
        ("domain", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
    )


class _SharedJob(ctypes.Structure):
    """Mirror of ``struct SharedJob`` in ``src/job.h``."""

    _fields_ = (
        ("weight", _Job),
        ("deltas", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("examples", "classes", "positions", "outputs", "inputs", "lanes")),
    )


def status() -> Status:
    """Which path and SIMD level the CPU projection uses here, and why."""
    library = _load()
    if isinstance(library, str):
        return Status("reference", why=library, hint=_how_to_get(library))
    level = _level(library, None)
    faster = "" if level == next(iter(library.levels)) else "unset GRADSTORE_SIMD to use the fastest level"
    return Status("native", level, tuple(library.levels), library.path, hint=faster)


def available() -> bool:
    """Whether the compiled projection can be used."""
    return isinstance(_load(), Library)


def working_bytes(kind: str, rows: int, columns: int) -> int:
    """What `accumulate` holds for its rows at any level, beside its arguments and a few megabytes a thread.

    Args:
        kind: "rademacher" or "gaussian", whose gradients are held as digits where there is a matrix unit.
        rows: of the block.
        columns: of the block.
    """
    if kind != "gaussian":
        return 0
    return 3 * rows * min(columns, max(_DIGIT_COLUMNS, _DIGIT_BYTES // (3 * rows)))


def accumulate(
    entries: Entries, out: Tensor, block: Tensor, start: int, first_k: int, *, level: str | None = None
) -> None:
    """Add ``block @ P[first_k : first_k + K', start : start + p].T`` to ``out`` in place, without the interpreter lock.

    Uses at most ``torch.get_num_threads()`` threads. Each holds up to 6 MB for signs (words of 2560 x 4096 entries and
    float64 totals of 256 rows), 2 MB for normals. The level "amx" also holds gradients as digits, 3 bytes for each of
    up to 768 rows x 16384 columns. Blocks that are not float32 with adjacent columns are copied first.

    Args:
        entries: the matrix P.
        out: float32 [rows, K'] on the CPU.
        block: any float dtype [rows, p] on the CPU.
        start: flat parameter index of the first column; any non-negative integer.
        first_k: the row of P that column 0 of ``out`` belongs to.
        level: a SIMD level instead of the one in ``GRADSTORE_SIMD`` or the fastest.

    Raises:
        UsageError: there is no compiled projection, or this processor lacks the level.
        MemoryError: the working memory could not be had.
    """
    library, number = _library_and_level(level)
    if out.numel() == 0 or block.shape[1] == 0:
        return
    source, target = _adjacent(block.to(torch.float32)), _adjacent(out)
    job = _job(entries, target, source, start, first_k)
    if library.file.gradstore_accumulate(ctypes.byref(job), number, torch.get_num_threads()):
        raise MemoryError(f"projecting {list(source.shape)} gradients to {out.shape[1]} dimensions")
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
    computed once for all classes. For T = 1 that is c times less work than the dense product.

    Args:
        entries: the matrix P, of signs.
        out: float32 [n, c, K'] on the CPU.
        activations: any float dtype [n, T, i].
        deltas: any float dtype [n, c, T, o].
        start: flat parameter index of the weight's first entry.
        first_k: the row of P that out[..., 0] belongs to.
        level: as in `accumulate`.

    Raises:
        UsageError: there is no compiled projection, this processor lacks the level, or P is not of signs.
        MemoryError: the working memory (about 10 MB a thread) could not be had.
    """
    if not entries.record.shares_layers:
        expected = ", ".join(name for name in KINDS if kind_of(name).shares_layers)
        raise UsageError("sharing across classes is for signs only", where="kind", expected=expected, got=entries.kind)
    library, number = _library_and_level(level)
    n, c, positions, outputs = deltas.shape
    if 0 in (*out.shape, *deltas.shape, *activations.shape):
        return
    source = activations.to(torch.float32).reshape(n * positions, -1).contiguous()
    lanes = n * positions + _LANE_PADDING
    factors = torch.zeros(outputs, c, lanes)
    factors[:, :, : n * positions] = deltas.permute(3, 1, 0, 2).flatten(2)
    target = out.reshape(n * c, -1).contiguous()
    weight = _job(entries, target, source, start, first_k)
    job = _SharedJob(weight, factors.data_ptr(), n, c, positions, outputs, source.shape[1], lanes)
    if library.file.gradstore_accumulate_shared(ctypes.byref(job), number, torch.get_num_threads()):
        raise MemoryError(f"projecting {n} x {c} gradients of a {outputs} x {source.shape[1]} weight")
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view_as(out))


def _job(entries: Entries, out: Tensor, block: Tensor, start: int, first_k: int) -> _Job:
    return _Job(
        block.data_ptr(),
        out.data_ptr(),
        *(*block.shape, out.shape[1], block.stride(0), out.stride(0)),
        *(start, first_k, entries.seed, entries.domain, entries.record.compiled),
    )


def _library_and_level(level: str | None) -> tuple[Library, int]:
    library = _load()
    if isinstance(library, str):
        raise UsageError("no compiled projection", where="backend", got=library, hint=_how_to_get(library))
    return library, library.levels[_level(library, level)]


def _how_to_get(why: str) -> str:
    """What to do about the reason why there is no library."""
    return "unset GRADSTORE_SIMD" if why == FORBIDDEN else _REBUILD


def _adjacent(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


def _level(library: Library, level: str | None) -> str:
    name = level or os.environ.get("GRADSTORE_SIMD") or next(iter(library.levels))
    if name not in library.levels:
        raise UsageError(
            "SIMD level not available",
            where="level" if level else "GRADSTORE_SIMD",
            expected="one of " + ", ".join(library.levels),
            got=repr(name),
        )
    return name


def _load() -> Library | str:
    """The compiled library, or why there is none."""
    return load(Path(__file__).parent, "gradstore", _INTERFACE)
