"""Fixtures of the fault tests: how many faults to inject, and where their counts go."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Threads that wait for work sleep, instead of asking for it again and again: two processes share the cores in CI, and
# each would keep the other's threads from the work that is waited for. Read once, when they are imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # the same for NumPy's: 2**4 cycles, the least

import pytest
import torch

Record = Callable[..., None]

# Without a GPU, Triton's kernels run in its interpreter, which is chosen when a test first imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would the commands that they interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def amount(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """amount(in_ci, by_hand): the second under `make soak`, which runs `pytest -m soak`.

    GRADSTORE_SOAK_SHARE=0.1 is a tenth of it, for a machine that has less time.
    """
    by_hand = request.config.getoption("-m") == "soak"
    share = float(os.environ.get("GRADSTORE_SOAK_SHARE", "1"))
    return lambda few, many: max(few, round(many * share)) if by_hand else few


@pytest.fixture
def fast() -> Iterator[Path]:
    """A folder in memory where there is one: runs by the thousand need no medium."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder, and with it a user key, of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("GRADSTORE_CACHE", str(folder))
        yield folder


@pytest.fixture
def record() -> Record:
    """record(fault, what, ...counts): one row for `python -m benchmarks.faults`, which names the file to write to."""

    def write(fault: str, what: str, *, injected: int, recovered: int, refused: int, silent: int, control: str) -> None:
        assert silent == 0
        assert recovered + refused == injected
        row = {"fault": fault, "what": what, "injected": injected, "recovered": recovered, "refused": refused}
        path = os.environ.get("GRADSTORE_FAULT_COUNTS")
        if path:
            with Path(path).open("a") as file:
                file.write(json.dumps({**row, "silently wrong": silent, "control": control}) + "\n")

    return write
