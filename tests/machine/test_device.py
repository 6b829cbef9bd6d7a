"""Float32 products on a GPU are float32, whatever the user has set, and by whichever of torch's two names."""

from __future__ import annotations

import pytest
import torch

from gradstore.machine.devices import full_float32

MATMUL = torch.backends.cuda.matmul
GPU = torch.device("cuda")
NEW = hasattr(MATMUL, "fp32_precision")


def state() -> tuple[object, object]:
    """Of the newer name, and of the older, which cannot always be read."""
    try:
        older = MATMUL.allow_tf32
    except RuntimeError:
        older = "cannot be read"
    return (MATMUL.fp32_precision if NEW else None), older


@pytest.fixture(autouse=True)
def as_it_was():
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


SETTINGS = [
    lambda: setattr(MATMUL, "allow_tf32", True),
    lambda: setattr(MATMUL, "allow_tf32", False),
    lambda: torch.set_float32_matmul_precision("high"),
    *((lambda p=precision: setattr(MATMUL, "fp32_precision", p)) for precision in ("tf32", "ieee", "none") if NEW),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_the_user_set_is_put_aside_and_back(setting):
    setting()
    before = state()
    with full_float32(GPU):
        assert MATMUL.allow_tf32 is False, "torch takes no product while its two settings disagree"
        assert not NEW or MATMUL.fp32_precision == "ieee"
    assert state() == before


def test_it_is_put_back_after_an_error():
    MATMUL.allow_tf32 = True

    def fail():
        with full_float32(GPU):
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert MATMUL.allow_tf32


def test_a_cpu_has_nothing_to_set():
    MATMUL.allow_tf32 = True
    with full_float32(torch.device("cpu")):
        assert MATMUL.allow_tf32
