"""FAISS indexes as a source of candidates; whatever they propose is scored again from the store.

FAISS orders ties arbitrarily, drops rows with NaN, fills up with row -1 and approximates by design, so nothing it
returns is shown: it only decides which rows are read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from gradstore.errors import UsageError
from gradstore.kernels.feature_map import FeatureMap
from gradstore.search.index.basis import Basis
from gradstore.search.index.faiss_factory import refuse_with, require_sound
from gradstore.search.index.faiss_file import read_sealed, write_sealed
from gradstore.search.index.store_index import SketchIndex
from gradstore.search.query_batch import QueryGroup
from gradstore.store.rows import Rows

SPACES = ("sketch", "full")
_GPU_K = 2048
_BLOCK = 256
_TRAINING = 1 << 16
_FULL_TRAINING = 512


def require_faiss() -> ModuleType:
    """The faiss module.

    Returns:
        `faiss`.

    Raises:
        UsageError: neither wheel is installed, or both are and overwrite each other's files.
    """
    # torch is imported above: loaded after faiss, the two OpenMP runtimes of the wheels can deadlock.
    wheels = [name for name in ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12") if _installed(name)]
    if len(wheels) > 1:
        raise UsageError(
            f"{' and '.join(wheels)} are both installed, and each overwrites files of the other",
            where="faiss",
            expected="one of them",
            hint=f"Run `pip uninstall {' '.join(wheels)}`, then `pip install gradstore[cpu]` or `gradstore[gpu]`",
        )
    try:
        import faiss
    except ImportError:
        raise UsageError(
            "FAISS is not installed",
            where="faiss",
            hint="Run `pip install gradstore[cpu]`, or `pip install gradstore[gpu]` on a machine with CUDA; not both",
        ) from None
    return faiss


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


@dataclass(frozen=True)
class FaissIndex:
    """A FAISS index of a store's unit features, by inner product.

    Attributes:
        faiss: the module.
        index: of the module's making.
        factory: the string that describes it.
        space: "sketch" (coordinates in the basis) or "full" (Φ itself).
        sketch: the store's sketch.
        event: what opening it took.
        on_gpu: FAISS returns at most 2,048 rows a query there.
    """

    faiss: ModuleType
    index: Any
    factory: str
    space: str
    sketch: SketchIndex
    event: str
    on_gpu: bool = False

    @property
    def name(self) -> str:
        """For people, and the key of its measured recall."""
        return f"{self.factory} on the {'sketch' if self.space == 'sketch' else 'full features'}"

    def propose(self, group: QueryGroup, count: int) -> list[np.ndarray]:
        """At most `count` distinct rows for each query, int64; fewer where FAISS found fewer."""
        vectors = _query_vectors(self.sketch.basis, group, self.space)
        most = min(count, _GPU_K) if self.on_gpu else count
        _, found = self.index.search(vectors, min(most, self.index.ntotal))
        n = len(self.sketch.store)
        return [np.unique(rows[(rows >= 0) & (rows < n)]).astype(np.int64) for rows in found]


def open_faiss(sketch: SketchIndex, factory: str, space: str, *, rebuild: bool = False) -> FaissIndex:
    """A FAISS index kept beside the store, built where need be, extended where the store has grown.

    A file is read only if this user has written it here for the rows that the store has now, see `faiss_file`; it is
    mapped into memory rather than loaded, and copied to a GPU where faiss-gpu and a GPU are there.

    Args:
        sketch: index of the store.
        factory: a FAISS factory string, such as "Flat", "IVF256,Flat", "HNSW32" or "RaBitQ".
        space: "sketch" or "full".
        rebuild: even if there is a good one.

    Returns:
        The index.

    Raises:
        UsageError: FAISS is missing, or can make no working index of the string; a kind of index that is wrong at this
            dimension.
    """
    if space not in SPACES:
        raise UsageError("unknown space", where="--on", expected="sketch or full", got=repr(space))
    faiss = require_faiss()
    width = sketch.basis.size if space == "sketch" else sketch.phi.length
    require_sound(factory, width)
    path, binding, n = _path(sketch, factory, space), _binding(sketch, factory, space, width), len(sketch.store)
    kept = "it was asked for" if rebuild else read_sealed(faiss, path, sketch.store, binding)
    if isinstance(kept, str):
        index, covered, event = _trained(faiss, sketch, factory, space, width), 0, f"built: {kept}"
    else:
        index, covered = kept
        event = f"extended by {n - covered} rows"
    if covered == n:
        return _placed(faiss, index, factory, space, sketch, "opened")
    _add(index, sketch, space, covered)
    if not write_sealed(faiss, index, path, sketch.store, binding):
        event += "; not kept, for this user's cache folder cannot be written"
    return _placed(faiss, index, factory, space, sketch, event)


def _trained(faiss: ModuleType, sketch: SketchIndex, factory: str, space: str, width: int) -> Any:
    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(_training_vectors(sketch, space))
    except (RuntimeError, MemoryError) as error:
        refuse_with(factory, error)
    return index


def _training_vectors(sketch: SketchIndex, space: str) -> np.ndarray:
    n = len(sketch.store)
    count = min(n, _TRAINING if space == "sketch" else _FULL_TRAINING)
    rows = np.sort(np.random.default_rng(2).choice(n, count, replace=False))
    if space == "sketch":
        return np.ascontiguousarray(sketch.sketch.coordinates[rows], np.float32)
    return np.concatenate([_unit_rows(sketch.store, sketch.phi, int(row), int(row) + 1) for row in rows])


def _add(index: Any, sketch: SketchIndex, space: str, start: int) -> None:
    n = len(sketch.store)
    for low in range(start, n, _BLOCK):
        high = min(low + _BLOCK, n)
        if space == "sketch":
            index.add(np.ascontiguousarray(sketch.sketch.coordinates[low:high], np.float32))
        else:
            index.add(_unit_rows(sketch.store, sketch.phi, low, high))


def _unit_rows(store: Rows, phi: FeatureMap, start: int, stop: int) -> np.ndarray:
    """Φ/‖Φ‖ of some rows, float32 [rows, D]."""
    columns = store.read(start, stop)
    scaled = phi.scaled(torch.from_numpy(columns["features"]), columns, store.where)
    out, vector = np.empty((stop - start, phi.length), np.float32), torch.empty(phi.segments, phi.K)
    for i in range(stop - start):
        scaled.row(i, vector)
        out[i] = vector.flatten() / torch.linalg.vector_norm(vector)
    return out


def _query_vectors(basis: Basis, group: QueryGroup, space: str) -> np.ndarray:
    if space == "sketch":
        return np.ascontiguousarray(basis.query_coordinates(group)[0], np.float32)
    return (group.vectors() / torch.from_numpy(group.norms)[:, None]).float().numpy()


def _placed(faiss: ModuleType, index: Any, factory: str, space: str, sketch: SketchIndex, event: str) -> FaissIndex:
    """On a GPU, where there is one and it supports this kind."""
    if getattr(faiss, "get_num_gpus", lambda: 0)() > 0:
        try:
            copy = faiss.index_cpu_to_all_gpus(index)
            return FaissIndex(faiss, copy, factory, space, sketch, event, on_gpu=True)
        except RuntimeError:
            pass
    return FaissIndex(faiss, index, factory, space, sketch, event)


def _path(sketch: SketchIndex, factory: str, space: str) -> Path:
    tag = hashlib.sha256(f"{sketch.path.name} {factory} {space}".encode()).hexdigest()[:12]
    return sketch.store.path / f"index-{tag}.faiss"


def _binding(sketch: SketchIndex, factory: str, space: str, width: int) -> list[str]:
    """What besides the rows decides what the vectors are: the factory, the projection and model, and the basis."""
    basis = hashlib.sha256(sketch.basis.directions.tobytes()).hexdigest()
    return [factory, space, str(width), sketch.store.fingerprint, basis]
