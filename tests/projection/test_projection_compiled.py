"""The compiled projection against the definition of P, bit for bit where float32 sums are exact, at each SIMD level."""

from __future__ import annotations

import multiprocessing
import threading
from multiprocessing.connection import Connection

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.native import library
from gradstore.projection import Projection, by_definition
from gradstore.projection.compiled_product import accumulate
from gradstore.projection.entries import Entries

pytestmark = pytest.mark.numerical

needs_library = pytest.mark.skipif(not library.available(), reason=f"compiled code: {library.status().why}")
LEVELS = library.levels()
KINDS = ("rademacher", "gaussian", "sjlt")
STARTS = (0, 1, 31, 37, 128, 4095, 2**32 - 77, 2**32, 2**33 + 5, 2**45 + 129)


def random_integers(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Whole numbers so small that every sum of them is exact in float32."""
    return torch.randint(-9, 10, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


def compiled(entries: Entries, block: torch.Tensor, k: int, start: int, first_k: int, level: str) -> torch.Tensor:
    out = torch.zeros(block.shape[0], k)
    accumulate(entries, out, block, start, first_k, level=level)
    return out


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
def test_unit_vectors_read_the_entries(kind, level, start):
    entries = Entries(kind, seed=2**64 - 5 - start % 7, stream=start % 3)
    got = compiled(entries, torch.eye(200), 45, start, 2, level)
    want = entries.at(torch.arange(2, 47), start + torch.arange(200)[:, None])
    assert torch.equal(got.double(), want)


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    start=st.integers(0, 2**40),
    rows=st.integers(1, 200),
    columns=st.integers(1, 700),
    k=st.integers(1, 300),
    first_k=st.integers(0, 2**20),
    level=st.sampled_from(LEVELS or ("",)),
    kind=st.sampled_from(["rademacher", "sjlt"]),
)
def test_whole_numbers_give_exactly_the_reference(seed, start, rows, columns, k, first_k, level, kind):
    entries = Entries(kind, seed, stream=seed % 5)
    block = random_integers(rows, columns, seed % 1000)
    signs = entries.tile(first_k, first_k + k, start, start + columns, torch.device("cpu"))
    assert torch.equal(compiled(entries, block, k, start, first_k, level).double(), block.double() @ signs.T)


@needs_library
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 200, 300])
@pytest.mark.parametrize("k", [1, 2561, 10240, 20480])
@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
def test_whole_numbers_over_many_tiles(kind, rows, k):
    start, block = 2**16 - 70, random_integers(rows, 9000, rows)
    got = compiled(Entries(kind, 11, 0), block, k, start, 0, LEVELS[0])
    some = torch.tensor([0, k // 3, k - 1])
    entries = Entries(kind, 11, 0).at(some[:, None], start + torch.arange(9000))
    assert torch.equal(got[:, some].double(), block.double() @ entries.T)


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_every_level_gives_the_same_bits(kind):
    """Those of a product with normals where there are fused multiply-adds."""
    block = torch.randn(21, 5000, generator=torch.Generator().manual_seed(1))
    levels = [level for level in LEVELS if kind != "gaussian" or level != "plain"]
    found = [compiled(Entries(kind, 1, 0), block, 70, 33, 0, level) for level in levels]
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_error_against_float64_is_float32_rounding(kind, level):
    block = torch.randn(3, 300_000, generator=torch.Generator().manual_seed(2))
    entries = Entries(kind, 3, 0)
    rows = 8 if kind != "sjlt" else 2048
    if kind == "sjlt":
        want = torch.zeros(3, rows)
        by_definition.accumulate(entries, want, block, 128, 0)
    else:
        want = block.double() @ entries.tile(0, rows, 128, 300_128, torch.device("cpu")).T
    got = compiled(entries, block, rows, 128, 0, level)
    assert (got.double() - want).norm() / want.norm() < 5e-7


def uneven_rows() -> dict[str, torch.Tensor]:
    """Gradients whose largest values are far from the others, [6, 5000] each."""
    generator = torch.Generator().manual_seed(8)
    normal, spikes = torch.randn(6, 5000, generator=generator), torch.zeros(6, 5000)
    spikes[:, ::300] = 1
    return {
        "lognormal": normal * torch.exp(3 * torch.randn(6, 5000, generator=generator)),
        "Cauchy": normal / torch.randn(6, 5000, generator=generator),
        "spikes": spikes + normal * 2**-9,
        "lesser spikes": spikes + normal * 2**-14,
        "spikes alone": spikes * normal,
        "constant": torch.full((6, 5000), 0.7),
        "ramp": normal * torch.exp2(torch.linspace(-120, 120, 5000)),
    }


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("name", "block"), uneven_rows().items(), ids=uneven_rows().keys())
def test_normals_meet_uneven_rows_with_a_small_error(level, name, block):
    entries = Entries("gaussian", 4, 0)
    want = block.double() @ entries.tile(0, 64, 77, 5077, torch.device("cpu")).T
    error = (compiled(entries, block, 64, 77, 0, level).double() - want).norm(dim=1) / want.norm(dim=1)
    assert error.max() < 2e-6, name


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    start=st.one_of(st.integers(0, 2**40), st.sampled_from([2**34 - 3, 2**34 * 3 + 255])),
    rows=st.integers(1, 70),
    columns=st.integers(1, 700),
    k=st.integers(1, 300),
    first_k=st.integers(0, 2**20),
)
def test_normals_of_any_shape_and_place(level, seed, start, rows, columns, k, first_k):
    entries = Entries("gaussian", seed, stream=seed % 5)
    block = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed % 1000))
    want = block.double() @ entries.tile(first_k, first_k + k, start, start + columns, torch.device("cpu")).T
    error = (compiled(entries, block, k, start, first_k, level).double() - want).abs() / block.norm(dim=1, keepdim=True)
    assert error.max() < 4e-6  # the largest of up to 21,000, of 4e-7 rms


@needs_library
@pytest.mark.parametrize("level", LEVELS)
def test_normals_over_many_tiles_and_spans(level):
    block = torch.randn(800, 20_000, generator=torch.Generator().manual_seed(9))
    entries, start = Entries("gaussian", 6, 0), 2**14 - 5
    got = compiled(entries, block, 300, start, 0, level)
    some = [0, 15, 16, 255, 256, 299]
    want = block.double() @ entries.at(torch.tensor(some)[:, None], start + torch.arange(20_000)).T
    assert (got[:, some].double() - want).norm() / want.norm() < 2e-6
    assert torch.equal(compiled(entries, block[760:], 40, start, 260, level), got[760:, 260:])


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_the_only_one(level, bad):
    block = torch.randn(20, 700, generator=torch.Generator().manual_seed(3))
    want = compiled(Entries("gaussian", 1, 0), block, 40, 0, 0, level)
    block[7, 300] = bad
    got = compiled(Entries("gaussian", 1, 0), block, 40, 0, 0, level)
    assert not got[7].isfinite().any()
    others = [row for row in range(20) if row != 7]
    assert torch.equal(got[others], want[others])


@needs_library
@pytest.mark.parametrize("level", LEVELS)
def test_a_value_that_is_not_finite_spoils_its_own_sums_alone(level):
    block = torch.randn(20, 700, generator=torch.Generator().manual_seed(3))
    entries = Entries("sjlt", 1, 0)
    want = compiled(entries, block, 3072, 0, 0, level)
    block[7, 300] = float("nan")
    got = compiled(entries, block, 3072, 0, 0, level)
    met = entries.at(torch.arange(3072), torch.tensor(300)) != 0
    assert met.sum() == 3
    assert torch.equal(got.isnan(), (torch.arange(20) == 7)[:, None] & met)
    assert torch.equal(got.nan_to_num(), want.where(~got.isnan(), 0.0))


@needs_library
@pytest.mark.parametrize("start", [0, 3, 2**32 - 6, 2**41 + 1])
@pytest.mark.parametrize("level", LEVELS)
def test_unit_vectors_read_the_normals(level, start):
    entries = Entries("gaussian", seed=2**63 + 1, stream=1)
    got = compiled(entries, torch.eye(600), 200, start, 5, level).double()
    want = entries.at(torch.arange(5, 205), start + torch.arange(600)[:, None])
    assert ((got - want).abs() <= 5e-7 * want.abs() + 5e-8).all()


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_bits_of_a_row_do_not_depend_on_its_neighbours(kind, level):
    block = torch.randn(23, 1000, generator=torch.Generator().manual_seed(4))
    entries = Entries(kind, 5, 0)
    whole = compiled(entries, block, 150, 77, 3, level)
    for rows in (slice(0, 1), slice(1, 6), slice(5, 22)):
        assert torch.equal(compiled(entries, block[rows], 150, 77, 3, level), whole[rows])
    for k, stop in ((0, 1), (1, 66), (66, 150)):
        assert torch.equal(compiled(entries, block, stop - k, 77, 3 + k, level), whole[:, k:stop])


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_subnormals_survive_a_caller_that_flushes_them(kind, level):
    block, k = torch.full((2, 128), 1e-42), 1024 if kind == "sjlt" else 64
    kept = compiled(Entries(kind, 0, 0), block, k, 0, 0, level)
    flushes = torch.set_flush_denormal(True)
    try:
        got = compiled(Entries(kind, 0, 0), block, k, 0, 0, level)
    finally:
        torch.set_flush_denormal(False)
    assert not flushes or torch.equal(got.view(torch.int32), kept.view(torch.int32))
    assert kept.view(torch.int32).count_nonzero() > 64


@needs_library
def test_strided_blocks_and_outputs():
    block = random_integers(40, 300, 5)
    entries = Entries("rademacher", 7, 0)
    want = compiled(entries, block[::2], 20, 0, 0, LEVELS[0])
    wide = torch.zeros(20, 50)
    accumulate(entries, wide[:, 10:30], block[::2], 0, 0)
    assert torch.equal(wide[:, 10:30], want)
    assert not wide[:, :10].any()
    assert not wide[:, 30:].any()
    tall = torch.zeros(20, 20).T
    accumulate(entries, tall, block.T.contiguous().T[::2], 0, 0)
    assert torch.equal(tall, want)


def _project_in_child(entries: Entries, block: torch.Tensor, out: torch.Tensor, pipe: Connection) -> None:
    accumulate(entries, out, block, 0, 0)  # torch's own thread pool does not survive a fork: no other torch here
    pipe.send_bytes(out.numpy().tobytes())


@needs_library
def test_a_forked_child_can_project_after_its_parent_did():
    block, entries, out = random_integers(10, 4000, 1), Entries("rademacher", 1, 0), torch.zeros(10, 2000)
    want = compiled(entries, block, 2000, 0, 0, LEVELS[0])
    assert block.numel() * 2000 > 1e7, "large enough for several threads"
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_project_in_child, args=(entries, block, out, there), daemon=True)
    child.start()
    assert here.poll(60), "the child hangs"
    assert here.recv_bytes() == want.numpy().tobytes()
    child.join(timeout=60)
    assert child.exitcode == 0


@needs_library
def test_two_threads_can_project_at_once():
    blocks = [random_integers(32, 2000, seed) for seed in range(4)]
    want = [Projection(dim=500).project(block) for block in blocks]
    got: list[torch.Tensor | None] = [None] * 4

    def work(i: int) -> None:
        got[i] = Projection(dim=500).project(blocks[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
