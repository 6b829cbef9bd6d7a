"""F26: rows are removed for good, whatever fails on the way; and nothing brings them back."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Record
from faulty_disk import KilledError, LoggingDisk, WatchedDisk, failing
from small_store import ROWS, SHARD_ROWS, N, columns, files, write
from test_fault_power import crash_state

import gradstore as gs
from gradstore.errors import CorruptError, GradstoreError, UsageError
from gradstore.store import remove as remove_module
from gradstore.store.feature_store import FeatureStore
from gradstore.store.schema import REMOVED
from gradstore.store.store_writer import open_for_repair
from gradstore.store.verify import verify

KINDS = ["EIO", "ENOSPC", "EINTR", "short", "killed"]
SECRETS = ("features", "logits", "sq_norm", "preview", "input_digest")
GONE = [3, 4, 9, N - 1]
THERE = np.setdiff1d(np.arange(N), GONE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store with annotations and an index."""
    path = tmp_path_factory.mktemp("whole") / "store"
    write(path)
    gs.annotate(path, labels=np.arange(N) % 2, poisoned=GONE)
    (path / "index-classes.safetensors").write_bytes(ROWS[3]["features"].tobytes())
    return path


@pytest.fixture(autouse=True)
def some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remove_module, "_TOGETHER", 700)


def traces(path: Path, rows: list[int]) -> list[str]:
    """Files that hold a removed row's features, logits, picture, or digest of its inputs."""
    found = []
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for row in rows:
            secrets = [
                ROWS[row][name].tobytes() for name in ("features", "logits", "sq_norm", "preview", "input_digest")
            ]
            found += [file.name for secret in secrets if secret in content]
    return found


def wrong(path: Path, gone: list[int]) -> list[int]:
    """Rows that are neither what was stored nor, if they are among those, removed."""
    found = FeatureStore(path).read(0, N)
    expected = columns(range(N))
    bad = []
    for i in range(N):
        removed = i in gone and found["absent"][i] == REMOVED and not found["features"][i].any()
        same = all(found[name][i].tobytes() == expected[name][i].tobytes() for name in found if name in expected)
        bad += [] if removed or same else [i]
    return bad


def copied(whole: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(whole, to))


def test_nothing_is_left_of_a_removed_row(whole: Path, tmp_path: Path) -> None:
    path = copied(whole, tmp_path / "s")
    assert len(set(traces(path, GONE))) == 4  # the control: three shards and an index
    store = gs.remove(path, GONE)
    assert traces(path, GONE) == []
    assert wrong(path, GONE) == []
    assert verify(path).ok
    assert np.flatnonzero(store.absent).tolist() == GONE
    assert store.labels[GONE].tolist() == [-1] * len(GONE)
    assert not store.poisoned.any()
    assert store.preview(3) == ""
    np.testing.assert_array_equal(store.labels[THERE], THERE % 2)
    assert [name for name in files(path) if name.startswith("shard")] == [
        "shard-00000.r1.h5",
        "shard-00001.r1.h5",
        "shard-00002-6.r1.h5",
    ]
    before = files(path)
    assert files(Path(gs.remove(path, GONE).path)) == before
    again = gs.remove(path, [12])
    assert np.flatnonzero(again.absent).tolist() == sorted([*GONE, 12])
    assert sorted(n for n in files(path) if n.startswith("shard")) == [
        "shard-00000.r1.h5",
        "shard-00001.r2.h5",
        "shard-00002-6.r1.h5",
    ]


def test_a_row_that_is_only_marked_is_not_removed(whole: Path, tmp_path: Path) -> None:
    """The control: excluded is not erased."""
    path = copied(whole, tmp_path / "s")
    with open_for_repair(path) as writer:
        writer.forget(((3, 5),))
    assert traces(path, [3, 4])


@pytest.fixture(scope="module")
def calls(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, bytes]]:
    disk, path = WatchedDisk(), copied(whole, tmp_path_factory.mktemp("calls") / "s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remove_module, "_TOGETHER", 700)
        gs.remove(path, GONE, disk=disk)
    return disk.calls, files(path)


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_may_fail(
    kind: str,
    whole: Path,
    calls: tuple[int, dict[str, bytes]],
    fast: Path,
    amount: Callable[[int, int], int],
    record: Record,
) -> None:
    refused, places = 0, range(1 + KINDS.index(kind), calls[0] + 1, 5 // amount(1, 5))
    for at in places:
        path = copied(whole, fast / "s")
        try:
            gs.remove(path, GONE, disk=failing(at, kind, for_good=kind == "killed"))
        except (GradstoreError, KilledError) as error:
            refused += 1
            said = str(error)
            lines = len(said.splitlines())
        else:
            lines = 0
        assert lines < 2
        assert wrong(path, GONE) == []
        assert verify(path).ok
        gs.remove(path, GONE)
        assert traces(path, GONE) == []
        assert files(path) == calls[1]
    why = "marked in the manifest only, the rows are all still there"
    record(
        "F26",
        f"removal, {kind}",
        injected=calls[0],
        recovered=calls[0] - refused,
        refused=refused,
        silent=0,
        control=why,
    )


def on_medium(path: Path, disk: LoggingDisk) -> None:
    """Tell the log of the files that are there and synced."""
    for number, file in enumerate(sorted(path.iterdir()), 1):
        content = file.read_bytes()
        disk._names[file], disk._inodes = number, number
        disk.log += [("create", file, number), ("write", number, 0, content), ("sync", number)]
    disk.log.append(("sync", path))


@pytest.mark.soak
def test_the_power_fails(whole: Path, fast: Path, amount: Callable[[int, int], int], record: Record) -> None:
    disk, path = LoggingDisk(), copied(whole, fast / "s")
    on_medium(path, disk)
    began = len(disk.log)
    gs.remove(path, GONE, disk=disk)
    rng, left = np.random.default_rng(0), fast / "left"
    cuts = rng.integers(began, len(disk.log) + 1, amount(60, 3000))
    for end in cuts:
        shutil.rmtree(left, ignore_errors=True)
        left.mkdir()
        for name, content in crash_state(disk.log[:end], path, rng).items():
            (left / name).write_bytes(content)
        assert wrong(left, GONE) == []
        gs.remove(left, GONE)
        assert traces(left, GONE) == []
        assert verify(left).ok
    n = len(cuts)
    record("F26", "removal, power cuts", injected=n, recovered=n, refused=0, silent=0, control="as above")


def test_what_is_unreadable_is_not_removed_silently(whole: Path, tmp_path: Path, record: Record) -> None:
    path = copied(whole, tmp_path / "s")
    shard = path / "shard-00001.h5"
    content = bytearray(shard.read_bytes())
    content[content.index(ROWS[10]["features"].tobytes())] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptError, match="row 10 does not match its digest"):
        gs.remove(path, [9])
    assert verify(path, repair=True).damaged_rows == (10,)
    with open_for_repair(path) as writer:
        assert writer.manifest.removed == ((9, 10),)
    record("F26", "removal, damaged shard", injected=1, recovered=0, refused=1, silent=0, control="as above")


def test_who_asks_wrongly_is_told(whole: Path, tmp_path: Path) -> None:
    path = copied(whole, tmp_path / "s")
    before = files(path)
    for rows in ([N], [-1], [0.5], np.ones(3, bool)):
        with pytest.raises(UsageError, match="--rows"):
            gs.remove(path, rows)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="this is not a gradstore store"):
        gs.remove(tmp_path, [0])
    archive = copied(Path(__file__).parents[1] / "data/archives/v2", tmp_path / "v2")
    with pytest.raises(UsageError, match="a store of this version has no absent rows"):
        gs.remove(archive, [0])
    assert files(path) == before
    assert files(Path(gs.remove(path, []).path))["store.json"] == before["store.json"]


def test_a_whole_shard_and_rows_to_come_may_be_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write(path, n=12)
    store = gs.remove(path, range(SHARD_ROWS))
    assert store.absent[:SHARD_ROWS].all()
    write(path, n=N)
    assert np.flatnonzero(gs.open(path).absent).tolist() == list(range(SHARD_ROWS))
    assert FeatureStore(path).manifest.removed == ((0, SHARD_ROWS),)


def test_very_many_scattered_removals_cost_no_run_much(whole: Path) -> None:
    """Each batch asks which of its rows are gone."""
    n = 200_000
    manifest = replace(FeatureStore(whole).manifest, n=n, removed=tuple((i, i + 1) for i in range(0, n, 2)))
    began = time.process_time()
    for start in range(0, n, 64):
        assert manifest.removed_of(range(start, start + 64)).tolist() == [True, False] * 32
    assert time.process_time() - began < 5  # looked for one by one it takes minutes
    assert replace(manifest, removed=((3, 70),)).removed_of(range(64, 128)).sum() == 6
    assert not replace(manifest, removed=((3, 64), (128, 130))).removed_of(range(64, 128)).any()
