"""The bands that norms of right projections keep, against drawn ones and, of the sparse P, against exact tails."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch

from gradstore.projection import Projection
from gradstore.projection.kinds import kind_of
from gradstore.projection.norm_bands import dense_band, sparse_band

pytestmark = pytest.mark.numerical

B = 1024
STEP = 1 / 512  # of the values that the exact distributions are rounded to, away from zero
VECTORS = [[1, 1], [2, 1], [1, 1, 1], [1, 1, 0.5], [3, 1, 1], [1, 1, 1, 1], [2, 1, 1, 1], [1] * 5, [4, 2, 1, 0.5, 0.25]]


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "sjlt"])
@pytest.mark.parametrize("K", [1, 8, 128, 1024, 10240])
def test_rows_keep_within_the_band(kind: str, K: int) -> None:
    if K % kind_of(kind).multiple:
        pytest.skip("no K of this kind")
    low, high = kind_of(kind).norm_band(K)
    g = torch.randn(2000, 5, generator=torch.Generator().manual_seed(K))
    ratio = Projection(kind, K).project(g).square().sum(1) / g.square().sum(1)
    assert low <= ratio.min()
    assert ratio.max() <= high


def test_the_bands_are_those_that_are_documented() -> None:
    assert dense_band(10240) == pytest.approx((0.896, 1.109), abs=1e-3)
    assert sparse_band(10, B) == pytest.approx((0.403, 1.597), abs=1e-3)
    assert sparse_band(100, B) == pytest.approx((0.905, 1.095), abs=1e-3)
    assert sparse_band(5, B)[0] == 0
    assert sparse_band(6, B)[0] > 0


@pytest.mark.parametrize("blocks", [4, 6, 10, 16])
@pytest.mark.parametrize("g", VECTORS, ids=str)
def test_no_small_vector_leaves_the_sparse_band_more_often_than_it_says(g: list[float], blocks: int) -> None:
    low, high = sparse_band(blocks, B)
    values, chances = exact_ratios(g, blocks)
    assert chances.sum() == pytest.approx(1)
    assert chances[(values < low) | (values > high)].sum() <= 1e-12
    if g == [1, 1]:  # and the bound is for such: without three more of ten meetings it would not hold
        assert chances[np.abs(values - 1) > (high - 1) / 2].sum() > 1e-12


def exact_ratios(g: list[float], blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """(‖P g‖² / K for a unit g, chances) over all ways in which its entries meet, and all signs."""
    unit = np.asarray(g) / np.linalg.norm(g)
    most = len(g) * round(1 / STEP) + 1
    of_block = np.zeros(2 * most + 1)
    for parts in partitions(len(g)):
        meet = np.prod([B - i for i in range(len(parts))]) / B ** len(g)
        for signs in product((1, -1), repeat=len(g)):
            z = sum((unit[part] * np.asarray(signs)[part]).sum() ** 2 for part in parts) - 1
            of_block[most + int(np.sign(z) * np.ceil(abs(z) / STEP - 1e-9))] += meet / 2 ** len(g)
    total = np.ones(1)
    for _ in range(blocks):
        total = np.convolve(total, of_block)
    return 1 + (np.arange(len(total)) - len(total) // 2) * STEP / blocks, total


def partitions(n: int) -> Iterator[list[list[int]]]:
    """All partitions of 0 … n - 1."""
    if n == 0:
        yield []
        return
    for parts in partitions(n - 1):
        for i in range(len(parts)):
            yield [*parts[:i], [*parts[i], n - 1], *parts[i + 1 :]]
        yield [*parts, [n - 1]]
