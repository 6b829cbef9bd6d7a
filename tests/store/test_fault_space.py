"""F4 and F8: the disk is full before anything is computed; readers while a store is written."""

from __future__ import annotations

import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import Record
from small_store import ROWS, SHARD_ROWS, columns, data, fill, plan, write
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import CorruptError, NoSpaceError, UsageError
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.disk import Disk
from gradstore.store.store_writer import open_writer

pytestmark = pytest.mark.soak
NOT_YET = ("not a gradstore store", "out of range", "Open it again")


class SmallDisk(Disk):
    """A disk that says how little is free."""

    def __init__(self, free: int) -> None:
        self.free = free

    def free_bytes(self, directory: Path) -> int:
        return self.free


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_filesystem(tmp_path: Path) -> Iterator[Path | None]:
    """A real file system of 256 kB, where this process may mount one."""
    path = tmp_path / "mounted"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", path], capture_output=True, check=False)
    yield path if done.returncode == 0 else None
    if done.returncode == 0:
        subprocess.run(["umount", path], check=True)


def project() -> gs.Project:
    torch.manual_seed(0)
    rows = TensorDataset(torch.randn(300, 6), torch.zeros(300, dtype=torch.int64))
    return gs.Project(model=torch.nn.Linear(6, 3), splits={"train": rows})


def computed(out: Path, disk: Disk | None = None) -> tuple[NoSpaceError, int]:
    """The error of a run that finds no room, and how often it reported progress before."""
    seen: list[object] = []
    with pytest.raises(NoSpaceError) as error:
        gs.featurize(project(), split="train", out=out, proj_dim=1024, disk=disk, progress=seen.append)
    return error.value, len(seen)


def test_a_full_disk_is_said_before_the_first_gradient(
    fast: Path,
    small_filesystem: Path | None,
    file_limit: Callable[[int], None],
    amount: Callable[[int, int], int],
    record: Record,
) -> None:
    runs = amount(20, 100)
    for i in range(runs):
        if i % 2:
            error, steps = computed(fast / f"store{i}", SmallDisk(1000 + 18_000 * i % 1_800_000))
            assert str(error).startswith(
                f"{fast}/store{i}: the store does not fit the disk (expected 2.0 MB free, got "
            )
        elif small_filesystem is not None and i % 4 == 0:
            error, steps = computed(small_filesystem / f"store{i}")
            assert "does not fit the disk (expected 2.0 MB free, got 2" in str(error)
            shutil.rmtree(small_filesystem / f"store{i}")
        else:
            file_limit(100_000 + 10_000 * i)
            error, steps = computed(fast / f"store{i}")
            file_limit(resource.RLIM_INFINITY)
            assert "larger than a file of this process may be (ulimit -f) (expected 2.0 MB, got " in str(error)
        assert (error.exit_code, steps, "\n" in str(error)) == (7, 0, False)
    late = rows_before_hdf5_notices(fast / "naive.h5", file_limit)
    why = f"HDF5 append: {late} rows were computed before it failed"
    record("F4", "disk full, or file size limit", injected=runs, recovered=0, refused=runs, silent=0, control=why)


def rows_before_hdf5_notices(path: Path, file_limit: Callable[[int], None]) -> int:
    """The control: rows that an appending writer has computed when it is told that they do not fit."""
    file_limit(100_000)
    written = 0
    file = h5py.File(path, "w")
    try:
        features = file.create_dataset("features", (0, 1024), "f4", maxshape=(None, 1024), chunks=(4, 1024))
        for written in range(300):
            features.resize(written + 1, axis=0)
            features[written] = written
            if written % 16 == 15:
                file.flush()
    except (OSError, RuntimeError):
        pass
    finally:
        file_limit(resource.RLIM_INFINITY)
        file.close()
    assert written > 10
    return written


def test_readers_see_right_rows_or_none(fast: Path, amount: Callable[[int, int], int], record: Record) -> None:
    wanted, chance = amount(10_000, 300_000), np.random.default_rng(0)
    reads = not_yet = unclear = 0
    path, ends = fast / "store", threading.Event()
    writer = threading.Thread(target=write_again_and_again, args=(path, ends))
    writer.start()
    try:
        handle: FeatureStore | None = None
        while reads + not_yet < wanted:
            try:
                # A handle is used for some reads, during which its store is finished, appended to, or replaced.
                handle = FeatureStore(path) if handle is None or chance.random() < 0.1 else handle
                row = int(chance.integers(40))
                got = handle.read(row, row + 1)
            except UsageError as error:
                unclear += not any(text in str(error) for text in NOT_YET)
                not_yet, handle = not_yet + 1, None
                time.sleep(0.0002)  # else asking again and again leaves the writer, a thread like this one, no time
                continue
            assert all(got[name][0].tobytes() == ROWS[row][name].tobytes() for name in got if name != "digest")
            reads += 1
    finally:
        ends.set()
        writer.join()
    assert unclear == 0
    assert reads > wanted / 10
    wrong = zeros_read_from_a_growing_file(fast / "naive.h5")
    why = f"rows of a preallocated HDF5 file read while it is filled: {wrong} of 40 zeros, without an error"
    record(
        "F8", "reads during writing", injected=reads + not_yet, recovered=reads, refused=not_yet, silent=0, control=why
    )


def write_again_and_again(path: Path, ends: threading.Event) -> None:
    """Create, append to, and remove stores, while someone reads."""
    i = 0
    while not ends.is_set():
        for n in (12, 20, 40):
            write(path, n)
            ends.wait(0.002)
        i += 1
        path.rename(path.with_name(f"old{i}"))
        shutil.rmtree(path.with_name(f"old{i}"))


def zeros_read_from_a_growing_file(path: Path) -> int:
    """The control: what a reader of an unfinished, preallocated file sees."""
    with h5py.File(path, "w") as file:
        features = file.create_dataset("features", (40, 2, 12), "f2")
        features[:8] = np.stack([ROWS[i]["features"] for i in range(8)])
        file.flush()
        wrong = sum(features[i].tobytes() != ROWS[i]["features"].tobytes() for i in range(40))
    assert wrong == 32
    return wrong


def test_a_disk_that_fills_up_while_writing_keeps_what_is_stored(fast: Path, file_limit: Callable[[int], None]) -> None:
    with open_writer(fast / "store", plan(), None, data) as writer:
        with writer.shard(0) as shard:
            shard.write(columns(range(SHARD_ROWS)))
        file_limit(50_000)
        with pytest.raises(
            NoSpaceError, match=r"the disk is full \(expected room for \d+ bytes, got \d+ bytes free, File too large"
        ):
            fill(writer)
        file_limit(resource.RLIM_INFINITY)
        assert len(FeatureStore(fast / "store")) == SHARD_ROWS
        assert sorted(p.name for p in (fast / "store").iterdir()) == [".lock", "shard-00000.h5", "store.json"]
        fill(writer)
    assert FeatureStore(fast / "store").complete
    (fast / "store/shard-00001.h5").unlink()
    with pytest.raises(CorruptError, match="the file is gone"):
        FeatureStore(fast / "store").read(8, 9)
