"""The index of a store: a basis and a sketch of every row, kept beside the shards, extended as the store grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.errors import UsageError
from gradstore.kernels.definitions import Kernel, projected_kernel
from gradstore.kernels.feature_map import FeatureMap, require_served
from gradstore.machine.byte_counts import budget_for, format_bytes, parse_bytes, spendable
from gradstore.machine.threads import Workers, single_threaded, worker_count
from gradstore.search.index.basis import Basis, fit_basis
from gradstore.search.index.index_file import Saved, load_index, save_index
from gradstore.search.index.sketch import RowSketch, SketchBlock
from gradstore.store.feature_store import FeatureStore
from gradstore.store.present_rows import present_rows

MAX_SIZE = 512
_MIN_SIZE = 64
_SAMPLE = 640
# Of rows that are sketched at a time: few enough to stay in the cache, many enough for a good matrix product.
_BLOCK_BYTES = 32 << 20
# Part of the store's bytes that directions and coordinates may take, where that leaves at least _MIN_SIZE directions;
# with factor and norms it is a hundredth.
_SHARE = 0.0098
_FORMS = {
    "directions": np.int8,
    "scales": np.float64,
    "factor": np.float64,
    "coordinates": np.float16,
    "rest": np.float32,
    "error": np.float32,
}
_CHECKED = 4096  # rows looked at together
# Growth after which directions found in fewer rows are looked for again.
_OUTGROWN = 3


@dataclass(frozen=True)
class SketchIndex:
    """Sketch of every row of a store.

    Attributes:
        store: what it belongs to.
        phi: the feature map.
        basis: directions.
        sketch: of the rows.
        fitted: rows of the store when the basis was fitted.
        sampled: rows of them that it was fitted to.
        recall: of approximate search, by number of candidates; empty where it was not measured.
        event: what opening it took: "opened", "extended by … rows" or "built: …".
    """

    store: FeatureStore
    phi: FeatureMap
    basis: Basis
    sketch: RowSketch
    fitted: int
    sampled: int
    recall: dict[str, float]
    event: str = "opened"

    @property
    def path(self) -> Path:
        """The file."""
        return index_path(self.store, self.phi.kernel)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(part.nbytes for part in self._arrays().values())

    def fitted_rows(self) -> np.ndarray:
        """The rows that the basis was fitted to, int64, ascending."""
        return _sampled(self.fitted, self.sampled)

    def save(self) -> None:
        """Write it beside the shards."""
        facts = {"fitted": self.fitted, "sampled": self.sampled, "recall": self.recall}
        save_index(self.path, self.store, self._arrays(), facts)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "directions": self.basis.directions,
            "scales": self.basis.scales,
            "factor": self.basis.factor,
            "coordinates": self.sketch.coordinates,
            "rest": self.sketch.rest,
            "error": self.sketch.error,
        }

    def with_recall(self, recall: dict[str, float]) -> SketchIndex:
        """The same index, saved with what approximate search was measured to find."""
        index = replace(self, recall={**self.recall, **recall})
        index.save()
        return index


def index_path(store: FeatureStore, kernel: Kernel) -> Path:
    """Where a store keeps its index; proj-trntk and proj-trntk0 share one, since they share Φ."""
    return store.path / f"index-{'sum' if kernel.sums_classes else 'classes'}.safetensors"


def open_index(
    store: FeatureStore,
    kernel: str = "proj-trntk",
    *,
    size: int | None = None,
    rebuild: bool = False,
    memory: int | str = "1GB",
    progress: Callable[[int, int], None] | None = None,
) -> SketchIndex:
    """The index of a store, built, rebuilt or extended where need be.

    Args:
        store: a finished store.
        kernel: a name in `gradstore.kernels.definitions.PROJECTED`.
        size: directions r, at most 512; default as many as make the index about a hundredth of the store, at least 64.
        rebuild: even if there is a good one.
        memory: bytes held while building, beside the index itself.
        progress: called with (rows done, rows).

    Returns:
        The index of the rows that are there; saved where it changed.

    Raises:
        UsageError: an unfinished store, rows that are not stored, a kernel that the layout cannot serve, or too little
            memory.
        NonFiniteError: a row has no direction; names it.
        NoSpaceError: no room on the disk.
    """
    chosen = projected_kernel(kernel)
    store = present_rows(store.require_complete()).require_stored("an index")
    require_served(chosen, store)
    if chosen.weights or chosen.fit or (chosen.sums_classes and not chosen.normalised):
        raise UsageError(
            "an index serves no Φ that is weighted or fitted, and sums over classes only as cosines",
            where="--kernel",
            got=repr(kernel),
            hint="Search in mode exact, which needs none",
        )
    if size is not None and not 1 <= size <= MAX_SIZE:
        raise UsageError("unusable number of directions", where="--size", expected=f"1 to {MAX_SIZE}", got=size)
    phi = FeatureMap(chosen, store.schema.c, store.schema.K)
    saved = "it was asked for" if rebuild else load_index(index_path(store, chosen), store, _most_bytes(store, phi))
    if isinstance(saved, Saved):
        found = _reuse(store, phi, saved, size, parse_bytes(memory), progress)
        if isinstance(found, SketchIndex):
            return found
        saved = found
    return _build(store, phi, size, parse_bytes(memory), f"built: {saved}", progress)


Progress = Callable[[int, int], None] | None


def _reuse(
    store: FeatureStore, phi: FeatureMap, saved: Saved, size: int | None, memory: int, progress: Progress
) -> SketchIndex | str:
    """The saved index brought up to date, or why it is of no use."""
    found = _checked(store, phi, saved)
    if found is None:
        return "it is damaged"
    basis, kept, facts = found
    if size is not None and basis.size != min(size, len(store)):
        return "another size was asked for"
    covered = saved.covered(store)
    if covered == 0:
        return "the store has changed"
    fitted, sampled = facts["fitted"], facts["sampled"]
    if covered == len(store) == len(kept):
        return SketchIndex(store, phi, basis, kept, fitted, sampled, dict(facts["recall"]))
    kept = kept.rows(0, covered)
    if len(store) > _OUTGROWN * fitted or covered < fitted / 2:
        return "the store has outgrown it"
    new = _sketch(store, phi, basis, covered, memory, progress)
    joined = RowSketch(*(np.concatenate(pair) for pair in zip(_parts(kept), _parts(new), strict=True)))
    index = SketchIndex(store, phi, basis, joined, fitted, sampled, {}, f"extended by {len(store) - covered} rows")
    index.save()
    return index


def _most_bytes(store: FeatureStore, phi: FeatureMap) -> int:
    """Bytes that no index of a store of this shape exceeds, whatever its rows are; the last are its header's."""
    directions, factor = MAX_SIZE * (phi.length + 8 * phi.segments), 8 * MAX_SIZE**2
    return directions + factor + len(store) * (2 * MAX_SIZE + 8) + (1 << 20) + 128 * len(store.manifest.shards)


def _checked(store: FeatureStore, phi: FeatureMap, saved: Saved) -> tuple[Basis, RowSketch, Mapping[str, Any]] | None:
    """The parts of a saved index, where each has the form that this store's must have."""
    arrays, facts, n = saved.arrays, saved.facts, sum(rows for rows, _ in saved.shards)
    if set(arrays) != set(_FORMS) or any(arrays[name].dtype != dtype for name, dtype in _FORMS.items()):
        return None
    basis = Basis(arrays["directions"], arrays["scales"], arrays["factor"])
    kept = RowSketch(arrays["coordinates"], arrays["rest"], arrays["error"])
    if basis.directions.ndim != 3 or not 0 < basis.size <= MAX_SIZE:
        return None
    r = basis.size
    shapes = {
        "directions": (phi.segments, r, phi.K),
        "scales": (phi.segments, r),
        "factor": (r, r),
        "coordinates": (n, r),
        "rest": (n,),
        "error": (n,),
    }
    if any(arrays[name].shape != shape for name, shape in shapes.items()):
        return None
    bounded = all(
        bool(np.isfinite(arrays[name][at : at + _CHECKED]).all())
        for name in set(_FORMS) - {"directions"}
        for at in range(0, len(arrays[name]), _CHECKED)
    )
    positive = min(kept.rest.min(initial=0), kept.error.min(initial=0)) >= 0 and bool((np.diag(basis.factor) > 0).all())
    return (basis, kept, facts) if bounded and positive and _are_facts(facts, n) else None


def _are_facts(facts: Mapping[str, Any], n: int) -> bool:
    fitted, sampled, recall = facts.get("fitted"), facts.get("sampled"), facts.get("recall")
    counted = type(fitted) is int and type(sampled) is int and 0 < sampled <= fitted <= n
    measured = isinstance(recall, dict) and all(
        isinstance(value, float) and 0 <= value <= 1 for value in recall.values()
    )
    return set(facts) == {"fitted", "sampled", "recall"} and counted and measured


def _build(
    store: FeatureStore, phi: FeatureMap, size: int | None, memory: int, event: str, progress: Progress
) -> SketchIndex:
    n, D, asked = len(store), phi.length, memory
    memory = spendable(asked, worker_count())
    mixing = 8 * phi.K * worker_count()  # of a direction, in every worker
    row = D + mixing + 3 * store.schema.row_bytes
    sample = int(min(_SAMPLE, n, memory // 2 // (D + 20 * _SAMPLE)))
    fits = (memory - sample * (D + 20 * sample)) // (2 * D + mixing)
    if fits < 1 or sample < 1 or memory < 4 * row:
        need = budget_for(max(4 * row, 4 * (D + 20 * _SAMPLE)), worker_count())
        raise UsageError(
            "too little memory", where="--memory", expected=f"at least {format_bytes(need)}", got=format_bytes(asked)
        )
    wanted = size or int(np.clip(_SHARE * store.nbytes / (D + 2 * n), _MIN_SIZE, MAX_SIZE))
    basis = fit_basis(store, phi, _sampled(n, sample), int(min(wanted, fits, sample)))
    index = SketchIndex(store, phi, basis, _sketch(store, phi, basis, 0, memory, progress), n, sample, {}, event)
    index.save()
    return index


def _sketch(
    store: FeatureStore, phi: FeatureMap, basis: Basis, start: int, memory: int, progress: Progress
) -> RowSketch:
    """Sketch the rows from `start` on, a worker a core; each worker's buffers are allocated once."""
    n, r = len(store), basis.size
    workers = Workers()
    per_row = store.schema.row_bytes // 2 + phi.length + 4 * phi.K * phi.sums + 48 * r
    block = int(np.clip(min(memory // (2 * workers.count), _BLOCK_BYTES) // per_row, 1, 4096))
    out = RowSketch(
        np.empty((n - start, r), np.float16), np.empty(n - start, np.float32), np.empty(n - start, np.float32)
    )
    starts, done = count(start, block), count(block, block)

    def work(_: int) -> None:
        rows = SketchBlock(store, phi, basis, block)
        while (low := next(starts)) < n:
            high = min(low + block, n)
            part = rows.sketch(low, high)
            for whole, piece in zip(_parts(out), _parts(part), strict=True):
                whole[low - start : high - start] = piece
            if progress is not None:
                progress(min(start + next(done), n), n)

    with workers, single_threaded():
        workers.map(work, range(workers.count))
    return out


def _sampled(n: int, count: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).choice(n, count, replace=False))


def _parts(sketch: RowSketch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return sketch.coordinates, sketch.rest, sketch.error
