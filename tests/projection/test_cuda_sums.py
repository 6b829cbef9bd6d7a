"""The product by sums with a sparse P without a GPU: its kernels whole, in emulated thread blocks; and compiled."""

from __future__ import annotations

import ctypes
import io
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cuda_source import DTYPES, gradients, library, needs_compiler, needs_nvrtc, relative_error

from gradstore.projection import by_definition
from gradstore.projection.cuda import cuda_source
from gradstore.projection.cuda.geometry import PRECISIONS, slabs
from gradstore.projection.cuda.sparse_driver import SumsJob
from gradstore.projection.cuda.sparse_geometry import BLOCK, CUT, THREADS, SumsVariant, sums_launches, tile_rows
from gradstore.projection.cuda.sparse_product import WORKSPACE_BYTES, accumulate_sums
from gradstore.projection.entries import Entries

KIND = "sjlt"
TILES = (32, 16)
BOUND = {"fast": 2.0**-18, "exact": 2.0**-20}  # of what rounding moves a row by, relative to its norm
VARIANTS = [SumsVariant(precision, rows) for precision in PRECISIONS for rows in TILES]


class SumsEmulation:
    """A device on the host that runs the real kernels."""

    def __init__(self, folder: Path, tile_rows: int = 32) -> None:
        self.folder, self.tile_rows = folder, tile_rows

    def pack(self, variant: SumsVariant, dtype: torch.dtype, job: ctypes.Structure, rows: int, spans: int) -> None:
        assert max(rows, spans) < 1 << 16
        library(self.folder, variant).emulate_pack(ctypes.byref(job), DTYPES.index(dtype), rows, spans)

    def multiply(self, variant: SumsVariant, job: SumsJob, blocks: int) -> None:
        assert job.row_tiles < 1 << 16
        library(self.folder, variant).emulate_product(ctypes.byref(job), blocks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sums")


def emulate(folder, block, start=0, count=70, first_k=0, precision="exact", rows=32, **given):
    entries = Entries(KIND, given.pop("seed", 11), given.pop("stream", 0))
    out = torch.zeros(len(block), count)
    accumulate_sums(SumsEmulation(folder, rows), entries, out, block, start, first_k, precision, **given)
    return out


def columns_of_p(start, columns, count, first_k, seed=11, stream=0):
    """P[first_k : first_k + count, start : start + columns], float64, dense."""
    k, value = Entries(KIND, seed, stream).nonzeros(first_k, first_k + count, start + torch.arange(columns))
    P, base = torch.zeros(len(k) * BLOCK, columns, dtype=torch.float64), first_k // BLOCK * BLOCK
    P[k - base, torch.arange(columns)] = value
    return P[first_k - base : first_k - base + count]


def dense(block, start=0, count=70, first_k=0, **which):
    return block.double() @ columns_of_p(start, block.shape[1], count, first_k, **which).T


def integers(rows, columns, seed=1):
    return torch.randint(-8, 9, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


@needs_compiler
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_both_sides_agree_on_structures_and_sizes(folder, variant):
    there = library(folder, variant)
    assert there.job_bytes() == ctypes.sizeof(SumsJob)
    assert (there.block_threads(), there.pack_threads(), there.cut()) == (THREADS, 256, CUT)
    assert CUT % variant.stretch == 0


@needs_compiler
@pytest.mark.parametrize("rows", TILES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("start", "count", "first_k"),
    [(384, 70, 9), (2**40 + 7, 1100, 4096 * 3 - 50), (2**32 - 200, 1, 2**20), (CUT * 5 - 129, 257, 2**31 - 257)],
)
def test_integers_come_out_exactly(folder, rows, precision, start, count, first_k):
    """Their sums are exact, so every bit must be right: places, signs, carries of the counter, parts of blocks."""
    block = integers(37, 600)
    got = emulate(folder, block, start, count, first_k, precision, rows)
    assert torch.equal(got.double(), dense(block, start, count, first_k))


def test_the_dense_p_is_that_of_the_definition():
    k, p = 4096 * 3 - 50 + torch.arange(1100)[:, None], 2**40 + 7 + torch.arange(60)
    assert torch.equal(columns_of_p(2**40 + 7, 60, 1100, 4096 * 3 - 50), Entries(KIND, 11, 0).at(k, p))


@needs_compiler
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("start", [0, CUT - 129, 2**40 + 7])
def test_the_product_equals_the_dense_one(folder, precision, start):
    block = gradients(5, 4777, seed=start % 1000, spread=0.0)
    got, want = emulate(folder, block, start, 1024, 1024, precision), dense(block, start, 1024, 1024)
    error = (got.double() - want).norm(dim=1) / want.norm(dim=1)
    assert BOUND[precision] / 20 < error.min() < error.max() < BOUND[precision]
    uneven = gradients(5, 4777, seed=3)
    assert relative_error(emulate(folder, uneven, start, precision=precision), dense(uneven, start)) < 1e-6


@needs_compiler
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_value_is_further_off_than_the_stated_rounding(folder, precision):
    """Each gradient moves by at most 2^-30 of the sizes of its stretch, whose sum here is just above a power of two."""
    stretch = SumsVariant(precision, 32).stretch
    block = gradients(3, stretch, spread=0.0).abs() * torch.tensor([[1.0], [-1.0], [1.0]])
    sizes = block.double().abs().sum(1, keepdim=True)
    block = (block.double() * (1.001 * 2.0 ** torch.tensor([[3.0], [-60.0], [70.0]]) / sizes)).float()
    sizes = block.double().abs().sum(1, keepdim=True)
    got, want = emulate(folder, block, 0, 1024, 0, precision).double(), dense(block, 0, 1024)
    meeting = columns_of_p(0, stretch, 1024, 0).ne(0).sum(1)
    allowed = 32 * meeting * 2.0**-30 * sizes
    assert ((got - want).abs() <= allowed + 2.0**-24 * want.abs()).all()
    assert ((got - want).abs() > allowed / 2)[:, meeting == 1].any(), "a coarser unit would go unnoticed"


@needs_compiler
@pytest.mark.parametrize("value", [1.0, 1.9999999, -1.9999999, 3.4e38, 1.2e-38, 1e-45])
def test_a_stretch_whose_sizes_are_in_one_value_does_not_overflow(folder, value):
    block = torch.zeros(1, 900)
    block[0, 17] = value
    got, want = emulate(folder, block, 100, 1024), dense(block, 100, 1024)
    assert torch.equal(got, want.float())


@needs_compiler
def test_a_stretch_of_equal_values_does_not_overflow(folder):
    """Roundings then all go one way: together they are as large as they can be."""
    block = torch.full((1, 4096), (2.0**30 - 2.0**6) / 4096 + 0.5)
    want = dense(block, 0, 1024)
    assert relative_error(emulate(folder, block, 0, 1024, precision="fast"), want) < BOUND["fast"]


@needs_compiler
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("rows", TILES)
def test_every_dtype_is_read_as_it_is(folder, dtype, rows):
    block = gradients(3, 300, spread=0.5).to(dtype)
    assert relative_error(emulate(folder, block, rows=rows), dense(block)) < 1e-6


@needs_compiler
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tiny_and_huge_gradients_keep_their_precision(folder, scale, precision):
    block = gradients(2, 300, spread=0.0) * scale
    got, want = emulate(folder, block, precision=precision), dense(block)
    assert torch.isfinite(got).all()
    assert (got.double() - want).abs().max() <= 4e-6 * want.abs().max() + 2**-149


@needs_compiler
def test_rows_of_different_size_do_not_disturb_one_another(folder):
    block = gradients(3, 400, spread=0.0) * torch.tensor([[1e-20], [1.0], [1e20]])
    got, want = emulate(folder, block, precision="fast").double(), dense(block)
    assert ((got - want).norm(dim=1) <= BOUND["fast"] * want.norm(dim=1)).all()


@needs_compiler
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_that_is_not_finite_becomes_nan_and_no_other_does(folder, precision):
    block = integers(4, 9000)
    block[0, 5], block[1, 8999], block[2, 4097] = torch.nan, torch.inf, -torch.inf
    got = emulate(folder, block, count=1100, precision=precision)
    assert torch.isnan(got[:3]).all()
    assert torch.equal(got[3:].double(), dense(block[3:], count=1100))


@needs_compiler
@pytest.mark.parametrize("precision", PRECISIONS)
def test_bits_do_not_depend_on_neighbours_memory_tiles_or_the_rows_of_p_asked_for(folder, precision):
    start, block = CUT - 1500, gradients(35, CUT + 3000)  # three cuts
    whole = emulate(folder, block, start, 1050, precision=precision)  # so many that some are rounded on the way
    parts = [emulate(folder, part, start, 20, precision=precision) for part in block.split([1, 32, 2])]
    assert torch.equal(torch.cat(parts), whole[:, :20])
    assert torch.equal(emulate(folder, block[-3:], start, 1050, precision=precision, workspace=1), whole[-3:])
    assert torch.equal(emulate(folder, block, start, 1050, precision=precision, rows=16), whole)
    assert torch.equal(emulate(folder, block[:2], start, 1030, first_k=20, precision=precision), whole[:2, 20:])


@needs_compiler
def test_every_slab_of_rows_is_multiplied(folder):
    block = integers(67, 500)
    got = emulate(folder, block, workspace=SumsVariant("exact", 32).span_bytes)  # a tile at a time
    assert torch.equal(got.double(), dense(block))


@needs_compiler
def test_it_adds_to_an_output_of_any_layout(folder):
    block = gradients(4, 600).T.contiguous().T[:, 100:]
    out, device = torch.ones(30, 4).T, SumsEmulation(folder)
    accumulate_sums(device, Entries(KIND, 11, 2), out, block, 128, 0, "exact")
    assert relative_error(out, 1 + dense(block, 128, 30, stream=2)) < 1e-6
    accumulate_sums(device, Entries(KIND, 11, 2), torch.zeros(0, 30), block[:0], 0, 0, "exact")
    accumulate_sums(device, Entries(KIND, 11, 2), out, block[:, :0], 0, 0, "exact")


@needs_compiler
def test_nothing_beside_the_output_is_touched(folder):
    """Not even by adding zero, which makes zero of minus zero."""
    memory, block = torch.full((80, 1300), -0.0), integers(35, 500)
    out = memory[5:40, 100:1200]
    accumulate_sums(SumsEmulation(folder), Entries(KIND, 11, 0), out, block, 0, 1000, "fast")
    assert torch.equal(out.double(), dense(block, 0, 1100, 1000))
    out.fill_(-0.0)
    assert torch.signbit(memory).all()


@needs_compiler
def test_it_is_the_reference_to_float32_rounding(folder):
    block, entries = gradients(3, 5000), Entries(KIND, 2**63 + 5, 3)
    want = torch.zeros(3, 2048)
    by_definition.accumulate(entries, want, block, 12345, 0)
    got = emulate(folder, block, 12345, 2048, seed=2**63 + 5, stream=3)
    assert relative_error(got, want.double()) < BOUND["exact"]


# ---- geometry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kilobytes", "rows"), [(163, 32), (227, 32), (128, 32), (99, 16)])
def test_tables_fit_the_shared_memory(kilobytes, rows):
    assert tile_rows(kilobytes << 10) == rows
    assert all(SumsVariant(precision, rows).shared_bytes <= kilobytes << 10 for precision in PRECISIONS)


@given(
    variant=st.sampled_from(VARIANTS),
    rows=st.integers(1, 20000),
    start=st.integers(0, 2**63 - 10**8),
    columns=st.integers(1, 10**7),
    budget=st.integers(1, 1 << 30),
)
def test_launches_cover_the_axis_at_fixed_cuts_within_the_memory(variant, rows, start, columns, budget):
    of_rows = list(slabs(variant, rows, budget))
    for slab in {of_rows[0], of_rows[-1]}:
        pieces = list(sums_launches(variant, len(slab), start, columns, budget))
        tile_bytes = -(-len(slab) // variant.rows) * variant.rows * 4
        assert pieces[0].first == start // variant.stretch
        assert (pieces[-1].first + pieces[-1].stretches - 1) * variant.stretch < start + columns
        assert (pieces[-1].first + pieces[-1].stretches) * variant.stretch >= start + columns
        for piece, following in pairwise(pieces):
            assert piece.first + piece.stretches == following.first
            assert following.first * variant.stretch % CUT == 0, "sums would go to the output at another place"
        for piece in pieces:
            assert 0 < piece.stretches < 1 << 16
            assert piece.stretches * variant.stretch * tile_bytes <= max(budget, CUT * variant.rows * 4)
            assert -(-len(slab) // variant.rows) < 1 << 16


def test_a_block_of_640_rows_takes_two_cuts_a_launch():
    pieces = list(sums_launches(SumsVariant("fast", 32), 640, 0, 10 * CUT, WORKSPACE_BYTES))
    assert {piece.stretches * 4096 for piece in pieces} == {2 * CUT}
    assert BLOCK == 1024


# ---- compilation ---------------------------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize(
    ("architecture", "precision", "rows", "spilled"),
    [
        ("sm_80", "fast", 32, 108),  # outside of the loop over gradients
        ("sm_86", "fast", 16, 0),
        ("sm_90a", "fast", 32, 0),
        ("sm_90a", "exact", 32, 0),
        ("sm_100", "fast", 32, 0),
        ("sm_120", "exact", 16, 0),
    ],
)
def test_the_source_compiles_without_a_gpu(architecture, precision, rows, spilled):
    report = io.StringIO()
    code = cuda_source.compile_source(cuda_source.source_of(SumsVariant(precision, rows)), architecture, report)
    spills = re.search(
        rf"entry function '{cuda_source.ENTRY}'.*?(\d+) bytes spill stores", report.getvalue(), re.DOTALL
    )
    assert int(spills[1]) <= spilled
    assert code[:4] == b"\x7fELF"
    for name in (cuda_source.ENTRY, *cuda_source.PACKS):
        assert name.encode() in code
