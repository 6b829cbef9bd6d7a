"""The memory budget of a Gram matrix is kept under a hard limit of the system."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
from synthetic import write_store

from gradstore.kernels.gram_matrix import open_gram


def test_features_ten_times_larger_than_memory(tmp_path: Path) -> None:
    """The process may take 8 MB beyond what it has when it starts; the features are 80 MB."""
    n, c, K = 3350, 2, 3000
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((8, c * K)).astype(np.float32)
    features = (rng.standard_normal((n, 8)).astype(np.float32) @ basis).reshape(n, c, K)
    store = write_store(tmp_path / "store", features, dtype="float32")
    assert store.nbytes >= 80e6
    code = f"""
        import resource, threading, numpy as np, torch, gradstore as gs
        torch.set_num_threads(1)
        threading.stack_size(1 << 20)  # the limit counts the whole of every stack
        store = gs.open({str(store.path)!r})
        next(gs.gram(store, memory="4MB"))  # libraries take what they need
        taken = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
        limit = taken + 8_000_000
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            np.ones(20_000_000, np.uint8)
        except MemoryError:
            print("limited")
        gs.gram(store, out={str(tmp_path / "gram.h5")!r}, memory="4MB")
    """
    exact = {"MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_ARENA_MAX": "1"}  # what is freed goes back at once
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | exact)
    assert (done.stdout, done.returncode) == ("limited\n", 0), done.stderr
    flat = features.reshape(n, -1).astype(np.float64)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(open_gram(tmp_path / "gram.h5")[:], flat @ flat.T, atol=5e-6)
