"""Commands run in this process, and a project to run them on."""

from __future__ import annotations

import os
import signal
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import gradstore_cli
import pytest

PROJECT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import gradstore as gs

def project(seed: int = 0, n: int = 48, label: str = "cat"):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 1, 6, 6, generator=g), torch.arange(n) % 3
    return gs.Project(
        model=nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
        splits={"train": TensorDataset(x, y), "test": TensorDataset(x[:10] + 0.1, y[:10])},
        classes=[label, "dog", "bird"], show=gs.image(), poisoned={"train": [0, 3, 6, 9], "test": [0, 3]},
    )
"""


class Result:
    """Exit status and output of one command."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


def run(folder: Path, *words: str) -> Result:
    """Run a command in this process, in `folder`."""
    out, err = StringIO(), StringIO()
    handler, before = signal.getsignal(signal.SIGTERM), Path.cwd()
    os.chdir(folder)
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
            gradstore_cli.main(" ".join(words).split())
    finally:
        signal.signal(signal.SIGTERM, handler)
        os.chdir(before)
    return Result(int(stop.value.code or 0), out.getvalue(), err.getvalue())
