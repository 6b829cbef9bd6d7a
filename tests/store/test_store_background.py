"""Rows written in the background: the same store, errors and order of calls as when each row is waited for."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from faulty_disk import WatchedDisk, failing
from small_store import GROUP, SHARD_ROWS, N, columns, data, files, plan, write, wrong_rows

from gradstore.errors import GradstoreError, NonFiniteError
from gradstore.store.background_writer import AHEAD, BackgroundWriter, in_background
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files import shard_writer
from gradstore.store.files.disk import Disk
from gradstore.store.store_writer import StoreWriter, open_writer

Call = tuple[str, object]


def parts(stop: int = N) -> list[range]:
    return [
        range(start, min(start + GROUP, shard + SHARD_ROWS, stop))
        for shard in range(0, stop, SHARD_ROWS)
        for start in range(shard, min(shard + SHARD_ROWS, stop), GROUP)
    ]


def hand_over(background: BackgroundWriter, stop: int = N) -> None:
    for part in parts(stop):
        background.write(partial(columns, part))


def write_waiting(writer: StoreWriter) -> None:
    """The reference: each row is written before the next one is made."""
    for index in writer.missing:
        rows = writer.manifest.rows_of(index)
        with writer.shard(index) as shard:
            for part in parts():
                if part.start in rows:
                    shard.write(columns(part))


def write_behind(writer: StoreWriter) -> None:
    with in_background(writer) as background:
        hand_over(background)


def calls(path: Path, write_rows: Callable[[StoreWriter], None]) -> tuple[list[Call], set[int]]:
    """(each call to the disk with its last argument, threads that wrote)."""
    seen: list[Call] = []
    threads: set[int] = set()

    def before(name: str, arguments: tuple[object, ...]) -> None:
        last = bytes(arguments[1]) if name == "_pwrite" else arguments[-1]  # type: ignore[call-overload]
        seen.append((name, last.name if isinstance(last, Path) else last))
        if name == "_pwrite" and b"digest" not in bytes(arguments[1]):  # type: ignore[call-overload]
            threads.add(threading.get_ident())

    with open_writer(path, plan(), WatchedDisk(before), data) as writer:
        seen.clear()
        threads.clear()
        write_rows(writer)
    return seen, threads


def test_the_calls_are_those_of_a_writer_that_waits(fast: Path) -> None:
    waiting, here = calls(fast / "waiting", write_waiting)
    behind, there = calls(fast / "behind", write_behind)
    assert behind == waiting
    assert here == {threading.get_ident()}
    assert len(there) == 1
    assert there != here
    assert files(fast / "behind") == files(fast / "waiting")


def test_no_thread_is_on_its_last_steps_when_the_block_has_ended(fast: Path) -> None:
    """An interpreter that ended meanwhile would crash."""
    for number in range(20):
        with open_writer(fast / str(number), plan(), None, data) as writer, in_background(writer) as background:
            hand_over(background)
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("gradstore-")] == []


def groups_stored(writer: StoreWriter) -> int:
    return sum(-(-shard.rows // GROUP) for shard in writer.manifest.shards)


def test_few_batches_are_on_their_way(fast: Path) -> None:
    made, most, lock = [0], [0], threading.Lock()

    def make(part: range) -> dict[str, np.ndarray]:
        with lock:
            made[0] += 1
        return columns(part)

    def before(name: str, arguments: tuple[object, ...]) -> None:
        if threading.current_thread().name == "gradstore-writer":
            time.sleep(0.005)

    with open_writer(fast / "store", plan(), WatchedDisk(before), data) as writer, in_background(writer) as background:
        for i, part in enumerate(parts()):
            background.write(partial(make, part))
            most[0] = max(most[0], i + 1 - groups_stored(writer))
    assert made[0] == len(parts())
    assert most[0] <= SHARD_ROWS // GROUP + AHEAD  # a shard's groups count once it is published


def test_an_error_of_the_rows_comes_at_the_next_hand_over(fast: Path) -> None:
    error = NonFiniteError("row 9 is bad", where="here")

    def bad(part: range) -> dict[str, np.ndarray]:
        if 9 in part:
            raise error
        return columns(part)

    with open_writer(fast / "store", plan(), None, data) as writer:
        handed = []
        with pytest.raises(NonFiniteError) as raised:
            write_slowly(writer, bad, handed)
        assert raised.value is error
        assert len(handed) == 3  # the third has row 9, the fourth is refused
        assert sorted(p.name for p in (fast / "store").iterdir()) == [".lock", "shard-00000.h5", "store.json"]
        assert wrong_rows(FeatureStore(fast / "store")) == []
        write_behind_rest(writer)
    assert FeatureStore(fast / "store").complete


def write_slowly(writer: StoreWriter, make: Callable[[range], dict[str, np.ndarray]], handed: list[range]) -> None:
    with in_background(writer) as background:
        for part in parts():
            background.write(partial(make, part))
            handed.append(part)
            time.sleep(0.05)


def write_behind_rest(writer: StoreWriter) -> None:
    with in_background(writer) as background:
        for part in parts():
            if part.start // SHARD_ROWS in writer.missing:
                background.write(partial(columns, part))


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("at", [14, 30, 60, 90])
def test_an_error_of_the_disk_says_what_it_says_without_a_thread(kind: str, at: int, fast: Path) -> None:
    said = []
    for write_rows in (write_waiting, write_behind):
        with (
            pytest.raises(GradstoreError) as error,
            open_writer(fast / "store", plan(), failing(at, kind, True), data) as writer,
        ):
            write_rows(writer)
        said.append((error.value.exit_code, re.sub(r"\d+ bytes free", "", str(error.value))))
        shutil.rmtree(fast / "store")
    assert said[0] == said[1]
    assert said[0][0] == {"EIO": 5, "ENOSPC": 7}[kind]


@pytest.mark.parametrize("stop", [3, 8, 12, 16, 20])
def test_an_owner_that_fails_keeps_the_shards_handed_over_whole(stop: int, fast: Path) -> None:
    with open_writer(fast / "store", plan(), None, data) as writer:
        with pytest.raises(KeyError):
            fail_after(writer, stop)
        assert len(FeatureStore(fast / "store")) == stop // SHARD_ROWS * SHARD_ROWS
        assert not list((fast / "store").glob(".shard*"))
        write_behind_rest(writer)
    write(fast / "whole")
    assert files(fast / "store") == files(fast / "whole")


def fail_after(writer: StoreWriter, stop: int) -> None:
    with in_background(writer) as background:
        hand_over(background, stop)
        raise KeyError


def test_rows_that_end_within_a_shard_are_refused(fast: Path) -> None:
    with (
        pytest.raises(ValueError, match="shard 1 ends at row 12, not 16"),
        open_writer(fast / "store", plan(), None, data) as writer,
        in_background(writer) as background,
    ):
        hand_over(background, 12)
    assert len(FeatureStore(fast / "store")) == 8


@pytest.mark.parametrize(("signals", "stored"), [(1, 16), (2, 8)])
def test_a_signal_while_the_last_rows_are_written(signals: int, stored: int, fast: Path) -> None:
    """Asked once to stop, it stores what was handed over; asked twice, it removes the shard begun."""

    def before(name: str, arguments: tuple[object, ...]) -> None:
        if threading.current_thread().name == "gradstore-writer":
            time.sleep(0.02)

    with open_writer(fast / "store", plan(), WatchedDisk(before), data) as writer:
        with pytest.raises(KeyboardInterrupt):
            be_interrupted(writer, signals)
        time.sleep(0.01)
        assert "gradstore-writer" not in {thread.name for thread in threading.enumerate()}
        assert len(FeatureStore(fast / "store")) == stored
        assert not list((fast / "store").glob(".shard*"))
        assert wrong_rows(FeatureStore(fast / "store")) == []


def be_interrupted(writer: StoreWriter, signals: int) -> None:
    def interrupt() -> None:
        for _ in range(signals):
            time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

    with in_background(writer) as background:
        hand_over(background, 16)
        threading.Thread(target=interrupt).start()


def test_the_medium_is_asked_early_and_its_refusal_ignored(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Refusing(Disk):
        def _begin_sync(self, fd: int) -> None:
            super()._begin_sync(fd)
            asked.append(fd)
            raise OSError(5, "no")

    write(fast / "whole", disk=Refusing())
    assert asked == []  # eight megabytes first
    monkeypatch.setattr(shard_writer, "_UNHURRIED", 1)
    write(fast / "store", disk=Refusing())
    assert len(asked) == len(parts())
    assert files(fast / "store") == files(fast / "whole")


def test_rows_out_of_order_are_refused(fast: Path) -> None:
    with (
        pytest.raises(ValueError, match="rows of shard 0 come in order from 0"),
        open_writer(fast / "store", plan(), None, data) as writer,
        in_background(writer) as background,
    ):
        background.write(lambda: {**columns(range(4)), "row": np.arange(1, 5)})
