"""Float32 products on a GPU are float32, whatever the user has set, and by whichever of torch's names."""

from __future__ import annotations

import pytest
import torch

from gradstore.device import full_float32

MATMUL = torch.backends.cuda.matmul
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def as_it_was():
    name = "fp32_precision" if hasattr(MATMUL, "fp32_precision") else "allow_tf32"
    before = getattr(MATMUL, name)
    yield
    setattr(MATMUL, name, before)


@pytest.mark.parametrize("allowed", [True, False])
def test_the_old_setting_is_put_aside_and_back(allowed):
    MATMUL.allow_tf32 = allowed
    with full_float32(GPU):
        assert not MATMUL.allow_tf32
    assert MATMUL.allow_tf32 == allowed


@pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="this torch has the old setting only")
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_the_new_setting_is_put_aside_and_back_after_an_error(precision):
    MATMUL.fp32_precision = precision
    with pytest.raises(ValueError, match="inside"), full_float32(GPU):
        assert MATMUL.fp32_precision == "ieee"
        raise ValueError("inside")
    assert MATMUL.fp32_precision == precision


def test_a_cpu_has_nothing_to_set():
    MATMUL.allow_tf32 = True
    with full_float32(torch.device("cpu")):
        assert MATMUL.allow_tf32
