"""The CUDA projection without a GPU: its device functions and data flow on the host, and its compilation by NVRTC."""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import re
import shutil
import subprocess
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from gradstore.projection.cuda import cuda_source, fused_product
from gradstore.projection.cuda.cuda_source import Compiled
from gradstore.projection.cuda.driver import Job, Pack
from gradstore.projection.cuda.geometry import SPAN, Variant, variant_for
from gradstore.projection.entries import Entries

HERE = Path(__file__).parents[1]
VECTORS = json.loads((HERE / "data" / "projection.json").read_text())
KINDS = ("rademacher", "gaussian")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
EMULATIONS = {"project.cu": "cuda_emulation.cpp", "sums.cu": "sums_emulation.cpp"}
VARIANTS = [(kind, precision) for kind in KINDS for precision in ("fast", "exact")]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulation with")


class OneLane:
    """Everything in turn."""

    def packing(self, slot):
        return nullcontext()

    def multiplying(self, slot):
        return nullcontext()


class Emulation:
    """A device on the host that runs the real headers; what it is asked to do is what a GPU would be."""

    def __init__(self, folder: Path, hopper: bool, processors: int = 5) -> None:
        self.folder, self.hopper, self.processors = folder, hopper, processors

    def pack(self, variant: Variant, dtype: torch.dtype, job: Pack, rows: int, spans: int) -> None:
        library(self.folder, variant).emulate_pack(ctypes.byref(job), DTYPES.index(dtype), rows, spans)

    def lanes(self):
        return nullcontext(OneLane())

    def resident(self, variant: Variant) -> int:
        return self.processors

    def multiply(self, variant: Variant, job: Job, blocks: int) -> None:
        assert 1 <= blocks <= self.processors
        library(self.folder, variant).emulate_product(ctypes.byref(job))


@cache
def library(folder: Path, variant: Compiled) -> ctypes.CDLL:
    """The emulation of a variant, compiled."""
    name = "-".join([variant.main, *(f"{value}" for value in variant.defines.values())])
    path = folder / f"{name}.so"
    defines = [f"-D{name}={value}" for name, value in variant.defines.items()]
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    # Jumps from one stack to another are no fault; shared memory holds values of several types.
    flags += ["-U_FORTIFY_SOURCE", "-fno-strict-aliasing"]
    if not path.exists():  # of a process before this one
        new = path.with_suffix(".new")
        source = str(HERE / EMULATIONS[variant.main])
        subprocess.run(["g++", *flags, *defines, f"-I{cuda_source.FOLDER}", source, "-o", str(new)], check=True)
        new.replace(path)
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture
def functions(folder):
    return library(folder, variant_for("rademacher", "fast", 32, True))


def words(values: list[int]) -> ctypes.Array:
    return (ctypes.c_uint32 * len(values))(*values)


def emulate(folder, block, start=0, count=70, first_k=0, hopper=True, precision="exact", kind="rademacher", **given):
    entries = Entries(kind, given.get("seed", 11), given.get("stream", 0))
    out = torch.zeros(len(block), count)
    fused_product.accumulate(Emulation(folder, hopper), entries, out, block, start, first_k, precision)
    return out


def dense(kind, block, start=0, count=70, first_k=0, seed=11, stream=0):
    entries = Entries(kind, seed, stream)
    k, p = first_k + torch.arange(count)[:, None], start + torch.arange(block.shape[1])
    return block.double() @ entries.at(k, p).T


def relative_error(got, want):
    return float((got.double() - want).norm() / want.norm())


def gradients(rows, columns, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    return normal * torch.exp(spread * torch.randn(rows, columns, generator=generator))


@needs_compiler
@pytest.mark.parametrize("case", VECTORS["philox4x32_10_known_answers"])
def test_the_generator_gives_the_known_answers(functions, case):
    out = words([0] * 4)
    functions.philox_words(out, words([int(x, 16) for x in case["counter"]]), words([int(x, 16) for x in case["key"]]))
    assert [f"{word:08x}" for word in out] == case["output"]


@needs_compiler
def test_structures_have_the_same_size_on_both_sides(functions):
    assert (functions.pack_bytes(), functions.job_bytes()) == (ctypes.sizeof(Pack), ctypes.sizeof(Job))


@needs_compiler
def test_normals_agree_with_float64_to_float32_rounding(functions):
    edges = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**30, 3 * 2**30, 12345]
    random = np.random.default_rng(0).integers(0, 2**32, 4000).tolist()
    drawn = [*[w for a in edges for b in edges for w in (a, b)], *random]
    got = []
    for i in range(0, len(drawn), 4):
        out = (ctypes.c_float * 4)()
        functions.normals(out, words(drawn[i : i + 4]))
        got += list(out)
    first, second = (np.array(drawn, dtype=np.float64)[i::2] for i in (0, 1))
    radius, angle = np.sqrt(-2 * np.log((first + 0.5) / 2**32)), 2 * np.pi * (second + 0.5) / 2**32
    want = np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1).ravel()
    scale = np.repeat(radius, 2)
    assert (np.abs(np.array(got) - want) <= 3e-7 * scale).all()


@needs_compiler
def test_scales_bring_the_largest_value_just_below_the_limit(functions):
    for value in (1.0, 1.999, 2.0, 3e38, 1.2e-38, 1e-40, 1e-45, 6e-8):
        bits = int(np.float32(value).view(np.uint32))
        scaled = float(np.float32(value)) * 2.0 ** functions.exponent_of(bits)
        assert 2**14 <= scaled < 2**15, value
    assert functions.exponent_of(0) == 0
    assert functions.exponent_of(0x7F800000) == 0


@needs_compiler
@pytest.mark.parametrize("hopper", [True, False])
def test_integers_come_out_exactly(folder, hopper):
    """Small integers are exact in one limb, so the product must be, bit for bit: every sign is where it should be."""
    block = torch.randint(-8, 9, (37, 1500), generator=torch.Generator().manual_seed(1)).float()
    got = emulate(folder, block, start=384, count=300, first_k=9, hopper=hopper, precision="fast")
    assert torch.equal(got.double(), dense("rademacher", block, 384, 300, 9))


@needs_compiler
@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize(("kind", "precision"), VARIANTS)
@pytest.mark.parametrize("start", [0, 100, SPAN * 3 - 129, 2**31 - 300, 2**40 + 7])
def test_the_emulated_product_equals_the_dense_one(folder, kind, precision, hopper, start):
    block = gradients(5, 777, seed=start % 1000)
    got = emulate(folder, block, start, 40, 3, hopper, precision, kind)
    error = relative_error(got, dense(kind, block, start, 40, 3))
    assert error < {"fast": 4e-4, "exact": 1e-6}[precision]


@needs_compiler
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_every_dtype_is_read_as_it_is(folder, dtype):
    block = gradients(3, 300, spread=0.5).to(dtype)
    assert relative_error(emulate(folder, block), dense("rademacher", block)) < 1e-6


@needs_compiler
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_tiny_and_huge_gradients_keep_their_precision(folder, scale, precision):
    block = gradients(2, 300, spread=0.0) * scale
    got, want = emulate(folder, block, precision=precision), dense("rademacher", block)
    assert torch.isfinite(got).all()
    assert (got.double() - want).abs().max() <= 4e-4 * want.abs().max() + 2**-149


@needs_compiler
def test_rows_of_different_size_do_not_disturb_one_another(folder):
    block = gradients(3, 400, spread=0.0) * torch.tensor([[1e-20], [1.0], [1e20]])
    got, want = emulate(folder, block, precision="fast").double(), dense("rademacher", block)
    assert ((got - want).norm(dim=1) <= 4e-4 * want.norm(dim=1)).all()


@needs_compiler
def test_what_is_not_finite_stays_so_and_stays_in_its_row(folder):
    block = torch.ones(3, 200)
    block[0, 5], block[1, 7] = torch.nan, torch.inf
    got = emulate(folder, block)
    assert not torch.isfinite(got[:2]).any()
    assert torch.equal(got[2:].double(), dense("rademacher", block[2:]))


@needs_compiler
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_bits_do_not_depend_on_neighbours_memory_or_processors(folder, precision, monkeypatch):
    block = gradients(70, 45000)  # six spans and a bit, as many launches as the workspace asks for
    whole = emulate(folder, block, 8000, 20, precision=precision)
    parts = [emulate(folder, part, 8000, 20, precision=precision) for part in block.split([1, 40, 29])]
    assert torch.equal(torch.cat(parts), whole)
    monkeypatch.setattr(fused_product, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(Emulation, "__init__", _one_processor)
    assert torch.equal(emulate(folder, block, 8000, 20, precision=precision), whole)
    assert torch.equal(emulate(folder, block, 8000, 13, first_k=7, precision=precision), whole[:, 7:])


def _one_processor(self, folder, hopper):
    self.folder, self.hopper, self.processors = folder, hopper, 1


@needs_compiler
def test_it_adds_to_an_output_of_any_layout(folder):
    block = gradients(4, 600).T.contiguous().T[:, 100:]
    out = torch.ones(30, 4).T
    fused_product.accumulate(Emulation(folder, True), Entries("rademacher", 11, 2), out, block, 128, 0, "exact")
    assert relative_error(out, 1 + dense("rademacher", block, 128, 30, stream=2)) < 1e-6
    empty = torch.zeros(0, 30)
    fused_product.accumulate(Emulation(folder, True), Entries("rademacher", 11, 2), empty, block[:0], 0, 0, "exact")


@needs_compiler
def test_one_limb_is_far_below_the_noise_of_the_projection(folder):
    block = gradients(4, 3000)
    fast, want = emulate(folder, block, count=256, precision="fast"), dense("rademacher", block, count=256)
    assert 1e-5 < relative_error(fast, want) < 4e-4 < (2 / 10240) ** 0.5 / 10


# ---- compilation ---------------------------------------------------------------------------------------------------


def _why_no_nvrtc() -> str:
    try:
        cuda_source.nvrtc_version()
    except ImportError as error:
        return str(error)
    return ""


needs_nvrtc = pytest.mark.skipif(bool(_why_no_nvrtc()), reason=f"NVRTC is not installed: {_why_no_nvrtc()}")


@needs_nvrtc
@pytest.mark.parametrize(
    ("kind", "precision", "architecture"),
    [
        *((kind, "fast", architecture) for kind in KINDS for architecture in ARCHITECTURES),
        ("rademacher", "exact", "sm_80"),
        ("rademacher", "exact", "sm_90a"),
        ("gaussian", "exact", "sm_90a"),
    ],
)
def test_the_source_compiles_without_a_gpu(kind, precision, architecture):
    variant = variant_for(kind, precision, 32, architecture == "sm_90a")
    report = io.StringIO()
    code = cuda_source.compile_source(cuda_source.source_of(variant), architecture, report)
    assert "Potential Performance Loss" not in report.getvalue(), "wgmma is serialised"
    spills = re.search(
        rf"entry function '{cuda_source.ENTRY}'.*?(\d+) bytes spill stores", report.getvalue(), re.DOTALL
    )
    assert spills[1] == "0"
    assert code[:4] == b"\x7fELF"
    for name in (cuda_source.ENTRY, *cuda_source.PACKS):
        assert name.encode() in code


@needs_nvrtc
def test_errors_of_the_compiler_are_shown():
    with pytest.raises(RuntimeError, match=r"NVRTC did not compile the projection for sm_90a: .*no storage class"):
        cuda_source.compile_source("nonsense;", "sm_90a")


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """How often the compiler was called, with a stand-in for it."""
    calls = []

    def compile_source(text, architecture):
        calls.append(architecture)
        return b"\x7fELF" + hashlib.sha256(text.encode()).digest()

    monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_source, "compile_source", compile_source)
    monkeypatch.setattr(cuda_source, "nvrtc_version", lambda: (13, 0))
    return calls


def test_code_is_compiled_once_and_read_from_the_cache(compiled):
    variant = variant_for("rademacher", "fast", 640, True)
    assert cuda_source.cubin(variant, "sm_90a") == cuda_source.cubin(variant, "sm_90a")
    assert compiled == ["sm_90a"]
    cuda_source.cubin(variant, "sm_80")
    cuda_source.cubin(variant_for("rademacher", "exact", 640, True), "sm_90a")
    assert len(compiled) == 3
    assert not [path for path in cuda_source.cache_folder().iterdir() if path.suffix != ".cubin"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:]])
def test_a_damaged_cache_is_compiled_again(compiled, damage):
    variant = variant_for("rademacher", "fast", 640, True)
    code = cuda_source.cubin(variant, "sm_90a")
    (path,) = cuda_source.cache_folder().iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert cuda_source.cubin(variant, "sm_90a") == code
    assert len(compiled) == 2


def test_the_cache_is_of_one_compiler_and_one_source(compiled, monkeypatch, tmp_path):
    variant = variant_for("rademacher", "fast", 640, True)
    cuda_source.cubin(variant, "sm_90a")
    monkeypatch.setattr(cuda_source, "nvrtc_version", lambda: (13, 1))
    cuda_source.cubin(variant, "sm_90a")
    changed = tmp_path / "src"
    shutil.copytree(cuda_source.FOLDER, changed)
    (changed / "fold.cuh").write_text((changed / "fold.cuh").read_text() + "\n")
    monkeypatch.setattr(cuda_source, "FOLDER", changed)
    cuda_source.cubin(variant, "sm_90a")
    assert len(compiled) == 3


def test_a_cache_that_cannot_be_written_costs_time_only(compiled, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path / "file" / "cache"))
    variant = variant_for("rademacher", "fast", 640, True)
    assert cuda_source.cubin(variant, "sm_90a") == cuda_source.cubin(variant, "sm_90a")
    assert len(compiled) == 2


def test_wgmma_names_every_accumulator_once():
    text = cuda_source.source_of(variant_for("gaussian", "fast", 256, True))
    assert all(text.count(f'"+f"(sum[{i}])') == 1 for i in range(128))
    assert "m64n256k16" in text
    assert "%127}, {%128, %129, %130, %131}, %132, add" in text
