"""The memory budget of many attributions is kept under a hard limit of the system."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic import clustered, dense_similarity, write_store

import gradstore as gs

N, M, C, K = 3000, 150, 2, 3000
BUDGET, SLACK = 8_000_000, 8_000_000

SCRIPT = """
import json, re, resource, sys, threading
import numpy as np, torch
import gradstore as gs
torch.set_num_threads(2)
threading.stack_size(1 << 20)  # the system counts stacks, used or not, as data
model, queries = gs.KernelGLM.load(sys.argv[1]), gs.open(sys.argv[2])
budget, slack = int(sys.argv[3]), int(sys.argv[4])
next(gs.attributions(model, queries, [0]))  # libraries take what they need
used = int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + budget + slack,) * 2)
try:
    np.ones(budget + 2 * slack, np.uint8)
except MemoryError:
    print("limited")
model.set_params(memory=budget)
rows = np.concatenate([found.similarity[:3] for found in gs.attributions(model, queries)])
print(json.dumps(rows.tolist()))
"""


@pytest.mark.skipif(
    not hasattr(resource, "RLIMIT_DATA") or sys.platform != "linux", reason="RLIMIT_DATA counts on Linux"
)
def test_many_queries_fit_a_hard_limit(tmp_path: Path) -> None:
    """Features are 72 MB, and what all queries take 7 MB, which is more than their half of the budget."""
    train = write_store(tmp_path / "train", clustered(N, C, K), dtype="float32", shard_rows=500)
    queries = write_store(tmp_path / "test", clustered(M, C, K, seed=1), dtype="float32")
    assert train.nbytes > 4 * (BUDGET + SLACK)
    path = gs.KernelGLM(alpha=1e-1, tolerance=1e-1).fit(train).save(tmp_path / "s")
    exact = {"MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_ARENA_MAX": "1"}  # what is freed goes back at once
    arguments = map(str, (path, queries.path, BUDGET, SLACK))
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | exact)
    assert done.returncode == 0, done.stderr
    limited, found = done.stdout.splitlines()
    assert limited == "limited"
    dense = dense_similarity(train, queries, "proj-trntk")
    np.testing.assert_allclose(np.reshape(json.loads(found), (M, 3)), dense[:, :3], atol=1e-12)
