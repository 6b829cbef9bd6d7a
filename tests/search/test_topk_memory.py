"""The memory budget is kept under a hard limit of the system, with features that are larger than the limit."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic import clustered, dense_similarity, write_store

import gradstore as gs
from gradstore.errors import UsageError
from gradstore.machine.byte_counts import parse_bytes
from gradstore.store.feature_store import FeatureStore

BUDGET = 256_000_000
# What is not part of the budget: thread stacks, the allocator's and the interpreter's growth, the result.
SLACK = 60_000_000

SCRIPT = """
import json, re, resource, sys, threading
import numpy as np, torch
import gradstore as gs
threading.stack_size(1 << 20)  # the system counts stacks, used or not, as data
train, queries = gs.open(sys.argv[1]), gs.open(sys.argv[2])
mode, budget, slack = sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
for warm in ("exact", mode) if mode != "none" else ("exact",):
    gs.topk(queries, queries, 2, memory=budget, mode=warm)  # loads every library and starts every pool
used = int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + budget + slack,) * 2)
if mode == "none":
    np.ones(budget + slack + (64 << 20), np.uint8)  # proves that the limit holds
else:
    result = gs.topk(train, queries, 5, mode=mode, memory=budget)
    print(json.dumps([result.indices.tolist(), result.similarity.tolist()]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    write_store(folder / "train", clustered(9000, 4, 5000), shard_rows=1000)
    write_store(folder / "test", clustered(60, 4, 5000, seed=1))
    return folder


def run(folder: Path, mode: str) -> subprocess.CompletedProcess[str]:
    arguments = [folder / "train", folder / "test", mode, BUDGET, SLACK]
    return subprocess.run([sys.executable, "-c", SCRIPT, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.skipif(
    not hasattr(resource, "RLIMIT_DATA") or sys.platform != "linux", reason="RLIMIT_DATA counts on Linux"
)
@pytest.mark.parametrize("mode", ["exact", "certified"])
def test_a_search_fits_a_hard_limit(folder: Path, mode: str) -> None:
    train = FeatureStore(folder / "train")
    assert train.nbytes > BUDGET + SLACK, "larger than the limit"
    result = run(folder, mode)
    assert result.returncode == 0, result.stderr
    indices, similarity = json.loads(result.stdout)
    dense = dense_similarity_in_parts(folder)
    order = np.argsort(-dense, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(similarity, np.take_along_axis(dense, order, 1), rtol=1e-12)


@pytest.mark.skipif(
    not hasattr(resource, "RLIMIT_DATA") or sys.platform != "linux", reason="RLIMIT_DATA counts on Linux"
)
def test_the_limit_is_a_limit(folder: Path) -> None:
    result = run(folder, "none")
    assert result.returncode != 0
    assert "MemoryError" in result.stderr


def dense_similarity_in_parts(folder: Path) -> np.ndarray:
    """`dense_similarity` without holding the training features in float64."""
    train, queries = FeatureStore(folder / "train"), FeatureStore(folder / "test")
    unit = queries.features[:].reshape(60, -1).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    parts = []
    for start in range(0, len(train), 500):
        part = train.features[start : start + 500].reshape(500, -1).astype(np.float64)
        parts.append(unit @ (part / np.linalg.norm(part, axis=1, keepdims=True)).T)
    return np.concatenate(parts, axis=1)


def test_the_reference_in_parts_is_the_reference(tmp_path: Path) -> None:
    write_store(tmp_path / "train", clustered(500, 2, 30))
    write_store(tmp_path / "test", clustered(60, 2, 30, seed=1))
    whole = dense_similarity(FeatureStore(tmp_path / "train"), FeatureStore(tmp_path / "test"), "proj-trntk")
    np.testing.assert_allclose(dense_similarity_in_parts(tmp_path), whole, rtol=0, atol=1e-12)


COMMAND = """
import os, sys, torch
from gradstore_cli import main

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024

def run(words):
    try:
        main(words)
    except SystemExit as stop:
        assert not stop.code, words

said, sys.stdout = sys.stdout, open(os.devnull, "w")
run(["topk", "small", "small", "-k", "2", "--html", "warm.html"])
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
run(sys.argv[1:])
print(status("VmHWM") - before, file=said)
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small rows, so that a million neighbours are most of what a command has to hold."""
    folder = tmp_path_factory.mktemp("many")
    write_store(folder / "train", clustered(1200, 2, 60))
    write_store(folder / "test", clustered(1000, 2, 60, seed=1))
    write_store(folder / "small", clustered(8, 2, 60))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read as Linux gives them")
@pytest.mark.parametrize("more", ["", "--json --csv near.csv --html near.html"], ids=["text", "json, csv and html"])
def test_a_million_neighbours_are_shown_within_the_budget(many: Path, more: str) -> None:
    """Held as Python objects they took 1,146 MB as JSON, 379 MB as CSV and 314 MB as text."""
    words = f"topk train test -k 1000 --memory {BUDGET} {more}".split()
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], cwd=many, check=True, capture_output=True, text=True)
    assert int(done.stdout) < BUDGET


@pytest.mark.parametrize("mode", ["exact", "certified"])
def test_a_result_that_is_larger_than_the_budget_is_refused_before_the_search(many: Path, mode: str) -> None:
    train, queries = FeatureStore(many / "train"), FeatureStore(many / "test")
    with pytest.raises(UsageError, match=r"--memory: too little memory .*a smaller -k, or for fewer --rows at a time"):
        gs.topk(train, queries, 1000, memory="20MB", mode=mode)
    with pytest.raises(UsageError, match=r"--memory: too little memory .*at least 24.0 MB for the results alone"):
        gs.forensics(train, queries, poisoned=[1], k=1000, memory="20MB")


def test_the_budget_that_an_error_names_suffices(many: Path) -> None:
    train, queries = FeatureStore(many / "train"), FeatureStore(many / "test")
    with pytest.raises(UsageError) as refused:
        gs.topk(train, queries, 1000, rows=range(60), memory="1MB")
    assert refused.value.expected is not None
    named = str(refused.value.expected).removeprefix("at least ")
    enough = 1.01 * parse_bytes(named)  # as it is rounded there
    assert gs.topk(train, queries, 1000, rows=range(60), memory=int(enough)).k == 1000


WIDE = """
import sys, torch, gradstore as gs
torch.set_num_threads(4)
rows, small, memory, kernel, engine, mode = *map(gs.open, sys.argv[1:3]), int(sys.argv[3]), *sys.argv[4:]
for warm in ("exact", mode):  # loads every library and starts every pool
    gs.topk(small, small, 2, kernel, engine=engine, mode=warm)

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024

before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
gs.topk(rows, rows, 5, kernel, rows=range(12), memory=memory, engine=engine, mode=mode)
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 8 MB."""
    folder = tmp_path_factory.mktemp("wide")
    write_store(folder / "train", clustered(48, 2000, 1000), dtype="float32", shard_rows=16)
    write_store(folder / "small", clustered(8, 4, 1000), dtype="float32")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read as Linux gives them")
@pytest.mark.parametrize(
    ("kernel", "engine", "mode"),
    [
        ("proj-pntk", "auto", "exact"),  # a row as stored is far larger than its Φ
        ("proj-trntk", "float32", "exact"),
        ("proj-trntk0", "auto", "certified"),
        ("proj-trntk", "auto", "approx"),  # which measures its recall by a scan first
    ],
)
def test_wide_rows_are_searched_within_the_budget(wide: Path, kernel: str, engine: str, mode: str) -> None:
    """The peak of a fresh process of four threads, beside the index; what the C library keeps counts."""
    arguments = [wide / "train", wide / "small", BUDGET, kernel, engine, mode]
    command = [sys.executable, "-c", WIDE, *map(str, arguments)]
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert taken < BUDGET + sum(path.stat().st_size for path in (wide / "train").glob("index*"))
