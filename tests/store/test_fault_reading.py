"""Errors while a store is verified or continued: what could not be read is no damage, and nothing of it is removed."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from conftest import Record
from faulty_disk import WatchedDisk, failing
from small_store import files, write, wrong_rows

from gradstore.errors import CorruptError, GradstoreError, UsageError
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.disk import Disk
from gradstore.store.files.manifest_file import read_manifest
from gradstore.store.schema import Schema
from gradstore.store.store_writer import open_for_repair
from gradstore.store.verify import Verification, find_damage, verify

pytestmark = pytest.mark.soak
LACKING = ("EMFILE", "EACCES", "ENOMEM", "ENFILE", "EPERM")
FAILING = ("EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO")


@pytest.fixture
def store(fast: Path) -> Path:
    write(fast / "store")
    return fast / "store"


def cases(store: Path, kinds: Sequence[str]) -> Iterator[tuple[str, bool, int]]:
    """Each error at each call of `verify --repair`, once and from then on."""
    disk = WatchedDisk()
    verify(store, repair=True, disk=disk)
    for kind in kinds:
        for for_good in (False, True):
            for at in range(1, disk.calls + 1):
                yield kind, for_good, at


@pytest.mark.parametrize(
    "way", [lambda path, disk: verify(path, repair=True, disk=disk), write], ids=["verify", "write"]
)
def test_no_error_while_reading_costs_a_shard(
    way: Callable[..., object], store: Path, amount: Callable[[int, int], int], record: Record
) -> None:
    whole = files(store)
    injected = refused = 0
    each = amount(2, 5)
    for kind, for_good, at in cases(store, (*LACKING[:each], *FAILING[:each])):
        injected += 1
        error = refusal(way, store, failing(at, kind, for_good))
        if error is not None:
            refused += 1
            assert error.exit_code == (2 if kind in LACKING else 5), error
            assert not re.search("damaged|\n", str(error))
        assert files(store) == whole
    assert wrong_rows(FeatureStore(store)) == []
    lost = shards_that_the_old_rule_drops(store)
    why = f"a failed read taken for damage: {lost} of 3 intact shards removed"
    what = "errors while verifying and repairing" if way is not write else "errors while verifying and continuing"
    record("F18", what, injected=injected, recovered=injected - refused, refused=refused, silent=0, control=why)


def refusal(way: Callable[..., object], store: Path, disk: Disk) -> GradstoreError | None:
    try:
        found = way(store, disk=disk)
        if isinstance(found, Verification):
            found.require_ok()
    except GradstoreError as error:
        return error
    return None


def shards_that_the_old_rule_drops(store: Path) -> int:
    """The control: what cannot be read is dropped like what is damaged."""

    def shards_fail(name: str, arguments: tuple[object, ...]) -> None:
        if name == "_open" and "shard" in Path(str(arguments[0])).name:
            raise OSError(errno.EIO, "Input/output error")

    disk = WatchedDisk(shards_fail)
    with open_for_repair(store) as writer:
        writer.drop(found.shard for found in find_damage(store, read_manifest(store, Disk()), disk))
    lost = 3 - len(list(store.glob("shard-*.h5")))
    assert lost == 3
    return lost


def test_what_cannot_be_read_is_named_and_kept_and_what_is_damaged_is_dropped(store: Path) -> None:
    (store / "shard-00001.h5").write_bytes(b"short")

    def first_fails(name: str, arguments: tuple[object, ...]) -> None:
        if name == "_open" and str(arguments[0]).endswith("shard-00000.h5"):
            raise OSError(errno.EIO, "Input/output error")

    found = verify(store, repair=True, disk=WatchedDisk(first_fails))
    assert [(d.shard, d.unread) for d in found.damage] == [(0, True), (1, False)]
    assert found.repaired
    line = (
        r"store/shard-00000\.h5: 8 rows cannot be read, so that nobody knows whether they are intact: 0-7 \(got the "
        r"disk reports a failure: Input/output error\)\. The file was kept\. .* delete the file yourself"
    )
    with pytest.raises(CorruptError, match=line):
        found.require_ok()
    assert not (store / "shard-00001.h5").exists()
    with pytest.raises(CorruptError, match=line):
        write(store, disk=WatchedDisk(first_fails))
    (store / "shard-00000.h5").unlink()  # as the line says
    write(store)
    assert verify(store).ok


def test_an_error_that_passes_is_none(store: Path) -> None:
    disk = WatchedDisk()
    verify(store, disk=disk)
    for at in range(6, disk.calls + 1):  # after the five calls that read the manifest, of which one looks for a journal
        found = verify(store, disk=failing(at, "EIO", False))
        assert found.ok


def test_a_permission_that_is_missing_is_said(store: Path) -> None:
    def denied(name: str, arguments: tuple[object, ...]) -> None:
        if name == "_open" and "shard" in str(arguments[0]):
            raise OSError(errno.EACCES, "Permission denied")

    whole = files(store)
    with pytest.raises(UsageError, match=r"shard-00000\.h5: this file may not be touched \(got Permission denied\)"):
        verify(store, repair=True, disk=WatchedDisk(denied))
    assert files(store) == whole


LIMITED = """
import json, os, resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from small_store import files
from gradstore.errors import GradstoreError
from gradstore.store.verify import verify
path, said, whole = Path(sys.argv[2]), [], files(Path(sys.argv[2]))
verify(path, repair=True)

def attempt(limit, soft):
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (soft, before[1]))
    try:
        verify(path, repair=True).require_ok()
        line = "ok"
    except GradstoreError as error:
        line = f"{error.exit_code} {error}"
    finally:
        resource.setrlimit(limit, before)
    said.append([line, files(path) == whole])

for more in range(5):
    attempt(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) - 1 + more)
print(json.dumps(said))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_a_process_that_runs_out_of_descriptors_drops_nothing(fast: Path) -> None:
    write(fast / "store", 4096, shard_rows=2048)
    code = [sys.executable, "-c", LIMITED, str(Path(__file__).parent.parent), str(fast / "store")]
    said = json.loads(subprocess.run(code, check=True, capture_output=True, text=True, timeout=60).stdout)
    lines = [line for line, _ in said]
    assert all(kept for _, kept in said)
    assert any("Too many open files" in line for line in lines)
    assert lines[-1] == "ok"
    assert all(line == "ok" or line.startswith("2 ") for line in lines), lines


def no_memory(*arguments: object) -> None:
    raise MemoryError


def no_thread(*arguments: object) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    ("of", "name", "fails"), [(Schema, "empty", no_memory), (threading.Thread, "start", no_thread)]
)
def test_memory_that_runs_out_is_no_damage(
    of: type, name: str, fails: Callable[..., None], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files(store)
    monkeypatch.setattr(of, name, fails)
    with pytest.raises(UsageError, match=r"shard-00000\.h5: memory or threads ran out .*Nothing was dropped"):
        verify(store, repair=True)
    assert files(store) == whole
