"""F1, F1b, F7: processes killed at random, stopped by signals, and several writers at once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import pytest
from conftest import Record
from forking import Forks
from small_store import ROWS, files, write, wrong_rows

from gradstore.store.feature_store import FeatureStore
from gradstore.store.verify import verify

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as server:
        yield server


def noted(acks: Path) -> set[int]:
    return {int(line) for line in acks.read_text().split()} if acks.exists() else set()


def kill_at_random(forks: Forks, order: dict[str, object], longest: float, chance: random.Random) -> bool:
    """Start a job and kill it at a random time; whether it was killed before it was done."""
    (pid,) = forks.start(order)
    time.sleep(chance.uniform(0, longest))
    os.kill(pid, signal.SIGKILL)
    return forks.statuses() == [-signal.SIGKILL]


def test_a_killed_writer_loses_no_stored_row(
    forks: Forks, fast: Path, amount: Callable[[int, int], int], record: Record
) -> None:
    kills, wanted, chance = 0, amount(200, 1000), random.Random(0)
    path, acks = fast / "store", fast / "acks"
    write(fast / "whole", 60, shard_rows=4)
    order = {"job": "write_slowly", "path": str(path), "n": 60, "shard_rows": 4, "acks": str(acks)}
    while kills < wanted:
        done = not kill_at_random(forks, order, 0.15, chance)
        kills += not done
        if (path / "store.json").exists():
            stored = {shard.index for shard in FeatureStore(path).manifest.shards}
            assert noted(acks) <= stored
            assert wrong_rows(FeatureStore(path)) == []
        if done:
            assert files(path) == files(fast / "whole")
            shutil.rmtree(path)
            acks.unlink()
    write(path, 60, shard_rows=4)
    assert files(path) == files(fast / "whole")
    control, tried = naive_losses(forks, fast, chance)
    why = f"rows appended with HDF5: {control} of {tried} files unreadable, or rows lost"
    record("F1", "SIGKILL at a random time, resumed", injected=kills, recovered=kills, refused=0, silent=0, control=why)


def naive_losses(forks: Forks, fast: Path, chance: random.Random) -> tuple[int, int]:
    """(files that HDF5 appended to and that are unusable after a kill, those in which rows were reported stored)."""
    losses = tried = 0
    for i in range(20):
        path, acks = fast / f"naive{i}.h5", fast / f"naive{i}.acks"
        kill_at_random(forks, {"job": "append_naively", "path": str(path), "n": 4000, "acks": str(acks)}, 0.3, chance)
        rows = max(noted(acks), default=-1) + 1
        tried += rows > 0
        losses += rows > 0 and not readable(path, rows)
    assert losses > 0
    return losses, tried


def readable(path: Path, rows: int) -> bool:
    try:
        with h5py.File(path) as file:
            read = file["features"][:rows]
            return [row.tobytes() for row in read] == [ROWS[i]["features"].tobytes() for i in range(rows)]
    except (OSError, KeyError, RuntimeError):
        return False


def compete(forks: Forks, path: Path, writers: int, locks: bool = True) -> list[str]:
    """What each of several writers says that start at the same time and hold on until all have spoken."""
    said = path.with_suffix(".said")
    order = {"job": "hold", "path": str(path), "said": str(said), "locks": locks}
    forks.start(*[order] * writers)
    deadline = time.monotonic() + 20
    while len(lines := said.read_text().splitlines() if said.exists() else []) < writers:
        assert time.monotonic() < deadline, lines
        time.sleep(0.003)
    said.with_suffix(".said.go").touch()
    assert forks.statuses() == [0] * writers
    return lines


def refusal(pid: int) -> str:
    host = re.escape(socket.gethostname())
    return rf"exit 6: \S+: another process is writing this store \(got pid {pid} on host {host}\)\. Wait for .*"


def test_one_of_several_writers_proceeds(
    forks: Forks, fast: Path, amount: Callable[[int, int], int], record: Record
) -> None:
    write(fast / "whole")
    rounds, refused, attempts = amount(50, 300), 0, 0
    with Forks(HDF5_USE_FILE_LOCKING="FALSE") as unlocked:
        for i in range(rounds):
            path, writers = fast / f"store{i}", 2 + i % 7
            if i % 3 == 0:  # a lock whose owner is dead
                path.mkdir()
                (path / ".lock").write_text(json.dumps({"pid": 999_999_999, "host": socket.gethostname()}))
            lines = compete(unlocked if i % 2 else forks, path, writers)
            winners = [line for line in lines if line.startswith("won")]
            losers = [line for line in lines if not line.startswith("won")]
            assert len(winners) == 1
            assert [line for line in losers if not re.fullmatch(refusal(int(winners[0].split()[1])), line)] == []
            assert files(path) == files(fast / "whole")
            refused, attempts = refused + len(losers), attempts + writers
            shutil.rmtree(path)
    control = sum(line.startswith("won") for line in compete(forks, fast / "control", 4, locks=False))
    assert control > 1
    why = f"without the lock: {control} of 4 writers proceed"
    record("F7", "2 to 8 writers at once", injected=attempts, recovered=rounds, refused=refused, silent=0, control=why)


def test_a_store_that_another_writer_begins_this_moment_is_not_foreign(
    fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, listed = fast / "store", os.listdir
    path.mkdir()

    def begun_meanwhile(folder: Path) -> list[str]:
        monkeypatch.undo()
        write(path)
        return listed(folder)

    monkeypatch.setattr(os, "listdir", begun_meanwhile)
    write(path)
    assert FeatureStore(path).complete


PROJECT = """
import torch
import gradstore as gs
from torch.utils.data import TensorDataset

def project():
    torch.manual_seed(0)
    x, y = torch.randn(400, 6), torch.randint(0, 3, (400,))
    model = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
    return gs.Project(model=model, splits={"train": TensorDataset(x, y)})
"""


def test_a_signal_ends_a_command_cleanly(fast: Path, amount: Callable[[int, int], int], record: Record) -> None:
    (fast / "project.py").write_text(PROJECT)
    signals, wanted, chance = 0, amount(50, 200), random.Random(0)
    with Forks("warm_featurize", OMP_NUM_THREADS="1") as forks:
        whole = run(forks, fast, "whole")
        assert whole == (0, "")
        while signals < wanted:
            number = (signal.SIGINT, signal.SIGTERM)[signals % 2]
            status, said = run(forks, fast, "store", number, chance.uniform(0, 0.2))
            if (fast / "store/store.json").exists():
                assert verify(fast / "store").ok
            if status == 0:
                assert files(fast / "store") == files(fast / "whole")
                shutil.rmtree(fast / "store")
                continue
            signals += 1
            assert status == 128 + number, said
            assert f"gradstore featurize {fast}/project.py --split train --out {fast}/store" in said
            assert "Traceback" not in said
        assert run(forks, fast, "store")[0] == 0
    assert files(fast / "store") == files(fast / "whole")
    control = naive_stop(fast)
    record("F1b", "SIGINT or SIGTERM", injected=signals, recovered=signals, refused=0, silent=0, control=control)


def run(forks: Forks, fast: Path, out: str, number: int | None = None, after: float = 0.0) -> tuple[int, str]:
    """(exit status, what was said on stderr after the plan) of one featurize command, perhaps stopped by a signal."""
    stderr = fast / "stderr"
    stderr.unlink(missing_ok=True)
    arguments = ["featurize", f"{fast}/project.py", "--split", "train", "--out", f"{fast}/{out}", "--proj-dim", "512"]
    (pid,) = forks.start({"job": "run_command", "arguments": arguments, "stderr": str(stderr), "shard_flops": 4e7})
    if number is not None:
        while not (stderr.exists() and stderr.stat().st_size):  # the plan, said before the first gradient
            time.sleep(0.002)
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    (status,) = forks.statuses()
    return status, stderr.read_text() if number is not None else ""


def naive_stop(fast: Path) -> str:
    """The control: a process without a handler dies of the signal, says nothing, and leaves a half-written file."""
    path = fast / "naive.h5"
    code = (
        f"import h5py, time\nf = h5py.File({str(path)!r}, 'w')\nf['x'] = range(9)\nprint(1, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait() == -signal.SIGTERM
    with pytest.raises(OSError, match="Unable to synchronously open file"), h5py.File(path):
        pass
    return "HDF5 without a handler: killed by the signal, file unreadable"
