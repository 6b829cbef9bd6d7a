"""Shards computed by several processes: errors arrive, and no death leaves a lock, a litter, or a wrong row."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_store import GROUP, columns, data, files, plan, write

from gradstore.errors import CorruptError, NonFiniteError, UsageError
from gradstore.featurization.workers import write_shards
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.shard_writer import ShardWriter
from gradstore.store.store_writer import open_writer

N, SHARD_ROWS = 60, 8


def fill(shard: ShardWriter) -> None:
    rows = plan(N).rows_of(shard.index)
    for start in range(rows.start, rows.stop, GROUP):
        shard.write(columns(range(start, min(start + GROUP, rows.stop))))


def run(path: Path, work: object = fill, workers: int = 3) -> list[int]:
    stored: list[int] = []
    with open_writer(path, plan(N), None, data) as writer:
        write_shards(writer, work, workers, lambda shard, _: stored.append(shard.index))  # type: ignore[arg-type]
    return stored


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_write_the_same_bytes(workers: int, tmp_path: Path) -> None:
    write(tmp_path / "whole", N)
    assert sorted(run(tmp_path / "store", workers=workers)) == list(range(8))
    assert files(tmp_path / "store") == files(tmp_path / "whole")


def test_appending_with_workers_gives_the_store_made_at_once(tmp_path: Path) -> None:
    write(tmp_path / "whole", N)
    write(tmp_path / "store", 20)
    run(tmp_path / "store")
    assert files(tmp_path / "store") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    "error", [NonFiniteError("row 9 is bad", where="here"), CorruptError("bad", hint="Stop"), KeyError("x")]
)
def test_an_error_in_a_worker_arrives_whole(error: Exception, tmp_path: Path) -> None:
    def fail(shard: ShardWriter) -> None:
        if shard.index == 3:
            raise error
        fill(shard)

    with pytest.raises(type(error)) as raised:
        run(tmp_path / "store", fail)
    assert str(raised.value) == str(error)
    assert multiprocessing.active_children() == []
    assert not list((tmp_path / "store").glob(".*.tmp"))
    assert FeatureStore(tmp_path / "store").manifest.missing


def test_a_killed_worker_is_one_clear_error_and_the_run_continues(tmp_path: Path) -> None:
    def die(shard: ShardWriter) -> None:
        if shard.index == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        fill(shard)

    with pytest.raises(UsageError, match=r"a worker died \(got killed, perhaps for its memory\)"):
        run(tmp_path / "store", die)
    assert not list((tmp_path / "store").glob(".*.tmp"))
    run(tmp_path / "store")
    assert FeatureStore(tmp_path / "store").complete


COORDINATOR = """
import sys, time
from pathlib import Path
sys.path[:0] = ["tests", "tests/featurization"]
import test_store_workers as t
def slowly(shard):
    print("writing", flush=True)
    time.sleep(60)
t.run(Path(sys.argv[1]), slowly)
"""


def test_workers_end_with_their_coordinator(tmp_path: Path) -> None:
    command = [sys.executable, "-c", COORDINATOR, str(tmp_path / "store")]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as coordinator:
        assert coordinator.stdout is not None
        coordinator.stdout.readline()
        coordinator.kill()
        assert coordinator.wait() == -signal.SIGKILL
        coordinator.stdout.read()  # ends when the last worker has
    deadline = time.monotonic() + 5
    run(tmp_path / "store")
    assert time.monotonic() < deadline
    assert FeatureStore(tmp_path / "store").complete
