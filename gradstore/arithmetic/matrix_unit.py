"""The call of the processor's matrix unit (AMX), which multiplies rows in bfloat16 limbs and adds up in float32.

`gradstore.arithmetic.bfloat16_limbs` bounds the error. Values and sums below 2^-126 become 0. Bits of a value depend on
its two rows alone. ``native/src/limbs.h`` has the same arithmetic without a matrix unit, for tests.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import UsageError
from gradstore.native import library

_VECTOR = 64  # bytes
DEPTH = 512
"""Columns that the unit adds up before they are added to the result; DEPTH in native/src/matrix_unit.cpp."""
ROUNDINGS = 82
"""Of a sum of so many: 17 within 32 columns, 16 · 3 of sums of 32, and those of factors."""
REST_ERROR = 2.0**-18
"""How wrong `left_rests` are at most, in units of themselves: some 40 float32 roundings."""
WORKSPACE_BYTES = (1 << 20) + (1 << 18)
"""Bytes that one call holds at most."""


class _Rows(ctypes.Structure):
    """Mirror of ``struct Rows`` in ``native/src/matrix_unit.cpp``."""

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
        ("packed_left", ctypes.c_void_p),
        ("packed_right", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("left_rests", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("packed_rows", ctypes.c_int64),
        ("diagonal", ctypes.c_int64),
    )


class _PlaceJob(ctypes.Structure):
    """Mirror of ``struct PlaceJob``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "strips", "rests")),
        *((name, ctypes.c_int64) for name in ("count", "segments", "width", "stride", "capacity", "at")),
        ("half", ctypes.c_int32),
        ("limbs", ctypes.c_int32),
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


class Strips:
    """Rows made ready to be the left side of products, some at a time, while they are in the processor's cache.

    They are written past the cache, which leaves it to what is read next.

    Args:
        segments: parts of a row that are multiplied by themselves.
        width: values of a segment.
        capacity: rows.
        limbs: of a value, 1 or 2.
        room: memory to use, at least `bytes_needed`, from `aligned`.
        level: one of `levels()`.

    Attributes:
        rests: float64 [segments, capacity], ‖x − h‖² of each segment of the rows that were placed, h being its values'
            first limbs; within `REST_ERROR` of it, and 2^-126 a value.
    """

    def __init__(
        self, segments: int, width: int, capacity: int, limbs: int, room: np.ndarray, *, level: str = "amx"
    ) -> None:
        assert room.nbytes >= self.bytes_needed(segments, width, capacity, limbs), room.nbytes
        assert room.ctypes.data % 64 == 0, "vectors are stored whole"
        self.segments, self.width, self.capacity, self.limbs, self.level = segments, width, capacity, limbs, level
        self.rests = torch.zeros(segments, capacity, dtype=torch.float64)
        self._room = room

    @staticmethod
    def bytes_needed(segments: int, width: int, capacity: int, limbs: int) -> int:
        """Bytes: 2 · limbs a value, the width and the capacity rounded up to 32."""
        return 2 * limbs * segments * _round_up(width) * _round_up(capacity)

    def place(self, at: int, values: Tensor) -> None:
        """Make rows from place `at` on ready: float16 or float32 [n, segments, width] on the CPU, adjacent in a row."""
        n, *shape = values.shape
        assert shape == [self.segments, self.width], (shape, self.segments, self.width)
        assert 0 <= at <= at + n <= self.capacity, (at, n, self.capacity)
        assert values.dtype in (torch.float16, torch.float32), values.dtype
        assert values[:1].is_contiguous()
        pointers = values.data_ptr(), self._room.ctypes.data, self.rests.data_ptr()
        sizes = n, self.segments, self.width, values.stride(0), self.capacity, at
        job = _PlaceJob(*pointers, *sizes, values.dtype == torch.float16, self.limbs)
        found = _require(self.level)
        found.file.gradstore_place(ctypes.byref(job), found.levels[self.level])

    def add_product(
        self, segment: int, count: int, right: Packed, out: Tensor, *, left_factors: Tensor | None = None
    ) -> None:
        """As `add_product`, of one segment of the first `count` rows; the same bits."""
        start = segment * self.bytes_needed(1, self.width, self.capacity, self.limbs)
        left = _Rows(None, _pointer(left_factors), count, 0, 0, self.limbs)
        packed = self._room.ctypes.data + start, self.capacity
        _multiply(left, (count, self.width), packed, right, None, right.limbs, out, None, None, self.level)


def workspace_bytes(width: int, limbs: int = 2) -> tuple[int, int]:
    """Count what a call holds.

    Args:
        width: values of a row.
        limbs: of a value.

    Returns:
        Bytes: always, and for each row of a right side that is not packed, at most 512 of them.
    """
    depth = 2 * limbs * min(-(-width // 32) * 32, DEPTH)
    return 32 * depth + 32 * 4 * (512 + 16) + 4096, depth


def aligned(size: int) -> np.ndarray:
    """Uninitialised bytes, uint8 [size], that begin at a whole vector of the processor."""
    room = np.empty(size + _VECTOR, np.uint8)
    start = -room.ctypes.data % _VECTOR
    return room[start : start + size]


def available() -> bool:
    """Whether this process may use a matrix unit; ``GRADSTORE_SIMD`` may forbid it by naming another level."""
    return library.level() == "amx"


def refusal(name: str, where: str) -> UsageError | None:
    """Say why this process cannot use a matrix unit.

    Args:
        name: of the arithmetic that was asked for.
        where: the option, such as "--engine".

    Returns:
        The error to raise; None where it can.
    """
    if available():
        return None
    return UsageError(
        "this processor has no matrix unit, or gradstore was installed without a C++ compiler",
        where=where,
        expected="AMX with bfloat16",
        got=repr(name),
        hint=f"Use {where} auto",
    )


def levels() -> tuple[str, ...]:
    """What can be used here: the unit ("amx"), and the slowest level for tests; nothing where nothing was compiled."""
    found = library.levels()
    return tuple(level for level in found if level in ("amx", found[-1]))


def pack(rows: Tensor, limbs: int = 2, *, level: str = "amx") -> Packed:
    """Make rows ready to be a right side.

    Args:
        rows: float16 or float32 [n, D] on the CPU, adjacent within a row.
        limbs: 1 or 2.
        level: one of `levels()`.

    Returns:
        A copy of 2 · limbs bytes a value, n rounded up to 32 and D to 32; nothing else is held.
    """
    found = _require(level)
    described = _describe(rows, None, limbs)
    width = ctypes.c_int64(rows.shape[1])
    size = found.file.gradstore_packed_size(ctypes.byref(described), width)
    strips = torch.from_numpy(aligned(2 * size).view(np.int16))
    pointer = ctypes.c_void_p(strips.data_ptr())
    found.file.gradstore_pack(pointer, ctypes.byref(described), width, found.levels[level])
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
        limbs: of a value on the left and on the right; one limb is right to 2^-8. Ignored on a packed side.
        diagonal: of a symmetric product, the right row that is the first left one; values left of the diagonal are not
            wanted, and most of them are left as they were. None wants all.
        left_rests: float64 [m], to which ‖x − h‖² of each left row is added, h being its values' first limbs; within
            `REST_ERROR` of it, and 2^-126 a value. Without `diagonal`.
        level: one of `levels()`.

    Holds at most `WORKSPACE_BYTES`.

    Raises:
        MemoryError: they could not be had.
    """
    first = _describe(left, left_factors, limbs[0])
    assert left_rests is None or (left_rests.dtype == torch.float64 and left_rests.shape == (len(left),))
    shape = left.shape[0], left.shape[1]
    _multiply(first, shape, (None, 0), right, right_factors, limbs[1], out, left_rests, diagonal, level)


def _multiply(
    left: _Rows,
    shape: tuple[int, int],
    packed_left: tuple[int | None, int],
    right: Tensor | Packed,
    right_factors: Tensor | None,
    right_limbs: int,
    out: Tensor,
    left_rests: Tensor | None,
    diagonal: int | None,
    level: str,
) -> None:
    found = _require(level)
    columns, width = (right.rows, right.width) if isinstance(right, Packed) else right.shape
    assert shape[1] == width, (shape, width)
    assert out.shape == (shape[0], columns), (out.shape, shape, columns)
    assert out.dtype == torch.float32, out.dtype
    assert out.shape[1] <= 1 or out.stride(1) == 1, out.stride()
    if isinstance(right, Packed):
        packed, second = right.strips.data_ptr(), _Rows(None, _pointer(right_factors), columns, 0, 0, right.limbs)
    else:
        packed, second = None, _describe(right, right_factors, right_limbs)
    strips, capacity = packed_left
    rests = None if left_rests is None else left_rests.data_ptr()
    diagonal = -shape[0] if diagonal is None else diagonal
    pointers = strips, packed, out.data_ptr(), rests
    job = _ProductJob(left, second, *pointers, width, out.stride(0), capacity, diagonal)
    if found.file.gradstore_multiply(ctypes.byref(job), found.levels[level]):
        raise MemoryError(f"multiplying {list(shape)} by {[columns, width]} values")


def _describe(rows: Tensor, factors: Tensor | None, limbs: int) -> _Rows:
    assert rows.dtype in (torch.float16, torch.float32), rows.dtype
    assert rows.shape[1] <= 1 or rows.stride(1) == 1, rows.stride()
    half = rows.dtype == torch.float16
    return _Rows(rows.data_ptr(), _pointer(factors), len(rows), rows.stride(0), half, limbs)


def _round_up(count: int) -> int:
    return -(-count // 32) * 32


def _pointer(factors: Tensor | None) -> int | None:
    if factors is None:
        return None
    assert factors.dtype == torch.float32, factors.dtype
    assert factors.is_contiguous()
    return factors.data_ptr()


def _require(level: str) -> library.Library:
    found = library.load()
    assert isinstance(found, library.Library), "called only where levels() is not empty"
    assert level in found.levels, level
    found.file.gradstore_packed_size.restype = ctypes.c_int64
    return found
