"""S11: forged indexes are built anew, whatever they say under a right digest and whatever stands in their place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Record
from mutations import endless, huge, mutated, places, with_strange_value
from safetensors.numpy import load, save
from synthetic import clustered, write_store

from gradstore.errors import UsageError
from gradstore.kernels.definitions import projected_kernel
from gradstore.search.index.store_index import index_path, open_index
from gradstore.search.session import Session
from gradstore.search.topk import topk
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.tensor_file import under_digest

pytestmark = pytest.mark.soak

CONTROL = "see strange facts"


@pytest.fixture
def store(fast: Path) -> FeatureStore:
    store = write_store(fast / "store", clustered(90, 2, 32), shard_rows=32)
    open_index(store, size=16)
    return store


def index_of(store: FeatureStore) -> Path:
    return index_path(store, projected_kernel("proj-trntk"))


def binding_of(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["binding"])


def sealed(tensors: dict[str, np.ndarray], binding: Any) -> bytes:
    """An index whose digest is right, whatever it says."""
    return save(tensors, metadata=under_digest("binding", json.dumps(binding), tensors))


def require_right(store: FeatureStore) -> str:
    """Search through whatever index there is; it finds what a scan finds. Gives what became of the index."""
    session = Session(store, size=16)
    found, truth = session.topk(store, 3, rows=range(6)), topk(store, store, 3, rows=range(6))
    np.testing.assert_array_equal(found.indices, truth.indices)
    assert found.similarity.tobytes() == truth.similarity.tobytes()
    return session.index.event


def test_strange_facts_under_a_right_digest(
    store: FeatureStore, amount: Callable[[int, int], int], record: Record
) -> None:
    file, rng, count = index_of(store), np.random.default_rng(0), amount(30, 500)
    whole = file.read_bytes()
    tensors, binding = load(whole), binding_of(whole)
    spots = [(), *(place for place in places(binding) if place and place != ("facts", "recall"))]
    failures = 0
    for i in range(count):
        strange = with_strange_value(rng, binding, spots)
        file.write_bytes(sealed(tensors, strange))
        require_right(store)
        failures += i < 30 and fails_without_checks(tensors, strange)
    assert failures > 5
    control = f"facts not checked: {failures} of 30 end in an uncaught exception or a wrong number"
    record("S11", "forged indexes", injected=count, recovered=count, refused=0, silent=0, control=control)


def fails_without_checks(tensors: dict[str, np.ndarray], binding: Any) -> bool:
    """The control: facts that are believed."""
    try:
        facts = binding["facts"]
        rows = sum(int(rows) for rows, digest in binding["shards"] if len(digest) == 64)
        sampled = np.random.default_rng(0).choice(int(facts["fitted"]), int(facts["sampled"]), replace=False)
        return rows != len(tensors["rest"]) or bool(dict(facts["recall"])) or not len(sampled)
    except Exception:
        return True


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.__setitem__(name, np.ascontiguousarray(change(tensors[name])))


def in_another_dtype(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32 if array.dtype == np.float64 else np.float64)


ARRAYS = ("directions", "scales", "factor", "coordinates", "rest", "error")
FORGERIES: dict[str, Callable[[dict[str, np.ndarray]], object]] = {
    **{f"no {name}": lambda tensors, name=name: tensors.pop(name) for name in ARRAYS},
    **{f"fewer {name}": changed(name, lambda array: array[:-1]) for name in ARRAYS},
    **{f"flat {name}": changed(name, np.ravel) for name in ARRAYS if name not in ("rest", "error")},
    **{f"{name} in another dtype": changed(name, in_another_dtype) for name in ARRAYS},
    **{f"{name} of NaN": changed(name, lambda array: array * np.float16(np.nan)) for name in ARRAYS[1:]},
    "empty directions": changed("directions", lambda array: array[:, :0]),
    "negative rest": changed("rest", lambda array: -array),
    "negative error": changed("error", lambda array: -array - 1),
    "a factor of zeros": changed("factor", np.zeros_like),
    "another array": lambda tensors: tensors.__setitem__("more", np.ones(3)),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_arrays_that_do_not_fit_are_built_anew(name: str, store: FeatureStore, record: Record) -> None:
    file = index_of(store)
    tensors, binding = dict(load(file.read_bytes())), binding_of(file.read_bytes())
    FORGERIES[name](tensors)
    file.write_bytes(sealed(tensors, binding))
    assert require_right(store) == "built: it is damaged"
    record("S11", "forged indexes", injected=1, recovered=1, refused=0, silent=0, control=CONTROL)


def test_mutated_indexes_are_built_anew(store: FeatureStore, amount: Callable[[int, int], int], record: Record) -> None:
    file, rng, count = index_of(store), np.random.default_rng(0), amount(30, 500)
    whole = file.read_bytes()
    for _ in range(count):
        file.write_bytes(mutated(rng, whole))
        require_right(store)
    record("S11", "forged indexes", injected=count, recovered=count, refused=0, silent=0, control=CONTROL)


def deep(path: Path) -> None:
    header = b'{"__metadata__":' + b"[" * 100_000
    path.write_bytes(len(header).to_bytes(8, "little") + header)


SWAPS: dict[str, Callable[[Path], None]] = {
    "endless device": endless,
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "huge": huge,
    "deep": deep,
    "empty": Path.touch,
}


def test_a_pipe_in_its_place_is_one_line(store: FeatureStore, record: Record) -> None:
    file = index_of(store)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UsageError, match="the output is a pipe"):
        open_index(store, size=16)
    record("S11", "forged indexes", injected=1, recovered=0, refused=1, silent=0, control=CONTROL)


@pytest.mark.parametrize("name", SWAPS)
def test_only_regular_files_of_a_possible_size_are_read(name: str, store: FeatureStore, record: Record) -> None:
    file = index_of(store)
    file.unlink()
    SWAPS[name](file)
    assert require_right(store) in ("built: it is damaged", "built: it is not a regular file")
    assert require_right(store) == "opened"
    record("S11", "forged indexes", injected=1, recovered=1, refused=0, silent=0, control=CONTROL)
