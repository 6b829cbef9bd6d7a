"""F17: any history of writing, killing, damaging, appending and repairing, against a model in memory."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from conftest import Record
from faulty_disk import KilledError, failing
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from small_store import ROWS, SHARD_ROWS, files, plan, write, wrong_rows

from gradstore.errors import GradstoreError, MismatchError
from gradstore.store import store_writer
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.disk import Disk
from gradstore.store.files.journal import JOURNAL
from gradstore.store.store_writer import open_writer
from gradstore.store.verify import verify

pytestmark = pytest.mark.soak
LONGEST = 40


class History(RuleBasedStateMachine):
    """The model: how many rows the split has, which shards were reported stored, which of them were damaged."""

    whole: ClassVar[dict[int, dict[str, bytes]]] = {}
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.path = Path(self.folder.name) / "store"
        self.n = 0
        self.stored: set[int] = set()
        self.damaged: set[int] = set()
        self.handle: FeatureStore | None = None

    def teardown(self) -> None:
        self.folder.cleanup()

    @property
    def exists(self) -> bool:
        return (self.path / "store.json").exists()

    def reported(self, index: int) -> None:
        self.stored.add(index)
        self.damaged.discard(index)

    def finish(self, n: int) -> None:
        """Write without faults; nothing may be left of what happened before."""
        write(self.path, n, each=self.reported)
        self.n, self.damaged, self.stored = n, set(), set(range(-(-n // SHARD_ROWS)))
        assert files(self.path) == self.fresh(n)

    def fresh(self, n: int) -> dict[str, bytes]:
        """The store of n rows, written at once."""
        if n not in self.whole:
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder) / "store", n)
                self.whole[n] = files(Path(folder) / "store")
        return self.whole[n]

    def grow(self, rows: int) -> int:
        return min(LONGEST, max(self.n, 1) + rows)

    @rule(rows=st.integers(0, 12))
    def create_continue_or_append(self, rows: int) -> None:
        History.steps += 1
        self.finish(self.grow(rows))

    @rule(rows=st.integers(0, 12), at=st.integers(1, 150), kind=st.sampled_from(["killed", "EIO", "ENOSPC"]))
    def be_interrupted(self, rows: int, at: int, kind: str) -> None:
        History.steps += 1
        n = self.grow(rows)
        try:
            write(self.path, n, failing(at, kind, for_good=True), self.reported)
        except (KilledError, GradstoreError):
            self.n = FeatureStore(self.path).manifest.n if self.exists else 0
            # A damaged shard is dropped before it is computed again, and only then.
            dropped = (
                self.damaged - {s.index for s in FeatureStore(self.path).manifest.shards} if self.exists else set()
            )
            self.stored, self.damaged = self.stored - dropped, self.damaged - dropped
            if self.exists:
                self.damaged &= {row // SHARD_ROWS for row in verify(self.path).damaged_rows}
        else:
            self.n = n
            self.damaged = set()

    @precondition(lambda self: self.exists and self.stored)
    @rule(pick=st.integers(0, 10**9), byte=st.integers(0, 10**9), kind=st.sampled_from(["flip", "cut", "delete"]))
    def damage(self, pick: int, byte: int, kind: str) -> None:
        manifest = FeatureStore(self.path).manifest
        if not manifest.shards:
            return
        shard = manifest.shards[pick % len(manifest.shards)]
        file = self.path / manifest.file_of(shard.index)
        if not file.exists():
            return
        data = bytearray(file.read_bytes())
        if kind == "delete" or not data:
            file.unlink()
        elif kind == "cut":
            file.write_bytes(data[: byte % len(data)])
        else:
            data[byte % len(data)] ^= 4
            file.write_bytes(data)
        # The same bit flipped twice is no damage.
        intact = kind == "flip" and bytes(data) == self.fresh(manifest.n).get(file.name)
        self.damaged = self.damaged - {shard.index} if intact else self.damaged | {shard.index}
        self.handle = None

    @precondition(lambda self: self.exists)
    @rule()
    def repair(self) -> None:
        found = verify(self.path, repair=True)
        assert {row // SHARD_ROWS for row in found.damaged_rows} == self.damaged
        self.stored -= self.damaged
        self.damaged = set()
        assert verify(self.path).ok

    @precondition(lambda self: self.exists)
    @rule()
    def ask_for_another_identity(self) -> None:
        before = files(self.path)
        with pytest.raises(MismatchError, match=r"projection\.seed"), open_writer(self.path, plan(self.n, seed=1)):
            pass
        assert files(self.path) == before

    @precondition(lambda self: self.exists)
    @rule()
    def leave_litter(self) -> None:
        (self.path / ".shard-00001.h5.tmp").write_bytes(b"torn")
        (self.path / ".store.json.tmp").write_bytes(b"torn")
        (self.path / ".store.journal.tmp").write_bytes(b"torn")

    @precondition(lambda self: self.exists and (self.path / JOURNAL).exists())
    @rule()
    def tear_a_line(self) -> None:
        with (self.path / JOURNAL).open("ab") as file:
            file.write(b'{"columns": {"absent')

    @rule()
    def delete(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.n, self.stored, self.damaged, self.handle = 0, set(), set(), None

    @invariant()
    def stored_rows_are_right(self) -> None:
        """P1: no row reported stored is lost, doubled or wrong, and damaged ones are known."""
        if not self.exists:
            assert not self.stored
            return
        store = FeatureStore(self.path, disk=Disk())
        assert {shard.index for shard in store.manifest.shards} >= self.stored
        assert {row // SHARD_ROWS for row in verify(self.path).damaged_rows} == self.damaged
        if not self.damaged:
            assert wrong_rows(store) == []

    @precondition(lambda self: self.exists and not self.damaged)
    @rule(row=st.integers(0, LONGEST))
    def read_with_an_old_handle(self, row: int) -> None:
        self.handle = self.handle or FeatureStore(self.path)
        try:
            got = self.handle.read(row, row + 1)
        except GradstoreError as error:
            self.handle = None
            if error.exit_code != 2:
                raise
        else:
            assert np.array_equal(got["features"][0], ROWS[row]["features"])


def test_any_history_keeps_the_promises(amount: object, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "_LINES", 1)  # so that a journal of few shards is written anew as a manifest
    examples = amount(200, 3000)  # type: ignore[operator]
    History.steps = 0
    run_state_machine_as_test(
        History,
        settings=settings(
            max_examples=examples,
            stateful_step_count=15,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        ),
    )
    control = forgetful_writer()
    record(
        "F17",
        "histories of up to 15 steps",
        injected=examples,
        recovered=examples,
        refused=0,
        silent=0,
        control=f"a manifest written before its shard: {control} rows reported stored that are not",
    )


def forgetful_writer() -> int:
    """The control: the shard is listed before it has its name, and the process is killed in between."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        write(path)
        (path / "shard-00001.h5").unlink()
        damaged = len(verify(path).damaged_rows)
    assert damaged == SHARD_ROWS
    return damaged
