"""The memory budget of a fit on features is kept under a hard limit of the system."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic import clustered, write_store

import gradstore as gs

N, C, K = 4000, 4, 1500
BUDGET, SLACK = 40_000_000, 4_000_000

SCRIPT = """
import json, re, resource, sys, threading, warnings
import numpy as np, torch
import gradstore as gs
torch.set_num_threads(2)
threading.stack_size(1 << 20)  # the system counts stacks, used or not, as data
store, small = gs.open(sys.argv[1]), gs.open(sys.argv[2])
budget, slack = int(sys.argv[3]), int(sys.argv[4])
gs.KernelGLM(memory=budget).fit(small)  # libraries take what they need
for dtype in (torch.float32, torch.float64):
    torch.linalg.eigh(torch.eye(300, dtype=dtype) @ torch.eye(300, dtype=dtype))  # and their threads
np.linalg.eigh(np.eye(300) @ np.eye(300))
used = int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + budget + slack,) * 2)
try:
    np.ones(budget + 2 * slack, np.uint8)
except MemoryError:
    print("limited")
model = gs.KernelGLM(memory=budget).fit(store)
print(json.dumps([model.converged_, model.loss_]))
"""


@pytest.mark.skipif(
    not hasattr(resource, "RLIMIT_DATA") or sys.platform != "linux", reason="RLIMIT_DATA counts on Linux"
)
def test_a_fit_on_features_fits_a_hard_limit(tmp_path: Path) -> None:
    """Features are 96 MB in float32; all the directions that there could be would take 30 MB, three quarters of all."""
    store = write_store(tmp_path / "store", clustered(N, C, K), dtype="float32", shard_rows=500)
    small = write_store(tmp_path / "small", clustered(40, C, 64), dtype="float32")
    assert store.nbytes > 1.9 * (BUDGET + SLACK)
    exact = {"MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_ARENA_MAX": "1"}  # what is freed goes back at once
    command = [sys.executable, "-c", SCRIPT, *map(str, (store.path, small.path, BUDGET, SLACK))]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | exact)
    assert done.returncode == 0, done.stderr
    limited, found = done.stdout.splitlines()
    assert limited == "limited"
    converged, loss = json.loads(found)
    assert converged
    np.testing.assert_allclose(loss, gs.KernelGLM(memory="2GB").fit(store).loss_, atol=1e-9)
