"""The product in Triton, without a GPU: by its interpreter against the definition of P, and compiled for two cards."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from gradstore.projection import self_check
from gradstore.projection.entries import Entries

pytest.importorskip("triton", reason="Triton is not installed; make cuda-tools")
if torch.cuda.is_available():
    pytest.skip("a GPU runs it compiled: tests/projection/test_cuda_gpu.py", allow_module_level=True)
from gradstore.projection import by_triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore:TRITON_DEFAULT_FP_FUSION")

HERE = Path(__file__).parents[1]
CPU = torch.device("cpu")
VECTORS = json.loads((HERE / "data" / "projection.json").read_text())
BOUND = {"fast": 4e-4, "exact": 1e-6}


def accumulate(block, start=0, count=40, first_k=0, precision="exact", seed=2**63 + 5, stream=3):
    out = torch.zeros(len(block), count)
    by_triton.accumulate(Entries("rademacher", seed, stream), out, block, start, first_k, precision)
    return out


def dense(block, start=0, count=40, first_k=0, seed=2**63 + 5, stream=3):
    entries = Entries("rademacher", seed, stream)
    k = first_k + torch.arange(count)
    return block.double() @ entries.columns(k, start, start + block.shape[1]).T


def gradients(rows, columns, spread=2.0):
    generator = torch.Generator().manual_seed(rows + columns)
    normal = torch.randn(rows, columns, generator=generator)
    return normal * torch.exp(spread * torch.randn(rows, columns, generator=generator))


def relative_error(got, want):
    return float((got.double() - want).norm() / want.norm())


# start beyond 2^32, on no multiple of 128, across spans; first_k to the end at 2^31; counters that carry into their
# second word; seeds and places that are 1, which Triton would compile in
PLACES = [
    {"start": 0},
    {"start": 100, "first_k": 1},
    {"start": by_triton.SPAN * 3 - 129, "first_k": 2**20},
    {"start": 2**40 + 7, "first_k": 2**31 - 40},
    {"start": (2**32 - 3) * 128},
    {"start": 2**39, "seed": 1, "stream": 0},
    {"start": 2**40, "seed": 2**32, "stream": 2**31 - 1},
]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_signs_are_bit_for_bit_those_of_the_definition(place):
    block = torch.zeros(20, 600)
    block[torch.arange(20), torch.arange(20) * 31] = 1.0
    assert torch.equal(accumulate(block, precision="fast", **place).double(), dense(block, **place))


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_integers_come_out_exactly(place, precision):
    block = torch.randint(-8, 9, (17, 777), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(accumulate(block, precision=precision, **place).double(), dense(block, **place))


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 129), (16, 5000), (33, 300), (70, 9000)])
def test_the_product_equals_the_dense_one(precision, rows, columns):
    block = gradients(rows, columns)
    got = accumulate(block, 4000, precision=precision)
    assert relative_error(got, dense(block, 4000)) < (2 * BOUND[precision] if columns == 1 else BOUND[precision])


def test_the_projected_vector_matches_the_vectors():
    case = VECTORS["projected"]
    i = torch.arange(1, case["P"] + 1, dtype=torch.float64)
    gradient = (torch.sin(0.37 * i) * 10.0 ** (-(i % 5)))[None].float()
    got = accumulate(gradient, 0, case["K"], seed=case["seed"], stream=0) / case["K"] ** 0.5
    assert relative_error(got[0], torch.tensor(case["rademacher_over_sqrt_K"], dtype=torch.float64)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_read_as_it_is(dtype):
    block = gradients(3, 300, spread=0.5).to(dtype)
    assert relative_error(accumulate(block), dense(block)) < 1e-6


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_tiny_and_huge_gradients_keep_their_precision(scale, precision):
    block = gradients(2, 300, spread=0.0) * scale
    got, want = accumulate(block, precision=precision), dense(block)
    assert torch.isfinite(got).all()
    assert (got.double() - want).abs().max() <= 4e-4 * want.abs().max() + 2**-149


def test_what_is_not_finite_stays_so_and_stays_in_its_row():
    block = torch.ones(3, 200)
    block[0, 5], block[1, 7] = torch.nan, torch.inf
    got = accumulate(block)
    assert not torch.isfinite(got[:2]).any()
    assert torch.equal(got[2:].double(), dense(block[2:]))


@pytest.fixture
def products_of_one_order(monkeypatch):
    """The interpreter multiplies by NumPy, whose BLAS may add up in another order for smaller tiles; cards do not."""
    matmul = np.matmul

    def rounded_once(a, b, **more):
        return matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.float32)

    monkeypatch.setattr(np, "matmul", rounded_once)


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_bits_do_not_depend_on_neighbours_or_memory(precision, products_of_one_order):
    block = gradients(70, 700)
    whole = accumulate(block, 4000, precision=precision)
    parts = [accumulate(part, 4000, precision=precision) for part in block.split([1, 40, 29])]
    assert torch.equal(torch.cat(parts), whole)
    small, entries = torch.zeros(70, 40), Entries("rademacher", 2**63 + 5, 3)
    by_triton.accumulate(entries, small, block, 4000, 0, precision, workspace=1)  # a tile of rows and a span at a time
    assert torch.equal(small, whole)
    assert torch.equal(accumulate(block, 4000, 13, first_k=7, precision=precision), whole[:, 7:20])


def test_it_adds_to_an_output_of_any_layout():
    block = gradients(600, 9).T[::2, 100:]
    out = torch.ones(40, 5).T
    by_triton.accumulate(Entries("rademacher", 2**63 + 5, 3), out, block, 0, 0, "exact")
    assert relative_error(out, 1 + dense(block)) < 1e-6
    by_triton.accumulate(Entries("rademacher", 7, 0), out[:0], block[:0], 0, 0, "exact")


def test_it_solves_the_problems_that_a_card_is_asked():
    given = {"finished": lambda: lambda: True, "crowd": False}
    assert self_check.check(by_triton.accumulate, "rademacher", "fast", (16,), CPU, **given) == 8


# ---- compiled ------------------------------------------------------------------------------------------------------

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gradstore.projection import triton_kernels
architecture, rows, limbs, path = *map(int, sys.argv[1:4]), sys.argv[4]
names = triton_kernels.product.arg_names
constants = {"ROWS": rows, "TILE_K": 128, "LIMBS": limbs, "STAGES": 3}
pointers = {"packed": "*fp16", "undo": "*i32", "out": "*fp32"}
signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
sixteen = ("packed", "undo", "out", "out_stride", "limb_size")
aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in sixteen}
constants = {(names.index(name),): value for name, value in constants.items()}
source = ASTSource(triton_kernels.product, signature, constants, aligned)
built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 8, "num_stages": 3})
print(built.metadata.shared)
open(path, "wb").write(built.asm["cubin"])
"""


def disassembler() -> str | None:
    beside = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvdisasm"
    return shutil.which("nvdisasm") or (str(beside) if beside.exists() else None)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("rows", "limbs"), [(16, 1), (64, 1), (128, 1), (64, 2)])
def test_it_compiles_without_a_gpu(architecture, rows, limbs, tmp_path):
    """Without spills, or with the widest tile none in the loop of products; P in registers; shared memory that fits."""
    path = tmp_path / "product.cubin"
    command = [sys.executable, "-c", COMPILE, *map(str, (architecture, rows, limbs)), str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout) <= {80: 99, 90: 227}[architecture] << 10
    assert path.read_bytes()[:4] == b"\x7fELF"
    if (tool := disassembler()) is None:
        return
    text = subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text)
    products = [i for i, line in enumerate(instructions) if "MMA" in line]
    in_loop = instructions[products[0] : products[-1]]
    spills = [line for line in (in_loop if rows == 128 else instructions) if re.search(r"\b(LDL|STL)\b", line)]
    assert spills == []
    if architecture == 90:
        assert all(re.search(r"HGMMA\S* R\d+, R\d+, gdesc", instructions[i]) for i in products)
