"""Work under a memory limit of the system: what goes beyond it fails, and not only on paper."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

needs_hard_limit = pytest.mark.skipif(
    not hasattr(resource, "RLIMIT_DATA") or sys.platform != "linux", reason="RLIMIT_DATA counts on Linux"
)
_BEFORE = """
import json, re, resource, sys, threading
import numpy as np, torch
import gradstore as gs
torch.set_num_threads(2)
threading.stack_size(1 << 20)  # the system counts stacks, used or not, as data
budget, slack = int(sys.argv[1]), int(sys.argv[2])
first, second = sys.argv[3:]
"""
_LIMIT = """
used = int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + budget + slack,) * 2)
try:
    np.ones(budget + 2 * slack, np.uint8)
except MemoryError:
    print("limited")
"""


def run_limited(warm_up: str, work: str, first: Path, second: Path, *, budget: int, slack: int) -> Any:
    """Run `warm_up`, in which libraries take what they need, and then `work` with so many bytes more.

    Both are Python with `gs`, `np`, `torch`, `json`, `budget` and the two paths, `first` and `second`.

    Returns:
        The JSON that `work` prints.
    """
    exact = {"MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_ARENA_MAX": "1"}  # what is freed goes back at once
    script = _BEFORE + warm_up + _LIMIT + work
    command = [sys.executable, "-c", script, str(budget), str(slack), str(first), str(second)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | exact)
    assert done.returncode == 0, done.stderr
    limited, found = done.stdout.splitlines()
    assert limited == "limited"
    return json.loads(found)
