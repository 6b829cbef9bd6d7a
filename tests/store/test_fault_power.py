"""F3: the power fails. What was not synced may be lost, torn, or there in another order."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Record
from faulty_disk import LoggingDisk
from small_store import SHARD_ROWS, files, write, wrong_rows

from gradstore.errors import GradstoreError
from gradstore.store import store_writer
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.journal import JOURNAL

pytestmark = pytest.mark.soak
SECTOR = 512
SHORT, LONG = 12, 18


@dataclass
class Inode:
    """A file: what is on the medium, and what was done since."""

    durable: bytes = b""
    pending: list[tuple[Any, ...]] = field(default_factory=list)


def crash_state(log: list[tuple[Any, ...]], root: Path, rng: np.random.Generator) -> dict[str, bytes]:
    """Files of the store in `root` that a power cut after these events may leave.

    Of each file's unsynced writes any subset is there, in any order, torn at sectors; of the names changed since the
    directory was synced, any subset too. Only what was synced is certain.
    """
    inodes: dict[int, Inode] = {}
    durable: dict[Path, int] = {}
    pending: list[tuple[Any, ...]] = []
    for event in log:
        kind, subject = event[0], event[1]
        if kind == "create":
            inodes[event[2]] = Inode()
        if kind in ("create", "rename", "unlink"):
            pending.append(event)
        elif kind in ("write", "size"):
            inodes[subject].pending.append(event)
        elif kind == "sync" and subject == root:
            durable, pending = named(durable, pending), []
        elif kind == "sync" and isinstance(subject, int):
            inodes[subject] = Inode(applied(inodes[subject].durable, inodes[subject].pending))
    kept = [event for event in pending if rng.random() < 0.5]
    contents = {i: torn(inode, rng) for i, inode in inodes.items()}
    return {path.name: contents[i] for path, i in named(durable, kept).items()}


def named(names: dict[Path, int], events: list[tuple[Any, ...]]) -> dict[Path, int]:
    names = dict(names)
    for event in events:
        if event[0] == "create":
            names[event[1]] = event[2]
        elif event[0] == "rename":
            names.pop(event[1], None)
            names[event[2]] = event[3]
        else:
            names.pop(event[1], None)
    return names


def applied(content: bytes, events: list[tuple[Any, ...]]) -> bytes:
    out = bytearray(content)
    for event in events:
        if event[0] == "size":
            out = out[: event[2]] + bytes(max(0, event[2] - len(out)))
        else:
            _, _, offset, data = event
            out += bytes(max(0, offset + len(data) - len(out)))
            out[offset : offset + len(data)] = data
    return bytes(out)


def torn(inode: Inode, rng: np.random.Generator) -> bytes:
    """Unsynced events dropped, reordered, and writes cut into sectors of which some are there."""
    events = []
    for event in inode.pending:
        if rng.random() < 0.4:
            continue
        if event[0] == "write" and rng.random() < 0.5:
            _, inode_number, offset, data = event
            cut = int(rng.integers(0, len(data) // SECTOR + 1)) * SECTOR
            event = (
                ("write", inode_number, offset, data[:cut])
                if rng.random() < 0.5
                else ("write", inode_number, offset + cut, data[cut:])
            )
        events.append(event)
    return applied(inode.durable, [events[i] for i in rng.permutation(len(events))])


def history(path: Path, disk: LoggingDisk, shard_rows: int) -> None:
    """Create a store, finish it, and append to its short last shard; the log says when a shard was reported stored."""
    for n in (SHORT, LONG):

        def stored(index: int, n: int = n) -> None:
            disk.log.append(("stored", index, min(shard_rows * (index + 1), n)))

        write(path, n=n, disk=disk, each=stored, shard_rows=shard_rows)


def acknowledged(log: list[tuple[Any, ...]]) -> int:
    """Rows reported as stored; the shards of this history come in order."""
    return max((event[2] for event in log if event[0] == "stored"), default=0)


def lost_rows(path: Path, rows: int) -> bool:
    """Whether one of the first `rows` is unreadable, or anything readable is wrong."""
    try:
        store = FeatureStore(path)
        return bool(wrong_rows(store)) or len(store) < rows
    except GradstoreError:
        return rows > 0


def run_states(
    path: Path, disk: LoggingDisk, states: int, shard_rows: int = SHARD_ROWS, *, resumed: bool = True
) -> list[tuple[int, bool]]:
    """(event of the cut, whether acknowledged rows were lost) for random power cuts, each followed by a resumed run."""
    rng = np.random.default_rng(0)
    history(path, disk, shard_rows)
    whole = files(path)
    made = (
        next(i for i, event in enumerate(disk.log) if event[0] == "sync" and event[1] == path.parent)
        if disk.syncs
        else 1
    )
    found = []
    for _ in range(states):
        at = int(rng.integers(made, len(disk.log) + 1))
        left = crash_state(disk.log[:at], path, rng)
        shutil.rmtree(path)
        path.mkdir()
        for name, content in left.items():
            (path / name).write_bytes(content)
        lost = lost_rows(path, acknowledged(disk.log[:at]))
        found.append((at, lost))
        if disk.syncs and resumed:
            write(path, n=LONG, shard_rows=shard_rows)
            assert files(path) == whole, f"resumed after a power cut at event {at}"
    return found


def test_power_cuts_lose_nothing_that_was_reported_stored(
    fast: Path, amount: Callable[[int, int], int], record: Record
) -> None:
    states = amount(3000, 20_000)
    found = run_states(fast / "store", LoggingDisk(), states)
    assert [at for at, lost in found if lost] == []
    control = sum(lost for _, lost in run_states(fast / "control", LoggingDisk(syncs=False), 200))
    assert control > 20
    what = "power cut at any event; unsynced writes lost, torn, reordered"
    why = f"the same writer without fsync: rows lost in {control} of 200 states"
    record("F3", what, injected=states, recovered=states, refused=0, silent=0, control=why)


class ForgetfulJournal(LoggingDisk):
    """A control: lines of the journal are written and never synced."""

    def _fsync(self, fd: int) -> None:
        if not os.readlink(f"/proc/self/fd/{fd}").endswith(JOURNAL):
            super()._fsync(fd)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the control finds names of descriptors in /proc")
def test_power_cuts_lose_no_line_of_a_journal(
    fast: Path, amount: Callable[[int, int], int], record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of two rows; the manifest is written anew after one or two lines."""
    monkeypatch.setattr(store_writer, "_LINES", 1)
    states = amount(300, 20_000)
    disk = LoggingDisk()
    found = run_states(fast / "store", disk, states, shard_rows=2)
    assert [at for at, lost in found if lost] == []
    appended = sum(event[0] == "sync" and event[1] in journals(disk.log) for event in disk.log)
    assert appended > 3
    control = sum(
        lost for _, lost in run_states(fast / "control", ForgetfulJournal(), 100, shard_rows=2, resumed=False)
    )
    assert control > 2
    what = "power cut at any event of a journal"
    why = f"lines that are not synced: rows lost in {control} of 100 states"
    record("F3", what, injected=states, recovered=states, refused=0, silent=0, control=why)


def journals(log: list[tuple[Any, ...]]) -> set[int]:
    """Files that had the journal's name."""
    return {event[3] for event in log if event[0] == "rename" and event[2].name == JOURNAL}
