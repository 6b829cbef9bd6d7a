"""F9: malformed stores get one coded error; nothing crashes, hangs, or takes all memory."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Record
from mutations import Place, places, spliced, with_strange_value
from small_store import ROWS, files, write

from gradstore.errors import CorruptError, GradstoreError
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.manifest import MANIFEST

pytestmark = pytest.mark.soak


@pytest.fixture
def store(fast: Path) -> Path:
    write(fast / "store")
    return fast / "store"


def sealed(content: dict[str, Any]) -> bytes:
    """A manifest whose digest is right, whatever it says."""
    content = {name: value for name, value in content.items() if name != "digest"}
    body = json.dumps(content)[:-1]
    return f'{body},\n "digest": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'.encode()


def mutated_manifest(rng: np.random.Generator, whole: bytes, spots: list[Place]) -> bytes:
    """Flipped, spliced, truncated, or with strange values under a right digest."""
    kind = rng.random()
    if kind < 0.6:
        try:
            return sealed(with_strange_value(rng, json.loads(whole), spots))
        except UnicodeEncodeError:
            return whole[:-1]
    if kind < 0.8:
        return spliced(rng, whole)
    body = bytearray(whole[: whole.rindex(b',\n "digest"')])
    for _ in range(int(rng.integers(1, 4))):
        body[rng.integers(len(body))] = rng.integers(256)
    return bytes(body) + b',\n "digest": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()


@contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """The system gives this process so many more bytes, and none beyond; said of Linux, where it is kept."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(path: Path) -> GradstoreError | None:
    """The error that a reader ends in; None where nothing was wrong."""
    try:
        use(path)
    except GradstoreError as error:
        return error
    return None


def use(path: Path) -> None:
    """Everything a reader does with a store."""
    opened = FeatureStore(path)
    opened.card()
    read = opened.read(0, len(opened))
    for i in range(len(opened)):
        if any(read[name][i].tobytes() != ROWS[i][name].tobytes() for name in read if name != "digest"):
            raise AssertionError(f"row {i} was read wrongly")
    assert opened.labels.shape == (len(opened),)
    assert opened.features[:1].shape[1:] == opened.shape[1:]


def test_malformed_manifests_and_shards_get_one_coded_error(
    store: Path, amount: Callable[[int, int], int], record: Record
) -> None:
    rng, whole = np.random.default_rng(0), files(store)
    spots = list(places(json.loads(whole[MANIFEST])))
    count, harmless, longest, codes = amount(6000, 120_000), 0, 0.0, set()
    use(store)
    with limited_memory(1 << 30):
        for i in range(count):
            name = MANIFEST if i % 5 else list(whole)[int(rng.integers(3))]
            changed = mutated_manifest(rng, whole[name], spots) if name == MANIFEST else spliced(rng, whole[name])
            (store / name).write_bytes(changed)
            began = time.perf_counter()
            error = outcome(store)
            longest = max(longest, time.perf_counter() - began)
            (store / name).write_bytes(whole[name])
            harmless += error is None
            if error is not None:
                codes.add(error.exit_code)
                assert "memory" not in error.line
                assert "\n" not in error.line
    assert codes <= {2, 5, 9}
    assert longest < 30
    crash = a_parser_without_checks(whole[MANIFEST], spots)
    control = f"fields not checked: {crash} of 100 end in an uncaught exception or a wrong size"
    what = "malformed manifest or shard"
    record("F9", what, injected=count, recovered=harmless, refused=count - harmless, silent=0, control=control)


def a_parser_without_checks(whole: bytes, spots: list[Place]) -> int:
    """The control: the same strange values, believed."""
    rng, failures = np.random.default_rng(0), 0
    for _ in range(100):
        content = with_strange_value(rng, json.loads(whole), spots)
        try:
            for shard in content["shards"]:
                for name, offset in shard["offsets"].items():
                    np.empty(shard["rows"], np.uint8)[:offset], hashlib.sha256(name.encode())
                assert shard["rows"] == min(8, content["n"] - 8 * shard["index"])
        except Exception:
            failures += 1
    assert failures > 10
    return failures


@pytest.mark.skipif(sys.platform != "linux", reason="a limit that only Linux keeps")
def test_the_limit_of_memory_is_kept() -> None:
    """The control: what would take more ends in an error."""
    with limited_memory(1 << 30), pytest.raises(MemoryError):
        np.ones(1 << 28)


def test_numbers_that_would_take_all_memory_or_time_are_refused(store: Path) -> None:
    for change in ({"n": 1 << 50, "shard_rows": 1}, {"n": 1 << 55}):
        content = {**json.loads((store / MANIFEST).read_bytes()), **change, "shards": []}
        content["identity"]["data"]["length"] = change["n"]
        (store / MANIFEST).write_bytes(sealed(content))
        with pytest.raises(CorruptError, match=r"the manifest says what cannot be \(got \d+ shards\)"):
            FeatureStore(store)
    deep = b"[" * 100_000
    (store / MANIFEST).write_bytes(deep + b',\n "digest": "%s"\n}\n' % hashlib.sha256(deep).hexdigest().encode())
    with pytest.raises(CorruptError, match="the manifest says what cannot be"):
        FeatureStore(store)
