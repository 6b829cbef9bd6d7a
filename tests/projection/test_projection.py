"""The definition of P and the reference product, against the published vectors and a dense float64 product."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_threads import torch_threads

from gradstore.errors import UsageError
from gradstore.projection import Projection
from gradstore.projection.kinds import kind_of
from gradstore.projection.philox import philox4x32_10

pytestmark = pytest.mark.numerical

DATA = Path(__file__).parents[1] / "data"
VECTORS, SPARSE = (json.loads((DATA / name).read_text()) for name in ("projection.json", "sjlt.json"))
DENSE = ("rademacher", "gaussian")
KINDS = (*DENSE, "sjlt")
STARTS = (0, 128, 384, 2**32 - 128, 2**32 + 256, 2**45)


def dense(projection: Projection, p: int, start: int = 0) -> torch.Tensor:
    """The whole P[:, start : start + p] in float64."""
    return projection.entries(torch.arange(projection.dim)[:, None], start + torch.arange(p))


def least(kind: str, dim: int) -> int:
    """`dim`, or the next larger that the kind takes."""
    return kind_of(kind).fitting(dim)[1]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("case", VECTORS["philox4x32_10_known_answers"])
def test_philox_gives_the_known_answers(case):
    counter = tuple(torch.tensor(int(word, 16)) for word in case["counter"])
    words = philox4x32_10(counter, tuple(int(word, 16) for word in case["key"]))
    assert [f"{int(word):08x}" for word in words] == case["output"]


@pytest.mark.parametrize("group", ["rademacher", "rademacher_streams"])
def test_signs_match_the_vectors(group):
    for case in VECTORS[group]:
        projection = Projection(seed=case["seed"], stream=case.get("stream", 0))
        signs = projection.entries(case["k"], case["p_start"] + torch.arange(len(case["signs"])))
        assert "".join("+" if sign > 0 else "-" for sign in signs) == case["signs"], case


def test_normals_match_the_vectors():
    for case in VECTORS["gaussian"]:
        projection = Projection("gaussian", seed=case["seed"])
        normals = projection.entries(case["k"], case["p_start"] + np.arange(len(case["values"])))
        np.testing.assert_allclose(normals.numpy(), case["values"], rtol=1e-12, err_msg=str(case))


@pytest.mark.parametrize("kind", DENSE)
def test_projected_vector_matches_the_vectors(kind):
    case = VECTORS["projected"]
    i = torch.arange(1, case["P"] + 1, dtype=torch.float64)
    gradient = torch.sin(0.37 * i) * 10.0 ** (-(i % 5))
    features = Projection(kind, dim=case["K"], seed=case["seed"]).project(gradient[None])[0]
    assert relative_error(features, torch.tensor(case[f"{kind}_over_sqrt_K"], dtype=torch.float64)) < 5e-7


@pytest.mark.parametrize(
    "case", [*SPARSE["columns"], *SPARSE["streams"]], ids=lambda case: f"{case['seed']}-{case['p']}"
)
def test_nonzeros_match_the_vectors(case):
    rows = len(case["row_and_sign"])
    projection = Projection("sjlt", dim=1024 * rows, seed=case["seed"], stream=case.get("stream", 0))
    column = projection.entries(torch.arange(projection.dim), case["p"])
    (k,) = column.nonzero(as_tuple=True)
    want = [(1024 * j + row, 32 * sign) for j, (row, sign) in enumerate(case["row_and_sign"])]
    assert list(zip(k.tolist(), column[k].tolist(), strict=True)) == want


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_sparsely_projected_vector_matches_the_vectors(backend):
    case = SPARSE["projected"]
    i = torch.arange(1, case["P"] + 1, dtype=torch.float64)
    gradient = torch.sin(0.37 * i) * 10.0 ** (-(i % 5))
    features = Projection("sjlt", dim=case["K"], seed=case["seed"], backend=backend).project(gradient[None])[0]
    want = torch.zeros(case["K"], dtype=torch.float64)
    want[[int(k) for k in case["nonzero"]]] = torch.tensor([*case["nonzero"].values()], dtype=torch.float64)
    assert relative_error(features, want) < 1e-7
    assert torch.equal(features != 0, want != 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_project_equals_the_dense_product(kind, start, dtype):
    generator = torch.Generator().manual_seed(start % 1000)
    block = torch.randn(5, 700, generator=generator).to(dtype)
    projection = Projection(kind, dim=least(kind, 96), seed=3, backend="reference")
    want = block.double() @ dense(projection, 700, start).T / math.sqrt(projection.dim)
    assert relative_error(projection.project(block, start), want) < 2e-7


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_of_p_and_of_k_add_up(kind):
    block = torch.randn(2, 9001, generator=torch.Generator().manual_seed(0))
    dim = {"rademacher": 1100, "gaussian": 8300, "sjlt": 5120}[kind]
    projection = Projection(kind, dim=dim, seed=1, backend="reference")
    rows = torch.tensor([0, 1, 1023, 1024, projection.dim - 1])
    want = block.double() @ projection.entries(rows[:, None], torch.arange(9001)).T
    got = torch.zeros(2, projection.dim)
    projection.accumulate(got, block, 0)
    assert relative_error(got[:, rows], want) < 2e-7


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_accumulate_takes_any_start_and_any_rows_of_p(kind, data):
    start = data.draw(st.integers(0, 2**34))
    rows, columns = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 300))
    first_k = data.draw(st.integers(0, 40))
    k = data.draw(st.integers(0, 40 - first_k))
    projection = Projection(
        kind, dim=least(kind, 40), seed=data.draw(st.integers(0, 2**64 - 1)), stream=data.draw(st.integers(0, 9))
    )
    block = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    got = torch.ones(rows, k)
    projection.accumulate(got, block, start, first_k=first_k)
    want = 1 + block.double() @ dense(projection, columns, start)[first_k : first_k + k].T
    room = 3e-6 * float(block.norm(dim=1).max()) if rows else 0.0
    assert torch.allclose(got.double(), want, rtol=1e-6, atol=max(room, 1e-5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_dim_is_a_prefix(kind):
    block = torch.randn(3, 400, generator=torch.Generator().manual_seed(2))
    few, many = least(kind, 24), 3 * least(kind, 24)
    small, large = torch.zeros(3, few), torch.zeros(3, many)
    Projection(kind, dim=few).accumulate(small, block, 0)
    Projection(kind, dim=many).accumulate(large, block, 0)
    assert torch.equal(small, large[:, :few])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_bits_do_not_depend_on_neighbours_threads_or_splits_of_k(kind, backend):
    generator = torch.Generator().manual_seed(4)
    block = torch.randn(37, 1500, generator=generator) * torch.exp(3 * torch.randn(37, 1500, generator=generator))
    dim = least(kind, 150)
    projection = Projection(kind, dim=dim, seed=9, backend=backend)
    whole = projection.project(block, 128)
    with torch_threads(1):
        parts = [projection.project(part, 128) for part in block.split([1, 2, 5, 13, 16])]
    assert torch.equal(torch.cat(parts), whole)
    out = torch.zeros(37, dim)
    for k, stop in ((0, 1), (1, 18), (18, 150), (150, dim)):
        part = torch.zeros(37, stop - k)
        projection.accumulate(part, block, 128, first_k=k)
        out[:, k:stop] = part
    assert torch.equal(out.mul_(projection.scale), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased_over_seeds(kind):
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(300, generator=generator)
    pair = torch.stack((a, 0.5 * a + torch.randn(300, generator=generator)))
    exact = pair.double() @ pair.double().T
    seeds, dim = 400, least(kind, 32)
    grams = []
    for seed in range(seeds):
        features = Projection(kind, dim=dim, seed=seed).project(pair).double()
        grams.append(features @ features.T)
    mean = torch.stack(grams).mean(0)
    norms = exact.diagonal()
    sigma = torch.sqrt((exact**2 + norms[:, None] * norms[None, :]) / (dim * seeds))
    assert ((mean - exact).abs() < 4 * sigma).all(), (mean, exact, sigma)


def test_streams_and_seeds_are_independent():
    rows = [
        Projection(dim=1, seed=seed, stream=stream).entries(0, torch.arange(4096))
        for seed, stream in ((0, 0), (1, 0), (2**32, 0), (0, 1))
    ]
    correlation = torch.stack(rows) @ torch.stack(rows).T / 4096
    assert (correlation - torch.eye(4)).abs().max() < 5 / 64


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_tiny_and_huge_gradients_keep_their_precision(kind, scale):
    block = torch.randn(2, 300, generator=torch.Generator().manual_seed(6)) * scale
    projection = Projection(kind, dim=least(kind, 64))
    got = torch.zeros(2, projection.dim)
    projection.accumulate(got, block, 0)
    want = block.double() @ dense(projection, 300).T
    assert (got.double() - want).abs().max() <= 2e-6 * want.abs().max() + 300 * 2**-149


def test_rows_of_zeros_and_empty_blocks_give_zeros():
    projection = Projection(dim=8)
    assert torch.equal(projection.project(torch.zeros(3, 200)), torch.zeros(3, 8))
    assert projection.project(torch.zeros(0, 200)).shape == (0, 8)
    assert torch.equal(projection.project(torch.zeros(2, 0)), torch.zeros(2, 8))


def test_blocks_need_not_be_contiguous_and_are_not_changed():
    block = torch.randn(400, 6, generator=torch.Generator().manual_seed(7)).T[::2]
    before = block.clone()
    projection = Projection(dim=16)
    assert torch.equal(projection.project(block), projection.project(block.contiguous()))
    assert torch.equal(block, before)


def test_pickle_and_repr_round_trip():
    projection = Projection("gaussian", dim=7, seed=2**64 - 1, stream=3)
    assert pickle.loads(pickle.dumps(projection)) == projection
    assert eval(repr(projection)) == projection
    assert Projection.VERSION == 1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: Projection("sparse"),
            "kind: unknown kind (expected one of rademacher, gaussian, sjlt, got 'sparse').",
        ),
        (
            lambda: Projection(backend="gpu"),
            "backend: unknown backend (expected one of auto, native, cuda, reference, got 'gpu').",
        ),
        (lambda: Projection(dim=0), "dim: bad dim (expected an integer in [1, 2147483649), got 0)."),
        (lambda: Projection(seed=-1), "seed: bad seed (expected an integer in [0, 18446744073709551616), got -1)."),
        (
            lambda: Projection().project(torch.ones(3)),
            "block: bad block of gradients (expected floats of shape [rows, parameters], got float32 [3]).",
        ),
        (
            lambda: Projection().project(torch.ones(3, 2, dtype=torch.int32)),
            "block: bad block of gradients (expected floats of shape [rows, parameters], got int32 [3, 2]).",
        ),
        (
            lambda: Projection().project(torch.ones(1, 2), 64),
            "start: bad start of a block (expected a multiple of 128, got 64).",
        ),
        (
            lambda: Projection().project(torch.ones(1, 2), -128),
            "start: bad start of a block (expected a multiple of 128, got -128).",
        ),
        (
            lambda: Projection(dim=4).accumulate(torch.zeros(1, 3), torch.ones(1, 2), 0, first_k=2),
            "first_k: bad first_k (expected an integer in [0, 2), got 2).",
        ),
        (
            lambda: Projection(dim=4).accumulate(torch.zeros(2, 3), torch.ones(1, 2), 0),
            "out: bad output (expected float32 [1, K], got float32 [2, 3]).",
        ),
        (lambda: Projection(dim=4).entries(4, 0), "k: index out of range (expected integers in [0, 4), got 4 to 4)."),
        (lambda: Projection(dim=4).entries(0, 0.5), "p: bad index (expected integers, got float32)."),
    ],
)
def test_bad_arguments_get_one_clear_line(call, text):
    with pytest.raises(UsageError) as caught:
        call()
    assert str(caught.value) == text
