"""The memory budget of a fit on features is kept under a hard limit of the system."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hard_limit import needs_hard_limit, run_limited
from synthetic import clustered, write_store

import gradstore as gs

N, C, K = 4000, 4, 1500
BUDGET, SLACK = 40_000_000, 4_000_000

WARM_UP = """
store, small = gs.open(first), gs.open(second)
gs.KernelGLM(memory=budget).fit(small)
for dtype in (torch.float32, torch.float64):
    torch.linalg.eigh(torch.eye(300, dtype=dtype) @ torch.eye(300, dtype=dtype))  # and their threads
np.linalg.eigh(np.eye(300) @ np.eye(300))
"""
WORK = """
model = gs.KernelGLM(memory=budget).fit(store)
print(json.dumps([model.converged_, model.loss_]))
"""


@needs_hard_limit
def test_a_fit_on_features_fits_a_hard_limit(tmp_path: Path) -> None:
    """Features are 96 MB in float32; all the directions that there could be would take 30 MB, three quarters of all."""
    store = write_store(tmp_path / "store", clustered(N, C, K), dtype="float32", shard_rows=500)
    small = write_store(tmp_path / "small", clustered(40, C, 64), dtype="float32")
    assert store.nbytes > 1.9 * (BUDGET + SLACK)
    converged, loss = run_limited(WARM_UP, WORK, store.path, small.path, budget=BUDGET, slack=SLACK)
    assert converged
    np.testing.assert_allclose(loss, gs.KernelGLM(memory="2GB").fit(store).loss_, atol=1e-9)
