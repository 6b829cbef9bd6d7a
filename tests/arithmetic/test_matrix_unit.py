"""Products in bfloat16 limbs against float64, with the matrix unit where there is one and without it everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradstore.arithmetic import matrix_unit
from gradstore.arithmetic.bfloat16_limbs import LIMB, error_bound
from gradstore.arithmetic.matrix_unit import REST_ERROR, Packed, Strips, add_product, aligned, pack

LEVELS = matrix_unit.levels()
SHAPES = [(1, 1, 1), (3, 5, 33), (16, 16, 32), (33, 70, 1100), (40, 520, 70)]
DTYPES = [torch.float16, torch.float32]

pytestmark = [pytest.mark.numerical, pytest.mark.skipif(not LEVELS, reason="nothing was compiled")]
needs_unit = pytest.mark.skipif("amx" not in LEVELS, reason="this processor has no matrix unit")


def rows(n: int, D: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def multiply(a: Tensor, b: Tensor | Packed, level: str, limbs: tuple[int, int] = (2, 2)) -> Tensor:
    out = torch.zeros(len(a), b.rows if isinstance(b, Packed) else len(b))
    add_product(a, b, out, limbs=limbs, level=level)
    return out


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("types", [(a, b) for a in DTYPES for b in DTYPES])
@pytest.mark.parametrize(("m", "n", "D"), SHAPES)
def test_within_its_bound_of_float64(
    m: int, n: int, D: int, types: tuple[torch.dtype, torch.dtype], level: str
) -> None:
    a, b = rows(m, D, types[0], 1), rows(n, D, types[1], 2)
    exact, size = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
    error = (multiply(a, b, level).double() - exact).abs() / size
    assert error.max() <= error_bound(D, exact_values=types == (torch.float16, torch.float16))
    for limbs in ((1, 1), (1, 2), (2, 1)):
        coarse = (multiply(a, b, level, limbs).double() - exact).abs() / size
        assert coarse.max() <= (limbs.count(1) * 2.0**-8) * (1 + 2.0**-8) + error_bound(D, exact_values=False)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("dtype", "value", "left_out"),
    [(torch.float16, 1 + 2.0**-8, 2.0**-16), (torch.float32, 1 + 2.0**-8 + 2.0**-17, 2.0**-15 - 2.0**-21)],
)
def test_the_bound_holds_for_the_worst_values_and_is_nearly_reached(
    dtype: torch.dtype, value: float, left_out: float, level: str
) -> None:
    """Values half way between two bfloat16, whose rests are half way between two as well."""
    a = torch.full((2, 64), value).to(dtype)
    exact = 64 * value**2
    error = abs(multiply(a, a, level)[0, 1].item() - exact) / exact
    assert 0.95 * left_out < error <= error_bound(64, exact_values=dtype == torch.float16)
    coarse = abs(multiply(a, a, level, (1, 1))[0, 1].item() - exact) / exact
    assert coarse <= 2 * LIMB + LIMB**2


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "D"), SHAPES)
def test_what_first_limbs_leave_is_measured(m: int, n: int, D: int, dtype: torch.dtype, level: str) -> None:
    a, b = rows(m, D, dtype, 11), rows(n, D, dtype, 12)
    expected = (a.float() - a.bfloat16().float()).double().square().sum(dim=1)
    for limbs in ((1, 1), (2, 1)):
        found, out = torch.ones(m, dtype=torch.float64), torch.zeros(m, n)
        add_product(a, b, out, limbs=limbs, left_rests=found, level=level)
        assert torch.equal(out, multiply(a, b, level, limbs))
        assert ((found - 1 - expected).abs() <= REST_ERROR * expected + 1e-15).all()


@needs_unit
@pytest.mark.parametrize("limbs", [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize(("m", "n", "D"), SHAPES)
def test_the_unit_gives_the_bits_of_the_plain_loops(m: int, n: int, D: int, limbs: tuple[int, int]) -> None:
    for dtype in DTYPES:
        a, b = rows(m, D, dtype, 3), rows(n, D, dtype, 4)
        factors = {"left_factors": torch.rand(m) + 0.5, "right_factors": torch.rand(n) + 0.5}
        found = []
        for level in ("amx", "plain"):
            out = torch.ones(m, n)
            add_product(a, b, out, limbs=limbs, level=level, **factors)
            found.append(out)
        assert torch.equal(*found)


@pytest.mark.parametrize("level", LEVELS)
def test_bits_depend_on_two_rows_alone(level: str) -> None:
    a, b = rows(50, 700, torch.float16, 5), rows(80, 700, torch.float32, 6)
    whole = multiply(a, b, level)
    assert torch.equal(multiply(a, pack(b, level=level), level), whole)
    assert torch.equal(multiply(a[7:24], b[31:33], level), whole[7:24, 31:33])
    assert torch.equal(multiply(a[:, :].clone()[[49, 0]], b, level), whole[[49, 0]])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limbs", [1, 2])
@pytest.mark.parametrize(
    ("n", "m", "segments", "K"), [(3, 5, 1, 1), (40, 9, 2, 33), (70, 200, 2, 1100), (20, 32, 3, 90)]
)
def test_rows_placed_some_at_a_time_give_the_same_bits(
    n: int, m: int, segments: int, K: int, limbs: int, dtype: torch.dtype, level: str
) -> None:
    values, queries = rows(n * segments, K, dtype, 13).view(n, segments, K), rows(m, K, torch.float32, 14)
    room = aligned(Strips.bytes_needed(segments, K, n + 9, limbs))
    strips, packed = Strips(segments, K, n + 9, limbs, room, level=level), pack(queries, limbs, level=level)
    for at in (3, 0, *range(6, n, 3)):  # in any order
        strips.place(at, values[at : at + 3])
    factors = torch.rand(n) + 0.5
    for s in range(segments):
        found, expected = torch.ones(2, n, m)
        rests = torch.zeros(n, dtype=torch.float64)
        strips.add_product(s, n, packed, found, left_factors=factors)
        settings = {"left_factors": factors, "left_rests": rests, "limbs": (limbs, limbs), "level": level}
        add_product(values[:, s], queries, expected, **settings)
        assert torch.equal(found, expected)
        assert torch.allclose(strips.rests[s, :n], rests, rtol=2 * REST_ERROR, atol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_factors_strides_and_what_was_there(level: str) -> None:
    a, b = rows(20, 90, torch.float32, 7), rows(12, 90, torch.float16, 8)
    left, right = torch.rand(20) + 0.5, torch.rand(12) + 0.5
    room = torch.full((20, 30), 2.0)
    add_product(a[:, 10:60], b[:, 10:60], room[:, 5:17], left_factors=left, right_factors=right, level=level)
    scale = left[:, None].double() * right.double()
    x, y = a[:, 10:60].double(), b[:, 10:60].double()
    error = (room[:, 5:17].double() - 2 - scale * (x @ y.T)).abs()
    assert (error <= scale * (x.abs() @ y.abs().T) * error_bound(50, exact_values=False) + 2 * 2.0**-23).all()
    assert (room[:, :5] == 2).all()
    assert (room[:, 17:] == 2).all()


@pytest.mark.parametrize("level", LEVELS)
def test_float16_loses_nothing_even_below_its_normal_numbers(level: str) -> None:
    values = torch.arange(1, 64).half() * 2.0**-24
    found = multiply(values[None], torch.eye(63).half(), level)
    assert torch.equal(found[0], values.float())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(bad: float, level: str) -> None:
    a, b = rows(40, 64, torch.float16, 9), rows(8, 64, torch.float16, 10)
    a[33, 50] = bad
    found = multiply(a, b, level)
    assert not found[33].isfinite().any()
    assert found[:33].isfinite().all()
    assert found[34:].isfinite().all()


@needs_unit
def test_the_unit_is_used_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADSTORE_SIMD", raising=False)
    assert matrix_unit.available()
    monkeypatch.setenv("GRADSTORE_SIMD", "plain")
    assert not matrix_unit.available()
