"""Products of 7-bit integers are exact at every level, the largest values and every shape among them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gradstore.arithmetic.seven_bits import MOST, LeftRows
from gradstore.native import library

pytestmark = pytest.mark.numerical

LEVELS = (*library.levels(), "")


@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize("width", [1, 31, 127, 128, 129, 2047, 2048, 4200])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 2), (5, 9), (70, 7)])
def test_products_are_exact(simd: str, width: int, sizes: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-MOST, MOST + 1, (n, width), generator=rng, dtype=torch.int8) for n in sizes)
    left[0], right[0], right[-1] = MOST, MOST, -MOST
    expected = left.double() @ right.double().T
    rows = LeftRows(left)
    np.testing.assert_array_equal(rows.times(right, simd).double(), expected)
    columns, places = (torch.rand(expected.T.shape, generator=rng) < 0.6).nonzero().T
    found = rows.times_pairs(right, places.contiguous(), columns.contiguous(), simd)
    np.testing.assert_array_equal(found.double(), expected[places, columns])


@pytest.mark.parametrize("simd", LEVELS)
def test_no_sum_of_the_largest_values_overflows(simd: str) -> None:
    left, right = (torch.full((2, 1 << 16), MOST, dtype=torch.int8) for _ in range(2))
    left[1], right[1] = -MOST, -MOST
    expected = MOST**2 * 2**16
    assert LeftRows(left).times(right, simd).tolist() == [[expected, -expected], [-expected, expected]]
