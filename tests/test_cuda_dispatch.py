"""Which path a tensor takes, and what is said where the fused kernels cannot be used; with stand-ins for the driver."""

from __future__ import annotations

import enum
from types import SimpleNamespace

import pytest
import torch

from gradstore.errors import UsageError
from gradstore.projection import Projection, cuda
from gradstore.projection.cuda import driver, source
from gradstore.projection.cuda.geometry import variant_for

GPU = torch.device("cuda:0")


@pytest.fixture
def card(monkeypatch):
    """A card that is not there."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (properties.major, properties.minor))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Card")
    monkeypatch.setattr(source, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(source, "cuda_core", lambda: None)
    cuda.usable.cache_clear()
    yield properties
    cuda.usable.cache_clear()


@pytest.mark.parametrize("precision", cuda.PRECISIONS)
@pytest.mark.parametrize("backend", ["auto", "native", "cuda"])
def test_tensors_on_a_card_take_the_fused_kernels(card, backend, precision):
    assert Projection(backend=backend, precision=precision).path(GPU) == f"cuda {precision}"


def test_the_reference_is_used_where_it_is_asked_for(card):
    assert Projection(backend="reference").path(GPU) == "reference"
    assert Projection(backend="cuda").path(torch.device("cpu")) == "reference"


@pytest.mark.parametrize(
    ("major", "minor", "architecture"), [(9, 0, "sm_90a"), (8, 0, "sm_80"), (8, 9, "sm_89"), (12, 0, "sm_120")]
)
def test_architectures(card, major, minor, architecture):
    card.major, card.minor = major, minor
    device = driver.CudaDevice(0)
    assert device.architecture == architecture
    assert device.hopper == (architecture == "sm_90a")


def test_an_old_card_falls_back_and_says_so_once(card):
    card.major, card.minor = 7, 5
    text = "slow reference on the GPU: Some Card is older than compute capability 8.0"
    with pytest.warns(RuntimeWarning, match=text):
        assert Projection().path(GPU) == "reference"
    assert Projection().path(GPU) == "reference"  # a second warning would be an error


def test_a_missing_package_falls_back_and_says_how_to_get_it(card, monkeypatch):
    def missing():
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(source, "nvrtc_version", missing)
    with pytest.warns(RuntimeWarning, match=r"No module named 'cuda'\); pip install 'gradstore\[cuda\]'"):
        assert Projection().path(GPU) == "reference"


def test_an_unknown_precision_is_refused():
    with pytest.raises(UsageError) as caught:
        Projection(precision="half")
    assert str(caught.value) == "precision: unknown precision (expected one of fast, exact, got 'half')."


def test_source_that_does_not_compile_is_an_error_not_a_fallback(card, monkeypatch):
    pytest.importorskip("cuda.bindings.driver")

    def fails(*_):
        raise RuntimeError("NVRTC did not compile the projection for sm_90a: line 1")

    monkeypatch.setattr(source, "cubin", fails)
    with pytest.raises(UsageError, match=r"sm_90a: the fused projection does not compile .*line 1") as caught:
        driver.CudaDevice(0)._kernels(variant_for("rademacher", "fast", 1, True))
    assert 'choose backend="reference"' in str(caught.value)


def test_every_driver_call_is_checked():
    code = enum.IntEnum("CUresult", {"CUDA_SUCCESS": 0, "CUDA_ERROR_LAUNCH_FAILED": 719})
    assert driver._check((code(0), 5), "loading") == (5,)
    with pytest.raises(RuntimeError, match="launching failed: CUDA_ERROR_LAUNCH_FAILED"):
        driver._check((code(719),), "launching")
