"""FAISS indexes as a source of candidates; whatever they propose is scored again from the store.

FAISS orders ties arbitrarily, drops rows with NaN, fills up with row -1 and approximates by design, so nothing it
returns is shown: it only decides which rows are read.
"""

from __future__ import annotations

import hashlib
import json
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
from gradstore.search.index.index_file import shard_digests
from gradstore.search.index.store_index import SketchIndex
from gradstore.search.query_batch import QueryGroup
from gradstore.store.files.disk import Disk
from gradstore.store.files.output import new_file, write_output
from gradstore.store.files.target import target_of
from gradstore.store.rows import Rows

SPACES = ("sketch", "full")
# IndexRaBitQFastScan returns wrong neighbours without an error from this many dimensions on (faiss 1.15.1).
_FAST_SCAN_LIMIT = 4096
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

    A file is read only if its SHA-256 is the one written beside it for the rows that the store has now; it is mapped
    into memory rather than loaded, and copied to a GPU where faiss-gpu and a GPU are there.

    Args:
        sketch: index of the store.
        factory: a FAISS factory string, such as "Flat", "IVF256,Flat", "HNSW32" or "RaBitQ".
        space: "sketch" or "full".
        rebuild: even if there is a good one.

    Returns:
        The index.

    Raises:
        UsageError: FAISS is missing or refuses the string; a kind of index that is wrong at this dimension.
    """
    if space not in SPACES:
        raise UsageError("unknown space", where="--on", expected="sketch or full", got=repr(space))
    faiss = require_faiss()
    width = sketch.basis.size if space == "sketch" else sketch.phi.length
    if "rabitqfs" in factory.lower() and width >= _FAST_SCAN_LIMIT:
        raise UsageError(
            "this FAISS index returns wrong neighbours at so many dimensions",
            where="--faiss",
            expected=f"RaBitQ, or fewer than {_FAST_SCAN_LIMIT} dimensions",
            got=f"{factory}, {width} dimensions",
        )
    path = _path(sketch, factory, space)
    covered = 0 if rebuild else _covered(path, sketch, factory)
    n = len(sketch.store)
    if covered == n:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        return _placed(faiss, index, factory, space, sketch, "opened")
    index = faiss.read_index(str(path)) if covered else _trained(faiss, sketch, factory, space, width)
    _add(index, sketch, space, covered)
    _save(faiss, index, path, sketch, factory)
    event = f"extended by {n - covered} rows" if covered else "built"
    return _placed(faiss, index, factory, space, sketch, event)


def _trained(faiss: ModuleType, sketch: SketchIndex, factory: str, space: str, width: int) -> Any:
    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(_training_vectors(sketch, space))
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise UsageError("FAISS refuses this index", where="--faiss", got=f"{factory!r}: {detail}") from None
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


def _covered(path: Path, sketch: SketchIndex, factory: str) -> int:
    """Leading rows of the store that the file covers; 0 where it cannot be used."""
    try:
        note = json.loads(path.with_suffix(".json").read_text())
        if path.is_symlink() or note["binding"] != _binding(sketch, factory) or note["sha256"] != _file_digest(path):
            return 0
        rows = 0
        for (count, mine), theirs in zip(note["shards"], shard_digests(sketch.store), strict=False):
            if (count, mine) != theirs:
                return 0
            rows += int(count)
        return rows if rows <= len(sketch.store) else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _binding(sketch: SketchIndex, factory: str) -> list[str]:
    """What besides the rows decides what the vectors are: the factory, the projection and model, and the basis."""
    return [factory, sketch.store.fingerprint, hashlib.sha256(sketch.basis.directions.tobytes()).hexdigest()]


def _save(faiss: ModuleType, index: Any, path: Path, sketch: SketchIndex, factory: str) -> None:
    disk = sketch.store.disk
    with new_file(target_of(path, of_store=True), disk) as (fd, temporary):
        faiss.write_index(index, faiss.PyCallbackIOWriter(_Appended(disk, fd, path)))
        note = {
            "binding": _binding(sketch, factory),
            "shards": shard_digests(sketch.store),
            "sha256": _file_digest(temporary),
        }
    write_output(path.with_suffix(".json"), [json.dumps(note).encode()], of_store=True, disk=disk)


class _Appended:
    """Takes the bytes of an index as FAISS hands them over."""

    def __init__(self, disk: Disk, fd: int, path: Path) -> None:
        self._disk, self._fd, self._path, self._end = disk, fd, path, 0

    def __call__(self, piece: bytes) -> int:
        self._disk.write(self._fd, piece, self._end, self._path)
        self._end += len(piece)
        return len(piece)


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
