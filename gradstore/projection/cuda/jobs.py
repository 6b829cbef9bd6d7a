"""The two structures that launches pass to the source, mirrors of ``struct Pack`` and ``struct Job``."""

from __future__ import annotations

import ctypes


def _many(names: str, kind: type) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names.split())


class Pack(ctypes.Structure):
    """Gradients to scaled 16-bit limbs: ``struct Pack`` in ``src/pack.cuh``."""

    _fields_ = (
        *_many("block packed undo turns", ctypes.c_void_p),
        *_many("rows columns row_stride", ctypes.c_int64),
        *_many("start first_group", ctypes.c_uint64),
        *_many("groups tile_rows padded_rows", ctypes.c_int32),
        ("turn_count", ctypes.c_uint32),
    )


class Job(ctypes.Structure):
    """The product with P: ``struct Job`` in ``src/fold.cuh``."""

    _fields_ = (
        *_many("packed undo out turns trouble", ctypes.c_void_p),
        *_many("rows count out_stride", ctypes.c_int64),
        ("first_group", ctypes.c_uint64),
        *_many("first_k key0 key1 domain", ctypes.c_uint32),
        *_many("groups spans padded_rows row_tiles k_tiles", ctypes.c_int32),
    )
