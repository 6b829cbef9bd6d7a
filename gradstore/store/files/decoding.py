"""Stored features as float32 again, by torch or without it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

_WORTH_AN_IMPORT = 10**9


def decoder(values: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """What restores stored features, of which there are so many values in all.

    Both ways give the same bits. Torch converts float16 two to three times faster than NumPy, and importing it takes as
    long as that saves of a thousand million values.

    Returns:
        (features [n, c, K] in their stored dtype, scale float32 [n, c]) -> float32 [n, c, K], new memory.
    """
    if "torch" not in sys.modules and values < _WORTH_AN_IMPORT:
        return _decoded
    from gradstore.store.files.encoding import decode

    return lambda features, scale: decode(features, scale).numpy()


def _decoded(features: np.ndarray, scale: np.ndarray) -> np.ndarray:
    values = features.astype(np.float32)
    values *= scale[..., None]
    return values
