"""The header of a safetensors file whose tensors are then written one after another, none of them held twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod

import numpy as np

_NAMES = {"int8": "I8", "uint8": "U8", "int64": "I64", "float16": "F16", "float32": "F32", "float64": "F64"}


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
        described[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
