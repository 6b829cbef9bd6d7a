"""The memory budget of many attributions is kept under a hard limit of the system."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hard_limit import needs_hard_limit, run_limited
from synthetic import clustered, dense_similarity, write_store

import gradstore as gs

N, M, C, K = 3000, 150, 2, 3000
BUDGET, SLACK = 8_000_000, 8_000_000

WARM_UP = """
model, queries = gs.KernelGLM.load(first), gs.open(second)
next(gs.attributions(model, queries, [0]))
"""
WORK = """
model.set_params(memory=budget)
rows = np.concatenate([found.similarity[:3] for found in gs.attributions(model, queries)])
print(json.dumps(rows.tolist()))
"""


@needs_hard_limit
def test_many_queries_fit_a_hard_limit(tmp_path: Path) -> None:
    """Features are 72 MB, and what all queries take 7 MB, which is more than their half of the budget."""
    train = write_store(tmp_path / "train", clustered(N, C, K), dtype="float32", shard_rows=500)
    queries = write_store(tmp_path / "test", clustered(M, C, K, seed=1), dtype="float32")
    assert train.nbytes > 4 * (BUDGET + SLACK)
    path = gs.KernelGLM(alpha=1e-1, tolerance=1e-1).fit(train).save(tmp_path / "s")
    found = run_limited(WARM_UP, WORK, path, queries.path, budget=BUDGET, slack=SLACK)
    dense = dense_similarity(train, queries, "proj-trntk")
    np.testing.assert_allclose(np.reshape(found, (M, 3)), dense[:, :3], atol=1e-12)
