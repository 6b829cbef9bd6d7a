"""Which paths a card could have, and how kernels are launched on it; with stand-ins for torch and the driver."""

from __future__ import annotations

import ctypes
import enum
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch

from gradstore.errors import UsageError
from gradstore.projection import Projection, cuda
from gradstore.projection.cuda import cuda_source, driver, sparse_driver
from gradstore.projection.cuda.driver import Job
from gradstore.projection.cuda.geometry import variant_for
from gradstore.projection.cuda.sparse_driver import SumsDevice
from gradstore.projection.cuda.sparse_product import accumulate_sums
from gradstore.projection.device_paths import PATHS
from gradstore.projection.entries import Entries

CODE = enum.IntEnum("CUresult", {"CUDA_SUCCESS": 0, "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE": 720})
VARIANT = variant_for("rademacher", "fast", 640, True)


class Stream:
    """Stands for a stream; writes down what is asked of it."""

    cuda_stream = 7

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits until {event}")

    def record_event(self) -> str:
        return f"{self.name} did {self.log[-1]}"


@pytest.fixture
def card(monkeypatch):
    """A card that is not there."""
    found = SimpleNamespace(capability=(9, 0), shared_bytes=227 << 10, log=[], inside=[])
    main, side = Stream("main", found.log), Stream("side", found.log)
    found.inside.append(main)

    class Inside:
        def __init__(self, stream: Stream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            found.inside.append(self.stream)

        def __exit__(self, *_: object) -> None:
            found.inside.pop()

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: found.capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: found.inside[-1])
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: side)
    monkeypatch.setattr(torch.cuda, "stream", Inside)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, pin_memory=False, **given: zeros(*shape, **given))
    return found


@pytest.fixture
def calls(card, monkeypatch):
    """A driver that is not there; what it was asked."""
    made = []

    def answers(name, *values):
        return lambda *given: (made.append((name, given)), (CODE(0), *values))[1]

    fake = SimpleNamespace(
        cuCtxGetCurrent=answers("cuCtxGetCurrent", 1),
        cuModuleLoadData=answers("cuModuleLoadData", "module"),
        cuModuleGetFunction=lambda module, name: (CODE(0), name.decode()),
        cuFuncSetAttribute=answers("cuFuncSetAttribute"),
        cuOccupancyMaxActiveBlocksPerMultiprocessor=answers("occupancy", 2),
        cuDeviceGet=answers("cuDeviceGet", 0),
        cuDeviceGetAttribute=lambda attribute, number: (CODE(0), card.shared_bytes),
        cuLaunchKernel=answers("cuLaunchKernel"),
        cuLaunchCooperativeKernel=answers("cuLaunchCooperativeKernel"),
        CUdevice_attribute=SimpleNamespace(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN=97),
        CUfunction_attribute=SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8),
    )
    bindings = ModuleType("cuda.bindings")
    bindings.driver = fake
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(cuda_source, "cubin", lambda variant, architecture: b"\x7fELF")
    return made


@pytest.mark.parametrize(
    ("capability", "signs", "normals", "sparse"),
    [
        ((9, 0), ["wgmma", "mma", "triton"], ["wgmma", "mma"], ["sums"]),
        ((8, 0), ["mma", "triton"], ["mma"], ["sums"]),
        ((8, 9), ["mma", "triton"], ["mma"], ["sums"]),
        ((12, 0), ["mma", "triton"], ["mma"], ["sums"]),
        ((7, 5), [], [], []),
    ],
)
def test_what_a_card_could_have(card, capability, signs, normals, sparse):
    card.capability = capability
    assert [path.name for path in PATHS if path.suits(0, "rademacher")] == signs
    assert [path.name for path in PATHS if path.suits(0, "gaussian")] == normals
    assert [path.name for path in PATHS if path.suits(0, "sjlt")] == sparse


def test_a_card_of_another_maker_is_left_to_triton(card, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert [path.name for path in PATHS if path.suits(0, "rademacher")] == ["triton"]
    assert not [path.name for path in PATHS if path.suits(0, "sjlt")]


def test_what_is_missing_is_named_with_how_to_get_it(monkeypatch):
    def missing():
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(driver.cuda_source, "nvrtc_version", missing)
    wanted = "the compiler NVRTC cannot be used (No module named 'cuda'); pip install 'gradstore[cuda]'"
    assert {path.missing(0) for path in PATHS if path.name != "triton"} == {wanted}


@pytest.mark.parametrize("broken", ["", "raise RuntimeError('no driver')", "__version__ = None"])
def test_a_triton_that_cannot_be_imported_is_missing(tmp_path, broken):
    """None at all, one that fails, and a folder of that name."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(broken)
    code = "from gradstore.projection.device_paths import PATHS; print(PATHS[-1].missing(0))"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, done.stderr
    assert re.match(r"Triton cannot be imported \(.*\); pip install triton", done.stdout)


def test_every_variant_is_proved(card):
    for kind in ("rademacher", "gaussian"):
        for precision in cuda.PRECISIONS:
            tiles = PATHS[0].rows(kind, precision)
            assert {variant_for(kind, precision, rows, True).rows for rows in range(1, 2000)} == set(tiles)


def test_verdicts_depend_on_the_source_and_its_compiler(card, monkeypatch):
    monkeypatch.setattr("gradstore.projection.cuda.nvrtc_version", lambda: (13, 0))
    assert PATHS[0].versions() == {"nvrtc": "13.0"}
    names = {path.name for path in PATHS[0].sources()}
    assert names >= {"wgmma.cuh", "mma.cuh", "project.cu", "geometry.py", "driver.py", "cuda_source.py"}
    assert names >= {"fused_product.py", "sums.cu", "sparse_product.py"}
    assert (PATHS[2].name, PATHS[2].versions(), PATHS[2].sources()) == ("sums", PATHS[0].versions(), PATHS[0].sources())
    assert {path.name for path in PATHS[-1].sources()} == {"by_triton.py", "triton_kernels.py"}


@pytest.mark.parametrize(
    ("capability", "architecture"), [((9, 0), "sm_90a"), ((8, 0), "sm_80"), ((8, 9), "sm_89"), ((12, 0), "sm_120")]
)
def test_architectures(card, capability, architecture):
    card.capability = capability
    assert driver.CudaDevice(0, hopper=False).architecture == architecture


def test_blocks_that_wait_for_one_another_are_launched_together(card, calls):
    device = driver.CudaDevice(0, hopper=True)
    assert device.resident(VARIANT) == 2 * 132
    job = Job()
    device.multiply(VARIANT, job, 100)
    name, given = calls[-1]
    assert name == "cuLaunchCooperativeKernel"
    assert given[:9] == (cuda_source.ENTRY, 100, 1, 1, 384, 1, 1, VARIANT.shared_bytes, 7)
    assert job.trouble == device.trouble.data_ptr()


@pytest.mark.parametrize(("kilobytes", "rows", "tiles"), [(227, 32, 3), (99, 16, 5)])
def test_sums_are_launched_for_the_shared_memory_that_there_is(card, calls, kilobytes, rows, tiles):
    card.shared_bytes = kilobytes << 10
    device, out = SumsDevice(0), torch.zeros(70, 2000)
    accumulate_sums(device, Entries("sjlt", 0, 0), out, torch.ones(70, 5000, dtype=torch.bfloat16), 4000, 1000, "fast")
    launches = [given for name, given in calls if name == "cuLaunchKernel"]
    assert [given[:9] for given in launches] == [
        ("pack_bfloat16", tiles, 3, 1, 256, 1, 1, 0, 7),
        (cuda_source.ENTRY, 3, tiles, 1, 512, 1, 1, 4096 * rows, 7),
    ]
    assert [given for name, given in calls if name == "cuFuncSetAttribute"] == [(cuda_source.ENTRY, 8, 4096 * rows)]


def test_a_device_keeps_what_was_loaded_on_it(card, calls, monkeypatch):
    monkeypatch.setattr(sparse_driver, "_devices", {})
    assert cuda.sums_device(1) is cuda.sums_device(1) is not cuda.sums_device(0)
    for _ in range(2):
        device = cuda.sums_device(0)
        accumulate_sums(device, Entries("sjlt", 0, 0), torch.zeros(1, 10), torch.ones(1, 10), 0, 0, "fast")
    assert [name for name, _ in calls].count("cuModuleLoadData") == 1


def test_an_error_of_the_driver_names_call_and_code(card, calls, monkeypatch):
    fake = sys.modules["cuda.bindings"].driver
    too_large = (CODE["CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"],)
    monkeypatch.setattr(fake, "cuLaunchCooperativeKernel", lambda *_: too_large)
    text = "launching the projection failed: CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"
    with pytest.raises(RuntimeError, match=text):
        driver.CudaDevice(0, hopper=True).multiply(VARIANT, Job(), 10**6)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, ""),
        (1, "gradients"),
        (2, "room for gradients"),
        (3, "its turn to add to the output"),
        (9, "something unknown, code 9"),
    ],
)
def test_why_a_product_gave_up(card, code, text):
    device = driver.CudaDevice(0, hopper=True)
    ctypes.c_uint32.from_address(device.trouble.data_ptr()).value = code  # as the card writes it
    assert device.gave_up() == text
    header = (cuda_source.FOLDER / "waiting.cuh").read_text()
    assert "GAVE_UP_GRADIENTS = 1, GAVE_UP_ROOM = 2, GAVE_UP_TURN = 3" in header


def test_gradients_are_packed_beside_the_product_of_those_before(card):
    lanes, log = driver.StreamLanes(0), card.log
    for number in range(3):
        with lanes.packing(number % 2):
            log.append(f"{card.inside[-1].name}: pack {number}")
        with lanes.multiplying(number % 2):
            log.append(f"{card.inside[-1].name}: multiply {number}")
    lanes.join()
    assert log == [
        "side waits for main",
        "side: pack 0",
        "main waits until side did side: pack 0",
        "main: multiply 0",
        "side: pack 1",
        "main waits until side did side: pack 1",
        "main: multiply 1",
        "side waits until main did main: multiply 0",  # whose slot is filled again
        "side: pack 2",
        "main waits until side did side: pack 2",
        "main: multiply 2",
        "main waits for side",
    ]


def test_both_streams_are_joined_when_a_launch_fails(card):
    device = driver.CudaDevice(0, hopper=True)
    with pytest.raises(RuntimeError, match="out of memory"), device.lanes():
        raise RuntimeError("out of memory")
    assert card.log == ["side waits for main", "main waits for side"]


def test_the_cpu_and_the_reference_need_no_card():
    assert Projection(backend="cuda").path(torch.device("cpu")) == "reference"
    assert Projection(backend="reference").path(torch.device("cuda:0")) == "reference"


def test_an_unknown_precision_is_refused():
    with pytest.raises(UsageError) as caught:
        Projection(precision="half")
    assert str(caught.value) == "precision: unknown precision (expected one of fast, exact, got 'half')."


def test_rows_of_p_end_where_those_of_the_sparse_kind_will_begin():
    assert Projection(dim=2**31).dim == 2**31
    with pytest.raises(UsageError, match=r"dim: bad dim \(expected an integer in \[1, 2147483649\), got 2147483650\)"):
        Projection(dim=2**31 + 2)
