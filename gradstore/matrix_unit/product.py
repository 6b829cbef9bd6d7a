"""Inner products of rows by the processor's matrix unit (AMX), which multiplies bfloat16 and adds up in float32.

A value is the sum of two bfloat16 limbs, x = h + l + rest. A limb has 8 bits, so |x − h| ≤ 2^-8 |x| and, as l has a
sign of its own, |rest| ≤ 2^-17 |x|: nothing of a float16. Three products, h · h', h · l' and l · h', leave out l · l'
and the rests, two of 2^-17 and one of 2^-16:

    |computed − ⟨x, y⟩| ≤ (2^-15 + N u / (1 − N u)) Σ |x_i y_i|,   N = 82 + D / 512, u = 2^-24,

with 2^-16 where both sides are float16 (`error_bound`). Values and sums below 2^-126 become 0. Bits of a value depend
on its two rows alone. ``src/limbs.h`` has the same arithmetic without a matrix unit, for tests.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradstore.compiled import Library, load

_INTERFACE = 3  # of gradstore_matrix_unit_interface() in src/matrix_unit.cpp
_UNIT = 2.0**-24
LIMB = 2.0**-8
"""The most that one limb leaves of a value; two leave at most `LIMB`² / 2, and nothing of a float16."""
_DEPTH = 512  # columns that the unit adds up before they are added to the result; DEPTH in src/matrix_unit.cpp
_ROUNDINGS = 82  # of a sum of so many: 17 within 32 columns, 16 · 3 of sums of 32, and those of factors
REST_ERROR = 2.0**-18
"""How wrong `left_rests` are at most, in units of themselves: some 40 float32 roundings."""
WORKSPACE_BYTES = (1 << 20) + (1 << 18)
"""Bytes that one call holds at most."""


class _Rows(ctypes.Structure):
    """Mirror of ``struct Rows`` in ``src/matrix_unit.cpp``."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("half", ctypes.c_int32),
        ("limbs", ctypes.c_int32),
    )


class _ProductJob(ctypes.Structure):
    """Mirror of ``struct ProductJob``."""

    _fields_ = (
        ("left", _Rows),
        ("right", _Rows),
        ("packed_right", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("left_rests", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("diagonal", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Packed:
    """Rows made ready to be the right side of many products.

    Attributes:
        strips: the limbs, as the unit wants them; 2 · limbs bytes a value, the count of rows rounded up to 32.
        rows: how many.
        width: values of a row.
        limbs: of a value.
    """

    strips: Tensor
    rows: int
    width: int
    limbs: int


def workspace_bytes(width: int, limbs: int = 2) -> tuple[int, int]:
    """Bytes that a call holds: always, and for each row of a right side that is not packed, at most 512 of them.

    Args:
        width: values of a row.
        limbs: of a value.
    """
    depth = 2 * limbs * min(-(-width // 32) * 32, _DEPTH)
    return 32 * depth + 32 * 4 * (512 + 16) + 4096, depth


def available() -> bool:
    """Whether this process may use a matrix unit; ``GRADSTORE_SIMD`` may forbid it by naming another level."""
    return "amx" in levels() and os.environ.get("GRADSTORE_SIMD", "") in ("", "amx")


def levels() -> tuple[str, ...]:
    """What can be used here: the unit ("amx"), and "plain" for tests; nothing where nothing was compiled."""
    library = _library()
    return tuple(library.levels) if library else ()


def error_bound(width: int, *, exact_values: bool) -> float:
    """The most that a product with two limbs a side is off, in units of Σ |x_i y_i| ≤ ‖x‖ ‖y‖.

    Args:
        width: D.
        exact_values: both sides are float16, or any other values of at most 16 bits.
    """
    left_out = (1 if exact_values else 2) * LIMB**2
    return (left_out + rounding_bound(width)) * (1 + 4 * LIMB)  # since limbs may be that much larger than values


def rounding_bound(width: int, products: int = 1) -> float:
    """The part of `error_bound` that float32 sums have in it, in units of Σ |x_i y_i| over the limbs that are taken.

    Args:
        width: D of a product.
        products: of that width, which are added to one result.
    """
    roundings = (_ROUNDINGS + products * -(-width // _DEPTH)) * _UNIT
    return roundings / (1 - roundings)


def pack(rows: Tensor, limbs: int = 2, *, level: str = "amx") -> Packed:
    """Make rows ready to be a right side.

    Args:
        rows: float16 or float32 [n, D] on the CPU, adjacent within a row.
        limbs: 1 or 2.
        level: one of `levels()`.

    Returns:
        A copy of 2 · limbs bytes a value, n rounded up to 32 and D to 32; nothing else is held.
    """
    library = _require(level)
    described = _describe(rows, None, limbs)
    width = ctypes.c_int64(rows.shape[1])
    strips = torch.empty(library.file.gradstore_packed_size(ctypes.byref(described), width), dtype=torch.int16)
    pointer = ctypes.c_void_p(strips.data_ptr())
    library.file.gradstore_pack(pointer, ctypes.byref(described), width, library.levels[level])
    return Packed(strips, len(rows), rows.shape[1], limbs)


def add_product(
    left: Tensor,
    right: Tensor | Packed,
    out: Tensor,
    *,
    left_factors: Tensor | None = None,
    right_factors: Tensor | None = None,
    limbs: tuple[int, int] = (2, 2),
    diagonal: int | None = None,
    left_rests: Tensor | None = None,
    level: str = "amx",
) -> None:
    """Add left @ right.T, rows times their factors, to `out` in the calling thread, without the interpreter lock.

    Args:
        left: float16 or float32 [m, D] on the CPU, adjacent within a row.
        right: the same [n, D], or what `pack` made of it.
        out: float32 [m, n], adjacent within a row.
        left_factors: float32 [m]; None for 1.
        right_factors: float32 [n]; None for 1.
        limbs: of a value on the left and on the right; one limb is right to `LIMB`. Ignored on a packed side.
        diagonal: of a symmetric product, the right row that is the first left one; values left of the diagonal are not
            wanted, and most of them are left as they were. None wants all.
        left_rests: float64 [m], to which ‖x − h‖² of each left row is added, h being its values' first limbs; within
            `REST_ERROR` of it, and 2^-126 a value. Without `diagonal`.
        level: one of `levels()`.

    Holds at most `WORKSPACE_BYTES`.

    Raises:
        MemoryError: they could not be had.
    """
    library = _require(level)
    columns, width = (right.rows, right.width) if isinstance(right, Packed) else right.shape
    assert left.shape[1] == width, (left.shape, width)
    assert out.shape == (len(left), columns), (out.shape, len(left), columns)
    assert out.dtype == torch.float32, out.dtype
    assert out.shape[1] <= 1 or out.stride(1) == 1, out.stride()
    if isinstance(right, Packed):
        packed, second = right.strips.data_ptr(), _Rows(None, _pointer(right_factors), columns, 0, 0, right.limbs)
    else:
        packed, second = None, _describe(right, right_factors, limbs[1])
    first = _describe(left, left_factors, limbs[0])
    diagonal = -len(left) if diagonal is None else diagonal
    assert left_rests is None or (left_rests.dtype == torch.float64 and left_rests.shape == (len(left),))
    rests = None if left_rests is None else left_rests.data_ptr()
    job = _ProductJob(first, second, packed, out.data_ptr(), rests, width, out.stride(0), diagonal)
    if library.file.gradstore_multiply(ctypes.byref(job), library.levels[level]):
        raise MemoryError(f"multiplying {list(left.shape)} by {[columns, width]} values")


def _describe(rows: Tensor, factors: Tensor | None, limbs: int) -> _Rows:
    assert rows.dtype in (torch.float16, torch.float32), rows.dtype
    assert rows.shape[1] <= 1 or rows.stride(1) == 1, rows.stride()
    half = rows.dtype == torch.float16
    return _Rows(rows.data_ptr(), _pointer(factors), len(rows), rows.stride(0), half, limbs)


def _pointer(factors: Tensor | None) -> int | None:
    if factors is None:
        return None
    assert factors.dtype == torch.float32, factors.dtype
    assert factors.is_contiguous()
    return factors.data_ptr()


def _library() -> Library | None:
    library = load(Path(__file__).parent, "gradstore_matrix_unit", _INTERFACE)
    if isinstance(library, str):
        return None
    library.file.gradstore_packed_size.restype = ctypes.c_int64
    return library


def _require(level: str) -> Library:
    library = _library()
    assert library is not None, "called only where levels() is not empty"
    assert level in library.levels, level
    return library
