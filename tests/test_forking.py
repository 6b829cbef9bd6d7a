"""What the fault tests fork does not outlive them, nor keep them from ending."""

from __future__ import annotations

import os
import time
from pathlib import Path

import forking
import pytest
from forking import Forks


def test_a_job_that_would_go_on_ends_with_its_server(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a test fails before it lets its jobs go on."""
    monkeypatch.setattr(forking, "PATIENCE", 0.2)
    said = fast / "said"
    with Forks() as forks:
        (pid,) = forks.start({"job": "hold", "path": str(fast / "store"), "said": str(said), "locks": True})
        while not said.exists():
            time.sleep(0.002)
        os.kill(pid, 0)
    for _ in range(1000):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.002)
    pytest.fail("the job goes on")
