"""Exact kernels keep their byte budget whatever the network: peak resident memory of a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

CHILD = """
    import sys, torch, gradstore as gs
    from torch.utils.data import TensorDataset
    from test_exact_memory import NETWORKS

    def status(name):
        return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1]) * 1024

    torch.manual_seed(0)
    torch.set_num_threads(2)
    (model, inputs), memory = NETWORKS[sys.argv[1]](), int(sys.argv[2]) * 10**6
    data = TensorDataset(inputs, torch.zeros(len(inputs)).long())
    project = gs.Project(model=model.eval(), splits={"train": data})
    gs.exact_gram(project, rows_a=range(40), memory=memory)  # libraries take what they need
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    found = gs.exact_gram(project, memory=memory)
    print(status("VmHWM") - before - found.nbytes)
"""

Network = tuple[nn.Module, Tensor]


class _Tied(nn.Module):
    """One weight that is used twice, so that its blocks have no structure."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(32, 256), nn.Linear(256, 256), nn.Linear(256, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).relu()
        return self.last(self.twice(self.twice(hidden).relu()).relu())


class _Text(nn.Module):
    """Token embeddings and a transformer's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(2000, 64), nn.Linear(64, 4)
        self.layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.layer(self.embedding(tokens)).mean(1))


def _wide() -> Network:
    layers = (nn.Linear(32, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))
    return nn.Sequential(*layers), torch.randn(300, 32)


def _one_piece() -> Network:
    """A wide weight that comes in one block, whose deltas are most of what is held."""
    return nn.Sequential(nn.Linear(16, 4096), nn.ReLU(), nn.Linear(4096, 10)), torch.randn(300, 16)


def _many() -> Network:
    return nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 10)), torch.randn(2000, 64)


def _convolution() -> Network:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), *_pooled(4, 512)), torch.randn(300, 3, 32, 32)


def _batch_norm() -> Network:
    layers = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32))
    return nn.Sequential(*layers, nn.ReLU(), *_pooled(4, 512)), torch.randn(300, 3, 24, 24)


def _grouped() -> Network:
    layers = (nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 128, 3, groups=4, padding=1))
    return nn.Sequential(*layers, nn.ReLU(), *_pooled(2, 512)), torch.randn(128, 3, 16, 16)


def _depthwise() -> Network:
    layers = (nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32, padding=1))
    return nn.Sequential(*layers, nn.Conv2d(32, 64, 1), nn.ReLU(), *_pooled(2, 256)), torch.randn(300, 3, 16, 16)


def _pooled(side: int, width: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(width, 10)


needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as Linux reports it")
NETWORKS: dict[str, Callable[[], Network]] = {
    "wide": _wide,
    "one-piece": _one_piece,
    "many": _many,
    "convolution": _convolution,
    "batch-norm": _batch_norm,
    "grouped": _grouped,
    "depthwise": _depthwise,
    "tied": lambda: (_Tied(), torch.randn(300, 32)),
    "text": lambda: (_Text(), torch.randint(0, 2000, (300, 24))),
}


def taken(network: str, megabytes: int) -> float:
    """Megabytes that the kernel takes at its peak, beside its result."""
    command = [sys.executable, "-c", textwrap.dedent(CHILD), network, str(megabytes)]
    # A command that another test ran in this process has switched on torch's huge pages, which take memory otherwise.
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    folder = Path(__file__).parent
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env=environment)
    return int(done.stdout) / 1e6


@needs_linux
@pytest.mark.parametrize("network", NETWORKS)
def test_any_network_keeps_the_budget(network: str) -> None:
    assert taken(network, 256) < 256


@needs_linux
def test_with_a_larger_budget_more_is_taken() -> None:
    """So the budget above is what holds it back, and the peak is seen."""
    assert taken("convolution", 2000) > 256
