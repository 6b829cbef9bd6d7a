"""Stored features restored by torch and without it: the same bits, those of one rounding."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest

from gradstore.store.files import decoding

SCALES = np.array([1, 3.1e-5, 2.0**-100, 2.0**15, 0.7, np.nan], np.float32)
STORED = {
    "float16": np.arange(1 << 16, dtype=np.uint16).view(np.float16),
    "int8": np.arange(-128, 128, dtype=np.int8),
    "float32": np.float32([0, -0.0, 1 / 3, 1e-45, -3e38, np.inf, np.nan]),
}


@pytest.fixture(params=["torch", "numpy"])
def decode(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Each way, as it is chosen where nobody has imported torch."""
    monkeypatch.delitem(sys.modules, "torch")
    few, many = decoding.decoder(10**9 - 1), decoding.decoder(10**9)
    monkeypatch.undo()
    assert (few is decoding._decoded, many is decoding._decoded) == (True, False)
    return few if request.param == "numpy" else many


@pytest.mark.parametrize("dtype", STORED)
def test_every_value_times_its_scale_is_rounded_once(
    decode: Callable[[np.ndarray, np.ndarray], np.ndarray], dtype: str
) -> None:
    features = np.broadcast_to(STORED[dtype], (2, 3, len(STORED[dtype]))).copy()
    scale = SCALES.reshape(2, 3)
    with np.errstate(all="ignore"):
        want = (features.astype(np.float64) * scale.astype(np.float64)[..., None]).astype(np.float32)
        got = decode(features, scale)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want)
    assert np.array_equal(np.signbit(got)[~np.isnan(want)], np.signbit(want)[~np.isnan(want)])
    assert not np.shares_memory(got, features)


def test_where_torch_is_imported_it_is_used() -> None:
    assert "torch" in sys.modules
    assert decoding.decoder(1) is not decoding._decoded
