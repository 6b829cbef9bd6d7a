"""Features as they are stored: rounded to 16, 32 or 8 bits with one scale for each row and class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.machine.cuda_streams import to_host
from gradstore.machine.mapped_memory import mapped_zeros

# float16 rows peak in [2^14, 2^15): below its largest value, 65504, and as far from its smallest as can be.
_PEAK_EXPONENT = {"float16": 15, "float32": 0}
_CACHED = 1 << 18  # floats rounded at a time


@dataclass(frozen=True)
class Encoded:
    """Rounded features.

    Attributes:
        features: [n, c, K] in the stored dtype.
        scale: float32 [n, c]; features * scale restores the values. The factor times a power of two, or amax / 127.
        norm: float64 [n, c], the norm of the restored row, so that a cosine of a stored row with itself is 1.
    """

    features: np.ndarray
    scale: np.ndarray
    norm: np.ndarray


def encode(features: Tensor, dtype: str, factor: float = 1.0) -> Encoded:
    """Round float32 features [n, c, K] to `dtype`, "float16", "float32" or "int8", where they are; then to the CPU.

    The features stored are `factor * features`. The factor goes into the scale only, so the digits do not depend on it.

    Relative error of a cosine: about 1e-6 for float16 and 5e-5 for int8, against a projection noise of 1/sqrt(K). A few
    rows at a time are rounded, while they are in the processor's cache. On a GPU all rows are rounded at once, which
    takes 14 bytes a float there.

    Returns:
        The rounded features on the CPU. Holds them and a few megabytes.
    """
    n, c, K = features.shape
    out = Encoded(mapped_zeros((n, c, K), dtype), np.empty((n, c), np.float32), np.empty((n, c), np.float64))
    wholes = [whole.reshape(n * c, *whole.shape[2:]) for whole in (out.features, out.scale, out.norm)]
    step = max(1, _CACHED // K if features.device.type == "cpu" else n * c)
    flat = features.flatten(0, 1)
    for rows in (slice(start, start + step) for start in range(0, n * c, step)):
        rounded, scale = _rounded(flat[rows], dtype, factor)
        norm = torch.linalg.vector_norm(rounded.to(torch.float64), dim=-1) * scale.to(torch.float64)
        for whole, part in zip(wholes, to_host(rounded, scale, norm), strict=True):
            whole[rows] = part.numpy()
    return out


def exponents(features: Tensor, dtype: str) -> Tensor:
    """Exponent of the power of two by which each row of features [n, c, K] is divided, int32 [n, c]."""
    return _exponents(features.abs().amax(dim=-1), dtype)


def _rounded(features: Tensor, dtype: str, factor: float) -> tuple[Tensor, Tensor]:
    """(digits [rows, K] in the stored dtype, scale float32 [rows])."""
    peak = features.abs().amax(dim=-1)
    if dtype == "int8":
        unit = torch.where(peak > 0, peak / 127, torch.ones_like(peak))
        return (features / unit[..., None]).round_().clamp_(-127, 127).to(torch.int8), unit * factor
    unit = torch.ldexp(torch.ones_like(peak), _exponents(peak, dtype))
    return (features / unit[..., None]).to(getattr(torch, dtype)), unit * factor


def _exponents(peak: Tensor, dtype: str) -> Tensor:
    _, exponent = torch.frexp(peak)
    # Clamped so that the scale itself stays a normal float32.
    return (exponent - _PEAK_EXPONENT[dtype]).clamp_(-100, 127)


def decode(features: np.ndarray, scale: np.ndarray) -> Tensor:
    """Restore stored features.

    The conversion is torch's: several times faster than numpy's or HDF5's from float16.

    Returns:
        float32 [n, c, K].
    """
    values = torch.from_numpy(features).to(torch.float32, copy=True)
    return values.mul_(torch.from_numpy(np.ascontiguousarray(scale))[..., None])
