"""Outputs: two writers of one, of which one is killed; calls that fail; and what an output must not replace."""

from __future__ import annotations

import os
import random
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Record
from faulty_disk import KilledError, WatchedDisk, failing
from forking import Forks
from outputs import KINDS, LETTERS, WRITERS, make_sources
from small_store import files, write

from gradstore.errors import ClosedError, GradstoreError, NoSpaceError, UsageError
from gradstore.store.files import output
from gradstore.store.files.disk import Disk
from gradstore.store.files.output import remove_leftovers, write_output
from gradstore.store.files.target import target_of
from gradstore.store.store_writer import open_for_repair

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    make_sources(folder)
    return folder


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks("outputs") as server:
        yield server


def expected(kind: str, folder: Path, source: Path) -> dict[str, bytes]:
    """What each content is when nothing goes wrong."""
    found = {}
    for letter in LETTERS:
        path = folder / letter / KINDS.get(kind, "x")
        WRITERS[kind](path, letter, Disk(), source) if path.parent.exists() else path.parent.mkdir(parents=True)
        WRITERS[kind](path, letter, Disk(), source)
        found[letter] = path.read_bytes()
    return found


def race(forks: Forks, path: Path, kind: str, source: Path, chance: random.Random) -> list[int]:
    """Two writers, of which one is killed at a random time; their exit statuses."""
    orders = [
        {"job": "write_one", "path": str(path), "kind": kind, "letter": letter, "source": str(source)}
        for letter in LETTERS
    ]
    pids = forks.start(*orders)
    time.sleep(chance.uniform(0, 0.025))
    with suppress(ProcessLookupError):  # it was faster
        os.kill(pids[chance.randrange(2)], signal.SIGKILL)
    return forks.statuses()


def test_of_two_writers_one_of_which_is_killed_the_result_is_whole(
    forks: Forks, source: Path, fast: Path, amount: Callable[[int, int], int], record: Record
) -> None:
    chance, races, killed = random.Random(0), 0, 0
    for kind, name in KINDS.items():
        whole = expected(kind, fast / f"whole-{kind}", source)
        for i in range(amount(30 if kind == "npy" else 8, 100)):  # the one that was wrong in 6 of 30
            path = fast / f"{kind}{i}" / name
            path.parent.mkdir()
            statuses = race(forks, path, kind, source, chance)
            assert set(statuses) <= {0, -signal.SIGKILL}
            if 0 in statuses:
                assert path.read_bytes() in whole.values()
            killed += -signal.SIGKILL in statuses
            WRITERS[kind](path, "a", Disk(), source)  # the same command again
            assert os.listdir(path.parent) == [name], "what the killed one left is gone"
            assert path.read_bytes() == whole["a"]
            races += 1
    assert killed > 0
    bad, tried = bad_races_with_a_fixed_name(forks, fast, source, chance)
    why = f"one temporary name for all: {bad} of {tried} are not whole, or fail"
    record("F19", "two writers of one output, one killed", injected=races, recovered=races, refused=0, silent=0,
           control=why)  # fmt: skip


def bad_races_with_a_fixed_name(forks: Forks, fast: Path, source: Path, chance: random.Random) -> tuple[int, int]:
    whole, bad = [letter.encode() * 50_000 for letter in LETTERS], 0
    tried = 0
    while tried < 20 or (not bad and tried < 200):  # it is a matter of chance
        path = fast / f"fixed{tried}" / "x"
        path.parent.mkdir()
        statuses = race(forks, path, "fixed_name", source, chance)
        bad += 1 in statuses or (0 in statuses and path.read_bytes() not in whole)
        tried += 1
    assert bad > 0
    return bad, tried


@pytest.mark.parametrize("kind", KINDS)
def test_a_writer_may_die_at_any_call(kind: str, source: Path, fast: Path, record: Record) -> None:
    whole = expected(kind, fast, source)
    path = fast / "out" / KINDS[kind]
    path.parent.mkdir()
    WRITERS[kind](path, "b", Disk(), source)
    at, killed = 1, True
    while killed:
        try:
            WRITERS[kind](path, "a", failing(at, "killed", True), source)
            killed = False
        except KilledError:
            assert path.read_bytes() in whole.values()
        at += 1
    assert at > 8
    WRITERS[kind](path, "a", Disk(), source)
    assert path.read_bytes() == whole["a"]
    assert os.listdir(path.parent) == [path.name]
    kills = at - 2  # the last one wrote to its end
    record("F20", "a writer of an output killed at every call", injected=kills, recovered=kills, refused=0, silent=0,
           control=written_in_place(fast))  # fmt: skip


STATUSES = {"ENOSPC": 7, "EDQUOT": 7, "EFBIG": 7, "EROFS": 2, "EACCES": 2, "EMFILE": 2, "EIO": 5}


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_fails_leaves_nothing_behind(kind: str, source: Path, fast: Path, record: Record) -> None:
    whole = expected(kind, fast, source)
    path = fast / "out" / KINDS[kind]
    path.parent.mkdir()
    WRITERS[kind](path, "b", Disk(), source)
    calls = WatchedDisk()
    WRITERS[kind](path, "b", calls, source)
    injected = refused = 0
    for error, status in STATUSES.items():
        for at in range(1, calls.calls + 1):
            injected += 1
            found = refusal(kind, path, failing(at, error, False), source)
            if found is not None:
                refused += 1
                # An index that cannot be saved is not needed: its line says what can be done without it.
                assert found.exit_code in ((2, 5) if kind == "index" and status == 5 else (status,)), found
                assert "\n" not in str(found)
            assert path.read_bytes() in whole.values()
            assert os.listdir(path.parent) == [path.name]
    assert refused > injected / 2
    record("F20", "a call that fails while an output is written", injected=injected,
           recovered=injected - refused, refused=refused, silent=0, control=written_in_place(fast))  # fmt: skip


def refusal(kind: str, path: Path, disk: Disk, source: Path) -> GradstoreError | None:
    try:
        WRITERS[kind](path, "a", disk, source)
    except GradstoreError as error:
        return error
    return None


def written_in_place(fast: Path) -> str:
    """The control: a file that is written where it stands."""
    path = fast / "in place"
    path.write_bytes(b"the old one")
    with path.open("wb") as file:
        file.write(b"half of")
    assert path.read_bytes() == b"half of"
    return "written in place: the old file is gone and half of the new one stands there"


def test_two_living_writers_do_not_remove_each_others_files(fast: Path) -> None:
    path = fast / "x.csv"
    target = target_of(path)
    with output.new_file(target, Disk()) as (fd, first):
        os.write(fd, b"first")
        with output.new_file(target, Disk()) as (other, second):
            os.write(other, b"second")
            remove_leftovers(fast, "x.csv", Disk())
            assert first.exists()
            assert second.exists()
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert os.listdir(fast) == ["x.csv"]


def test_a_new_file_that_is_taken_for_a_leftover_is_begun_again(fast: Path) -> None:
    """Another writer looks at it after it was made, and before it is locked."""
    seen: list[Path] = []

    def cleaned(name: str, arguments: tuple[object, ...]) -> None:
        if name == "_flock" and len(seen) < 3:
            seen.append(next(fast.glob(".x.csv.*.tmp")))
            remove_leftovers(fast, "x.csv", Disk())

    write_output(fast / "x.csv", [b"whole"], disk=WatchedDisk(cleaned))
    assert len(seen) == 3
    assert [path.read_bytes() for path in fast.iterdir()] == [b"whole"]


def test_a_store_loses_the_leftovers_of_its_indexes(fast: Path) -> None:
    write(fast / "store")
    for clean in (lambda: write(fast / "store"), lambda: open_for_repair(fast / "store").__enter__()):
        dead = fast / f"store/.index-classes.safetensors.{output._host()}0123abcd.tmp"
        other = fast / f"store/.index-classes.safetensors.{int(output._host(), 16) ^ 1:04x}0123abcd.tmp"
        other.write_bytes(b"of a writer on another host, whose lock may not be seen here")
        dead.write_bytes(b"half")
        mine = fast / "store/.notes.0123abcd.tmp"
        mine.write_bytes(b"mine")
        clean()
        assert not dead.exists()
        assert mine.exists()
        assert other.exists()
        mine.unlink()
        other.unlink()


# -- what an output must not replace ------------------------------------------------------------------------------


def test_an_output_never_replaces_what_is_no_file_or_a_stores_own(fast: Path, record: Record) -> None:
    store, bound = fast / "store", socket.socket(socket.AF_UNIX)
    write(store)
    whole = files(store)
    bound.bind(str(fast / "socket"))
    bound.close()  # its name stays
    (fast / "folder").mkdir()
    (fast / "file").write_text("mine")
    (fast / "loop").symlink_to("loop")
    (fast / "link").symlink_to(store / "store.json")
    (fast / "folder link").symlink_to(store)
    (fast / "read-only").write_text("mine")
    names = ("store.json", "shard-00000.h5", "shard-00099.h5", "shard-00002-6.h5", "run.jsonl", ".lock", ".lock.owner",
             "index-classes.safetensors", "index-0123456789ab.faiss", "index-0123456789ab.json", ".store.json.tmp",
             "store.journal", ".store.journal.tmp", "shard-00000.r1.h5", "annotations.safetensors",
             "STORE.JSON")  # fmt: skip
    cases = {
        **{str(store / name): "place of a store's own file" for name in names},
        str(fast / "link"): "place of a store's own file",
        str(fast / "folder link/store.json"): "place of a store's own file",
        str(fast / "folder/../store/store.json"): "place of a store's own file",
        str(fast / "folder"): "the output is a directory",
        str(store): "the output is a directory",
        str(fast / "socket"): "the output is a socket",
        str(fast / "loop"): "cannot be used",
        str(fast / "file/x"): r"cannot be used \(got Not a directory\)",
        str(fast / ("x" * 300)): r"cannot be used \(got File name too long\)",
        f"{fast}/a\0b": r"cannot be used \(got .*null",
        "": "the output has no name|is a directory",
        "/dev/fd/4000": r"cannot be used \(got Bad file descriptor\)",
        "/dev/stdin/x": "cannot be used",
    }
    for name, message in cases.items():
        for change in (lambda name=name: write_output(name, [b"new"]), lambda name=name: target_of(name)):
            with pytest.raises(UsageError, match=message) as refused:
                change()
            assert refused.value.exit_code == 2
            assert "\n" not in str(refused.value)
    assert files(store) == whole
    assert (fast / "file").read_text() == "mine"
    write_output(store / "near.csv", [b"new"])  # a name that the store does not use
    old = fast / "old"
    write(old)
    os.replace(fast / "file", old / "store.json")
    with pytest.raises(GradstoreError, match="manifest is not what was written"):
        gs_open(old)
    why = "replaced: the store cannot be read any more"
    record("F21", "outputs over other files", injected=2 * len(cases), recovered=0, refused=2 * len(cases), silent=0,
           control=why)  # fmt: skip


def gs_open(path: Path) -> None:
    from gradstore.store.feature_store import FeatureStore

    FeatureStore(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_may_not_be_written_is_said(fast: Path) -> None:
    (fast / "folder").mkdir(mode=0o500)
    (fast / "file").touch(mode=0o400)
    with pytest.raises(UsageError, match="folder may not be written to"):
        target_of(fast / "folder/new/x")
    with pytest.raises(UsageError, match="read-only"):
        target_of(fast / "file")


def test_a_link_stays_and_what_it_names_is_replaced(fast: Path) -> None:
    (fast / "there").mkdir()
    (fast / "there/x.csv").write_text("old")
    for link, target in (("direct", "there/x.csv"), ("twice", "direct"), ("dangling", "there/y.csv")):
        (fast / link).symlink_to(target)
        write_output(fast / link, [link.encode()])
        assert (fast / link).is_symlink()
        assert (fast / link).read_text() == link
    assert sorted(os.listdir(fast / "there")) == ["x.csv", "y.csv"]


def test_permissions_are_what_the_umask_says_and_are_kept(fast: Path) -> None:
    path = fast / "x.csv"
    before = os.umask(0o027)
    try:
        write_output(path, [b"1"])
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        seen = []

        def pieces() -> Iterator[bytes]:
            seen.extend(stat.S_IMODE(part.stat().st_mode) for part in fast.glob(".x.csv*"))
            yield b"2"

        write_output(path, pieces())
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert seen == [0o600], "nobody else sees the bytes of a file that may be private"


def test_a_file_that_exists_is_left_alone_where_asked(fast: Path) -> None:
    write_output(fast / "x", [b"old"], keep=True)
    with pytest.raises(UsageError, match="this file exists and is left alone"):
        write_output(fast / "x", [b"new"], keep=True)
    assert [(path.name, path.read_bytes()) for path in fast.iterdir()] == [("x", b"old")]


# -- streams ------------------------------------------------------------------------------------------------------


def test_pipes_terminals_and_descriptors_are_written_to_as_they_are(fast: Path) -> None:
    os.mkfifo(fast / "pipe")
    reader = os.open(fast / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_output(fast / "pipe", [b"one", b"two"])
    assert os.read(reader, 100) == b"onetwo"
    assert stat.S_ISFIFO(os.stat(fast / "pipe").st_mode)
    with pytest.raises(UsageError, match="must be a file, not a stream"):
        target_of(fast / "pipe", streams=False)
    os.close(reader)
    out, into = os.pipe()
    write_output(f"/dev/fd/{into}", [b"three"])
    assert os.read(out, 100) == b"three"
    (fast / "link").symlink_to(f"/dev/fd/{into}")
    write_output(fast / "link", [b"four"])
    assert os.read(out, 100) == b"four"
    with pytest.raises(UsageError, match="cannot be written to"):
        target_of(f"/dev/fd/{out}")
    os.close(out)
    with pytest.raises(ClosedError, match="nobody reads this output any more") as error:
        write_output(f"/dev/fd/{into}", [b"five"])
    assert error.value.exit_code == 141
    os.close(into)
    write_output(os.devnull, [b"six"])
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    if os.path.exists("/dev/full"):
        with pytest.raises(NoSpaceError, match="/dev/full: the disk is full"):
            write_output("/dev/full", [b"seven"])
    file = os.open(fast / "redirected", os.O_WRONLY | os.O_CREAT)
    os.write(file, b"before ")
    write_output(f"/dev/fd/{file}", [b"after"])
    os.close(file)
    assert (fast / "redirected").read_text() == "before after"


def test_every_kind_of_output_is_tried() -> None:
    assert set(KINDS) | {"fixed_name"} == set(WRITERS)
