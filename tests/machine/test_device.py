"""How much memory a device gives by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gradstore.errors import UsageError
from gradstore.machine.devices import memory_of

GPU = torch.device("cuda")


def test_by_itself_a_gpu_gives_three_quarters_of_what_the_model_leaves(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 10**9))
    assert memory_of("auto", GPU) == 60 * 10**9
    assert memory_of("auto", GPU, 20 * 10**9) == 45 * 10**9
    assert memory_of("auto", GPU, 90 * 10**9) == 0
    assert memory_of("auto", torch.device("cpu"), 20 * 10**9) == 2 * 10**9
    assert memory_of("3GB", GPU) == memory_of(3 * 10**9, torch.device("cpu")) == 3 * 10**9
    with pytest.raises(UsageError, match="not a number of bytes"):
        memory_of("automatic", GPU)
