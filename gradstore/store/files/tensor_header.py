"""A safetensors file in pieces: its header, then its tensors one after another, none of them held twice.

The same tensors and metadata have the same bytes, which those of the safetensors library have not: it orders metadata
anew at each call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod

import numpy as np


def tensor_header(shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What stands before the tensors, padded to a multiple of 8 bytes.

    Args:
        shapes: name -> (dtype, shape) of each tensor, in the order in which their bytes follow.
        metadata: text by name.

    Returns:
        The header, its own length first.
    """
    described: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape) in shapes.items():
        size = np.dtype(dtype).itemsize * prod(shape)
        described[name] = {"dtype": _name(np.dtype(dtype)), "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_pieces(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """A whole file of contiguous arrays of numbers: the header, and the bytes of each array, the widest dtypes first.

    Args:
        arrays: by name; the pieces are views of them.
        metadata: text by name.

    Returns:
        The pieces, in order.
    """
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # so that each is aligned
    header = tensor_header({name: (str(arrays[name].dtype), arrays[name].shape) for name in order}, metadata)
    return [header, *(arrays[name].data.cast("B") if arrays[name].size else b"" for name in order)]


def _name(dtype: np.dtype) -> str:
    return "BOOL" if dtype.kind == "b" else f"{dtype.kind.upper()}{8 * dtype.itemsize}"
