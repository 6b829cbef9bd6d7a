"""Locks where a file system has no `flock`, and lock files and run logs that are no files."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Record
from faulty_disk import KilledError, WatchedDisk, failing, without_flock
from forking import Forks
from small_store import columns, data, files, fill, plan, write
from synthetic import clustered, write_store

from gradstore.errors import CorruptError, LockedError, UnsafeError, UsageError
from gradstore.kernels.gram import gram
from gradstore.kernels.gram_file import open_gram_writer
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files import owner_file
from gradstore.store.files.disk import Disk
from gradstore.store.files.lock import OWNER, writer_lock
from gradstore.store.files.lock_owner import Owner
from gradstore.store.files.owner_file import STALE, owner_lock
from gradstore.store.store_writer import open_for_repair, open_writer

pytestmark = pytest.mark.soak
NO_FLOCK = ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP")
PLAINLY_OPENED = "opened as it stands: a link leads to another file, and a pipe waits for ever"
DEAD = {"pid": 999_999_999, "started": "1"}


def stale(path: Path, *, elsewhere: bool = False, age: float = 0.0) -> str:
    """Put the lock of a dead owner at `path`; its number."""
    owner = replace(Owner.here(), **(DEAD if not elsewhere else {"host": "elsewhere"}))  # type: ignore[arg-type]
    path.write_text(json.dumps(vars(owner)))
    now = os.stat(path).st_mtime
    os.utime(path, (now - age, now - age))
    return owner.number


@pytest.mark.parametrize("kind", NO_FLOCK)
def test_a_store_is_written_and_locked_without_flock(kind: str, fast: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = fast / "store"
    write(fast / "whole")
    caplog.set_level(logging.INFO, "gradstore")
    with open_writer(path, plan(), without_flock(kind), data) as writer:
        assert caplog.messages == [f"this file system has no flock; {path} is locked by the file .lock.owner"]
        for contender in (Disk(), without_flock(kind)):
            wanted = rf"store: another process is writing here \(got pid {os.getpid()} on host .*\)\. Wait for"
            with pytest.raises(LockedError, match=wanted), open_for_repair(path, contender):
                pass
        fill(writer)
    assert files(path) == files(fast / "whole")
    assert not list(path.glob(".lock.owner*"))
    with (
        pytest.raises(UsageError, match=r"this file system has no flock\. Use --lock auto"),
        open_writer(path, plan(), without_flock(kind), data, lock="flock"),
    ):
        pass


@pytest.mark.parametrize("flock", [True, False])
def test_writers_of_all_ways_keep_one_another_out(flock: bool, fast: Path) -> None:
    def disk() -> Disk:
        return Disk() if flock else without_flock()

    write(fast / "store")
    ways = ("auto", "flock", "file") if flock else ("auto", "file")
    for held in ways:
        with writer_lock(fast / "store", disk(), held):
            for wanted in ways:
                with pytest.raises(LockedError) as refused, writer_lock(fast / "store", disk(), wanted):
                    pass
                assert refused.value.exit_code == 6
            with writer_lock(fast / "store", disk(), "none"):  # what its user takes on
                pass
    with pytest.raises(UsageError, match="--lock: unknown lock"), writer_lock(fast / "store", disk(), "mine"):
        pass


def test_an_owner_that_dies_is_followed_at_once_on_its_host(fast: Path) -> None:
    path, said = fast / "store", fast / "said"
    with Forks() as forks:
        (pid,) = forks.start({"job": "hold", "path": str(path), "said": str(said), "locks": True, "flock": False})
        while not said.exists():
            time.sleep(0.002)
        with pytest.raises(LockedError, match=f"got pid {pid} on host"), open_writer(path, plan(), without_flock()):
            pass
        os.kill(pid, signal.SIGKILL)
        forks.statuses()
    assert (path / OWNER).exists()
    began = time.monotonic()
    write(path, disk=without_flock())
    assert time.monotonic() - began < 5
    assert FeatureStore(path).complete


def test_an_owner_elsewhere_is_alive_while_its_file_is_dated(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)  # this machine's clock is of no account
    write(fast / "store")
    for age, dead in ((0.0, False), (STALE - 5, False), (STALE + 5, True)):
        stale(fast / "store" / OWNER, elsewhere=True, age=age)
        if not dead:
            with pytest.raises(LockedError, match="on host elsewhere"), open_for_repair(fast / "store"):
                pass
        write(fast / "store", disk=without_flock()) if dead else None
    monkeypatch.setattr(owner_file, "BEAT", 0.01)
    with owner_lock(fast / OWNER, Disk()):
        first = os.stat(fast / OWNER).st_mtime_ns
        time.sleep(0.2)
        assert os.stat(fast / OWNER).st_mtime_ns > first


def test_one_of_many_takes_over_from_a_dead_owner(
    fast: Path, amount: Callable[[int, int], int], record: Record
) -> None:
    rounds, attempts, refused = amount(8, 100), 0, 0
    with Forks() as forks:
        for i in range(rounds):
            path, said, writers = fast / f"store{i}", fast / f"said{i}", 2 + i % 7
            path.mkdir()
            stale(path / OWNER, elsewhere=bool(i % 2), age=STALE + 5)
            order = {"job": "hold", "path": str(path), "said": str(said), "locks": True, "flock": False}
            forks.start(*[order] * writers)
            lines: list[str] = []
            deadline = time.monotonic() + 20
            while len(lines) < writers:
                assert time.monotonic() < deadline, lines
                time.sleep(0.003)
                lines = said.read_text().splitlines() if said.exists() else []
            Path(f"{said}.go").touch()
            assert forks.statuses() == [0] * writers
            assert sum(line.startswith("won") for line in lines) == 1, lines
            assert all(line.startswith(("won", "exit 6: ")) for line in lines), lines
            assert FeatureStore(path).complete
            assert not list(path.glob(".lock.owner*.new"))
            attempts, refused = attempts + writers, refused + writers - 1
            shutil.rmtree(path)
    why = f"a dead owner's file removed and made anew: {owners_by_removing(fast)} of 2 writers proceed"
    record("F7", "locks without flock, and a dead owner", injected=attempts, recovered=rounds, refused=refused,
           silent=0, control=why)  # fmt: skip


def owners_by_removing(fast: Path) -> int:
    """The control: both have seen that the owner is dead, and each removes the file and makes its own."""
    path, won = fast / "naive", 0
    stale(path)
    for _ in ("one", "another"):
        path.unlink()
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        won += 1
    assert won == 2
    return won


def killed_attempt(path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A process that dies at its `at`-th call to the disk while it has or wants the lock; whether it came so far."""

    def die(name: str, arguments: tuple[object, ...]) -> None:
        if disk.calls >= at:
            raise KilledError

    disk, here = WatchedDisk(die), Owner.here
    with monkeypatch.context() as patch:
        patch.setattr(Owner, "here", lambda: replace(here(), **DEAD))  # type: ignore[arg-type]
        try:
            with owner_lock(path, disk):
                pass
        except KilledError:
            return True
    return False


def test_a_takeover_may_die_at_any_call(
    fast: Path, amount: Callable[[int, int], int], monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    path, chance, at, killed, kills = fast / OWNER, random.Random(0), 1, True, 0
    while killed:
        stale(path)
        killed = killed_attempt(path, at, monkeypatch)
        kills += killed
        with owner_lock(path, Disk()) as held:
            held.require_held()
        assert not path.exists()
        at += 1
    assert at > 12
    for _ in range(amount(100, 2000)):  # several that die one after another, within one another's takeovers
        stale(path)
        for _ in range(chance.randrange(1, 6)):
            kills += killed_attempt(path, chance.randrange(1, at), monkeypatch)
        with owner_lock(path, Disk()) as held:
            held.require_held()
            with pytest.raises(LockedError), owner_lock(path, Disk()):
                pass
        for old in fast.glob(".lock.owner*"):
            os.utime(old, (0, 0))
    with owner_lock(path, Disk()):
        assert len(list(fast.glob(".lock.owner*"))) == 2  # the lock and its owner's name for it
    why = f"a dead owner's file removed and made anew: {owners_by_removing(fast)} of 2 writers proceed"
    record("F7", "a takeover killed at any call", injected=kills, recovered=kills, refused=0, silent=0, control=why)


def test_a_gram_matrix_is_locked_without_flock(fast: Path) -> None:
    store = write_store(fast / "store", clustered(40, 2, 32))
    tiles = gram(store, memory="64MB")
    attributes: dict[str, str | int] = {"formula": "any", "symmetric": 1}
    (tile,) = tiles
    with open_gram_writer(fast / "g.h5", (40, 40), "float32", attributes, without_flock()) as writer:
        with (
            pytest.raises(LockedError, match="another process is writing this Gram matrix"),
            open_gram_writer(fast / "g.h5", (40, 40), "float32", attributes, without_flock()),
        ):
            pass
        writer.write(tile)
    assert sorted(os.listdir(fast)) == ["g.h5", "store"]


def test_who_was_taken_for_dead_publishes_nothing(fast: Path) -> None:
    path = fast / "store"
    write(path)
    with open_writer(path, plan(40), without_flock(), data) as writer:
        before = (path / "store.json").read_bytes()
        os.replace(path / OWNER, path / "kept")
        stale(path / OWNER, elsewhere=True)
        with pytest.raises(LockedError, match="this process has lost the lock"), writer.shard(3) as shard:
            shard.write(columns(range(24, 32)))
        with pytest.raises(LockedError, match="lost the lock"):
            writer.drop([0])
        assert (path / "store.json").read_bytes() == before
    assert (path / OWNER).exists(), "which is another's"


@pytest.mark.parametrize("name", [".lock", "run.jsonl", "store.journal", OWNER])
@pytest.mark.parametrize("made", ["fifo", "link", "directory"])
def test_a_foreign_store_in_which_a_pipe_or_link_stands_for_a_file(
    name: str, made: str, fast: Path, record: Record
) -> None:
    path, victim = fast / "store", fast / "victim"
    write(path)
    victim.write_text("mine")
    (path / name).unlink(missing_ok=True)
    if made == "fifo":
        os.mkfifo(path / name)
    elif made == "link":
        (path / name).symlink_to(victim)
    else:
        (path / name).mkdir()
    with pytest.raises((UnsafeError, UsageError)) as refused, open_writer(path, plan(), None, data) as writer:
        writer.log(event="start")
    assert "\n" not in str(refused.value)
    assert victim.read_text() == "mine"
    record("S3", "pipes, links and folders in the place of a store's files", injected=1, recovered=0, refused=1,
           silent=0, control=PLAINLY_OPENED)  # fmt: skip


def test_an_error_while_locking_leaves_no_lock(fast: Path) -> None:
    path = fast / OWNER
    disk = WatchedDisk()
    with owner_lock(path, disk):
        pass
    for at in range(1, disk.calls + 1):
        with suppress(CorruptError), owner_lock(path, failing(at, "EIO", False)):
            pass
        assert not path.exists()
