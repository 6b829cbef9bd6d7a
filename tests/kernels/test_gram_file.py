"""The file of a Gram matrix: what it says, and how it is interrupted, killed, continued, left alone and refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
from synthetic import clustered, dense_similarity, write_store

import gradstore as gs
from gradstore.errors import CorruptError, LockedError, MismatchError, NoSpaceError, UsageError
from gradstore.kernels.gram_matrix import open_gram
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.disk import Disk

pytestmark = pytest.mark.numerical


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, FeatureStore]:
    path = tmp_path_factory.mktemp("stores")
    return write_store(path / "train", clustered(150, 3, 200)), write_store(
        path / "test", clustered(70, 3, 200, seed=1)
    )


def test_the_file_says_what_it_is(stores: tuple, tmp_path: Path) -> None:
    train, test = stores
    written = gs.gram(train, test, out=tmp_path / "gram.h5")
    assert (written.shape, written.kernel, written.symmetric) == ((150, 70), "proj-trntk", False)
    assert written.attributes["fingerprint"] == train.fingerprint
    assert (written.attributes["split_a"], written.attributes["split_b"]) == ("train", "test")
    with h5py.File(written.path) as file:
        assert file["gram"].shape == (150, 70)
        assert file["gram"].dtype == np.float32
        assert file["finished"][:].all()
    assert os.listdir(tmp_path) == ["gram.h5"]
    again = open_gram(written.path)
    assert again == written
    np.testing.assert_array_equal(again[3:5, 7], written[:][3:5, 7])


class CrashError(Exception):
    pass


class DyingDisk(Disk):
    """Stops after some writes, as a killed process does: what was written stays, nothing is tidied."""

    def __init__(self, writes: int) -> None:
        self.left = writes

    def _pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        if self.left <= 0:
            raise CrashError
        self.left -= 1
        return super()._pwrite(fd, data, offset)


@pytest.mark.parametrize("writes", [0, 1, 5, 300, 900])
def test_an_interrupted_matrix_is_continued_to_the_same_values(
    stores: tuple, writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = stores[0]
    monkeypatch.setattr("gradstore.kernels.gram_file._SYNC_EVERY", 0.0)
    whole = gs.gram(train, out=tmp_path / "whole.h5", memory="400KB")[:]
    out = tmp_path / "gram.h5"
    with pytest.raises(CrashError):
        gs.gram(train, out=out, memory="400KB", disk=DyingDisk(writes))
    assert not out.exists()
    first: list[int] = []
    continued = gs.gram(train, out=out, memory="400KB", progress=lambda done, total: first.append(done))
    np.testing.assert_array_equal(continued[:], whole)
    assert first[-1] == 150 * 150, "progress ends at the whole matrix"
    if writes == 900:
        fresh: list[int] = []
        gs.gram(train, out=tmp_path / "fresh.h5", memory="400KB", progress=lambda done, total: fresh.append(done))
        assert len(first) < len(fresh), "finished tiles are not computed again"


def test_a_killed_process_leaves_what_it_wrote(stores: tuple, tmp_path: Path) -> None:
    code = f"""
        import os, signal, gradstore as gs, gradstore.kernels.gram_file as f
        f._SYNC_EVERY = 0.0
        seen = []
        def progress(done, total):
            seen.append(done)
            if len(seen) == 6: os.kill(os.getpid(), signal.SIGKILL)
        gs.gram(gs.open({str(stores[0].path)!r}), out={str(tmp_path / "gram.h5")!r}, memory="400KB", progress=progress)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    steps: list[int] = []
    gram = gs.gram(stores[0], out=tmp_path / "gram.h5", memory="400KB", progress=lambda done, total: steps.append(done))
    np.testing.assert_allclose(gram[:], dense_similarity(stores[0], stores[0], "proj-trntk"), atol=2e-6)
    assert steps[0] > 0.2 * 150 * 150


def test_a_finished_matrix_is_left_alone(stores: tuple, tmp_path: Path) -> None:
    out = tmp_path / "gram.h5"
    gs.gram(stores[0], out=out)
    before = out.stat()
    gs.gram(stores[0], out=out, memory="400KB")
    assert out.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(
        MismatchError, match=r"gram\.h5: the output exists and is not the Gram matrix .*nothing was touched"
    ):
        gs.gram(stores[0], out=out, kernel="proj-pntk")
    assert out.stat().st_mtime_ns == before.st_mtime_ns


def test_an_unfinished_matrix_of_another_kind_is_refused(stores: tuple, tmp_path: Path) -> None:
    out = tmp_path / "gram.h5"
    with pytest.raises(CrashError):
        gs.gram(stores[0], out=out, memory="400KB", disk=DyingDisk(200))
    with pytest.raises(MismatchError, match="an unfinished Gram matrix of another kind"):
        gs.gram(stores[0], stores[1], out=out)


def test_a_second_writer_is_refused(stores: tuple, tmp_path: Path) -> None:
    out = tmp_path / "gram.h5"

    def progress(done: int, total: int) -> None:
        with pytest.raises(LockedError, match="another process is writing this Gram matrix"):
            gs.gram(stores[0], out=out)

    gs.gram(stores[0], out=out, progress=progress)


class FullDisk(Disk):
    def free_bytes(self, directory: Path) -> int:
        return 1000


def test_a_matrix_that_does_not_fit_is_refused_before_it_is_begun(stores: tuple, tmp_path: Path) -> None:
    seen: list[int] = []
    with pytest.raises(
        NoSpaceError, match=r"the Gram matrix does not fit the disk \(expected .* kB free, got 1.0 kB\)"
    ):
        gs.gram(stores[0], out=tmp_path / "gram.h5", disk=FullDisk(), progress=lambda done, total: seen.append(done))
    assert seen == []
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_no_gram_matrix_is_named(stores: tuple, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no Gram matrix"):
        open_gram(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(CorruptError, match="HDF5 cannot read this Gram matrix"):
        open_gram(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["gram"] = np.eye(3)
    with pytest.raises(UsageError, match="this is not a Gram matrix"):
        open_gram(tmp_path / "other.h5")
    with pytest.raises(UsageError, match="the directory does not exist"):
        gs.gram(stores[0], out=tmp_path / "no" / "gram.h5")
