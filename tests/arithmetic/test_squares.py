"""Squared norms of float32 rows against exact sums, at every SIMD level and without compiled code."""

from __future__ import annotations

import math

import pytest
import torch
from torch_threads import torch_threads

from gradstore.arithmetic.squares import squared_norms
from gradstore.native import library

SHAPES = [(0, 5), (4, 0), (1, 1), (3, 31), (3, 32), (5, 33), (7, 1000), (2, 70001)]
LEVELS = [*library.levels(), "none"]

pytestmark = pytest.mark.numerical


def rows(n: int, p: int) -> torch.Tensor:
    values = torch.randn(n, p, generator=torch.Generator().manual_seed(n + p))
    return values * 10.0 ** torch.randint(-22, 18, (n, p), generator=torch.Generator().manual_seed(p))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_squared_norms_are_exact_to_rounding(n: int, p: int, level: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADSTORE_SIMD", level)
    values = rows(n, p)
    found = squared_norms(values)
    want = [math.fsum(x * x for x in row) for row in values.double().tolist()]
    assert (found.dtype, found.shape) == (torch.float64, (n,))
    assert all(abs(got - exact) <= 1e-13 * exact for got, exact in zip(found.tolist(), want, strict=True))


@pytest.mark.skipif(not library.levels(), reason="nothing was compiled")
def test_every_level_any_threads_and_any_rows_beside_give_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    values = rows(40, 5001)
    found = squared_norms(values)
    for level in library.levels():
        monkeypatch.setenv("GRADSTORE_SIMD", level)
        assert torch.equal(squared_norms(values), found)
    for count in (1, 3):
        with torch_threads(count):
            assert torch.equal(squared_norms(values), found)
    assert torch.equal(torch.cat([squared_norms(row[None]) for row in values]), found)
    assert torch.equal(squared_norms(torch.cat([values, values], 1)[:, :5001]), found)  # rows lie apart
    assert torch.equal(squared_norms(values.T.contiguous().T), found)  # columns do


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 40, 99])
def test_a_row_that_is_not_finite_is_alone_in_it(value: float, place: int, level: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADSTORE_SIMD", level)
    values = torch.ones(3, 100)
    values[1, place] = value
    found = squared_norms(values)
    assert found[0] == found[2] == 100
    assert not found[1].isfinite()


def test_the_smallest_and_the_largest_floats_count():
    least, most = 2.0**-149, torch.finfo(torch.float32).max
    found = squared_norms(torch.tensor([[least, least], [most, most]]))
    assert found.tolist() == pytest.approx([2 * least**2, 2 * most**2], rel=1e-14, abs=0)
