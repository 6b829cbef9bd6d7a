"""Run as a script, in a process of its own: whether FAISS can make, train, fill and ask an index of a factory string.

Arguments: dimensions and the string. Output: JSON, what FAISS says against it, or "". It may take 3 GB beside what
importing FAISS takes, which is much where that brings CUDA.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np

# As many vectors as an 8-bit quantiser has centroids, which are then copied rather than searched for.
_VECTORS = 256
_BYTES = 1 << 28
_MEMORY = 3 << 30
_STATE = Path("/proc/self/statm")  # pages of address space come first; Linux only
_TOO_FEW = re.compile(
    r"[Nn]umber of training points \(\d+\) should be at least as large as number of clusters \((\d+)\)"
)


def main(width: int, factory: str) -> None:
    """Print what is against a factory string."""
    if _STATE.exists():
        limit = int(_STATE.read_text().split()[0]) * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps(trial(width, factory, _VECTORS)))


def trial(width: int, factory: str, count: int) -> str:
    """Make an index of `count` random vectors, of more where it needs more and they fit, and ask it."""
    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        skip_annealing(index)
        vectors = np.random.default_rng(0).standard_normal((count, width), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        if not index.is_trained:
            index.train(vectors)
        index.add(vectors)
        index.search(vectors[:2], 5)
    except (RuntimeError, MemoryError) as error:
        more = _TOO_FEW.search(str(error))
        if more is None:
            return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        needed = int(more.group(1))
        return trial(width, factory, needed) if count < needed <= _BYTES // (4 * width) else ""
    return ""


def skip_annealing(index: Any) -> None:
    """Leave out what orders the codes of product quantisers: 15 seconds of the processor, whatever the vectors."""
    if hasattr(index, "do_polysemous_training"):
        index.do_polysemous_training = False
    for name in ("index", "base_index", "storage"):
        inner = getattr(index, name, None)
        if inner is not None:
            skip_annealing(faiss.downcast_index(inner))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
