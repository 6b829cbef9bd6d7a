"""Large stores with the structure of real features, written a block at a time.

Each row is Σ_j a_j v_j + noise, with fixed random directions v_j, coefficients a_j = (cluster centre + spread) ·
j^-decay, and white noise that holds `rest` of the squared norm.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.encoding import encode
from gradstore.store.files.manifest import Manifest
from gradstore.store.identity import fingerprint_of
from gradstore.store.schema import Schema
from gradstore.store.store_writer import open_writer

CLUSTERS = 60
DECAY = 0.7
BLOCK = 250


def write_structured(
    path: Path, n: int, c: int, K: int, *, seed: int, rank: int = 300, rest: float = 0.01
) -> FeatureStore:
    """A store of n rows, reused if it is there; stores of one (c, K, rank) share directions and clusters."""
    if (path / "store.json").exists():
        return FeatureStore(path)
    identity = {
        "projection": {"kind": "rademacher", "K": K, "seed": 0, "version": 1},
        "parameters": {"count": 1, "blocks": [["structured", [1]]]},
        "layout": "per-class",
        "dtype": "float16",
        "classes": c,
        "data": {"length": n},
    }
    row_bytes = 2 * c * K
    shard = max(BLOCK, (256 << 20) // row_bytes // BLOCK * BLOCK)
    schema, names = Schema(c=c, K=K, classes=c), tuple(str(i) for i in range(c))
    manifest = Manifest(identity, fingerprint_of(identity), schema, n, shard, 1, path.name, names)
    fixed, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(seed)
    directions = torch.randn(rank, c * K, generator=fixed) / (c * K) ** 0.5
    spectrum = torch.arange(1, rank + 1) ** -DECAY
    centres = torch.randn(CLUSTERS, rank, generator=fixed)
    with open_writer(path, manifest) as writer:
        for index in writer.manifest.missing:
            rows = writer.manifest.rows_of(index)
            with writer.shard(index) as out:
                for start in range(rows.start, rows.stop, BLOCK):
                    count = min(BLOCK, rows.stop - start)
                    chosen = centres[torch.randint(0, CLUSTERS, (count,), generator=own)]
                    signal = (chosen + 0.5 * torch.randn(count, rank, generator=own)) * spectrum @ directions
                    noise = torch.randn(count, c * K, generator=own)
                    noise *= (
                        signal.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True) * (rest / (1 - rest)) ** 0.5
                    )
                    out.write(_columns((signal + noise).view(count, c, K), start))
    return FeatureStore(path)


def _columns(features: torch.Tensor, start: int) -> dict[str, np.ndarray]:
    n, c, _ = features.shape
    encoded = encode(features, "float16")
    return {
        "features": encoded.features,
        "scale": encoded.scale,
        "sq_norm": features.double().square().sum(-1).numpy(),
        "logits": np.zeros((n, c), np.float32),
        "label": np.zeros(n, np.int64),
        "row": np.arange(start, start + n),
        "norm": encoded.norm,
    }
