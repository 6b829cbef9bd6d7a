"""F23: a journal changed, torn, foreign or hostile; calls that fail on it; readers beside a writer that compacts it."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Record
from faulty_disk import KilledError, WatchedDisk, failing_where
from mutations import Place, endless, huge, places, with_strange_value
from small_store import GROUP, columns, data, files, plan, write, wrong_rows

from gradstore.errors import CorruptError, GradstoreError, UnsafeError, UsageError
from gradstore.store import store_writer
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files import manifest_file
from gradstore.store.files.disk import Disk
from gradstore.store.files.journal import JOURNAL, Journal, JournalLines, read_journal
from gradstore.store.files.manifest import Manifest
from gradstore.store.files.manifest_file import FILE_BYTES, read_manifest
from gradstore.store.store_writer import StoreWriter, open_for_repair, open_writer
from gradstore.store.verify import verify

pytestmark = pytest.mark.soak
N, SHARD_ROWS = 18, 2
SHARDS = N // SHARD_ROWS


class EndError(BaseException):
    """The run ends here, unfinished."""


def write_shards(writer: StoreWriter, indices: range, each: Callable[[int], object] = lambda index: None) -> None:
    for index in indices:
        rows = writer.manifest.rows_of(index)
        with writer.shard(index) as shard:
            for start in range(rows.start, rows.stop, GROUP):
                shard.write(columns(range(start, min(start + GROUP, rows.stop))))
        each(index)


def unfinished(path: Path, shards: int, seed: int = 0) -> Path:
    """A store of some shards, of which the manifest lists the first and a journal the others."""
    with suppress(EndError), open_writer(path, plan(N, seed, SHARD_ROWS), None, data) as writer:
        write_shards(writer, range(shards))
        raise EndError
    return path


def finish(path: Path) -> None:
    """What the same command does again."""
    write(path, N, shard_rows=SHARD_ROWS)


def listed(path: Path) -> list[int]:
    return [shard.index for shard in read_manifest(path, Disk()).shards]


@pytest.fixture
def store(fast: Path) -> Path:
    return unfinished(fast / "store", 5)


def refusal(path: Path) -> CorruptError | None:
    """The error of reading a manifest with its journal, if it is refused."""
    error = None
    try:
        read_manifest(path, Disk())
    except CorruptError as raised:
        error = raised
    assert error is None or (error.exit_code == 5 and "\n" not in str(error))
    return error


# -- what it is ---------------------------------------------------------------------------------------------------


def test_a_shard_is_one_more_line_and_a_finished_store_has_no_journal(fast: Path) -> None:
    path, sizes = fast / "store", []
    with open_writer(path, plan(N, shard_rows=SHARD_ROWS), None, data) as writer:
        base = None
        for index in range(SHARDS):
            write_shards(writer, range(index, index + 1))
            assert listed(path) == list(range(index + 1))
            if 1 <= index < SHARDS - 1:
                base = base or (path / "store.json").read_bytes()
                assert (path / "store.json").read_bytes() == base
                sizes.append((path / JOURNAL).stat().st_size)
    entry = len(writer.manifest.shards[3].line)
    assert set(np.diff(sizes)) == {entry + 66}
    assert not (path / JOURNAL).exists()
    finish(fast / "whole")
    assert files(path) == files(fast / "whole")


def test_bytes_written_are_of_the_order_of_the_shards(fast: Path) -> None:
    def published(shards: int) -> tuple[int, int]:
        """(bytes written to publish so many shards, bytes of the manifest)."""
        written = 0

        def count(name: str, arguments: tuple[Any, ...]) -> None:
            nonlocal written
            written += len(arguments[1]) if name == "_pwrite" else 0

        path = fast / str(shards)
        with open_writer(path, plan(shards, shard_rows=1), WatchedDisk(count), data) as writer:
            with writer.shard(0) as first:
                first.write(columns(range(1)))
            entry, written = writer.manifest.shards[0], 0
            for index in range(1, shards):
                writer.adopt(replace(entry, index=index))
        return written, (path / "store.json").stat().st_size

    for shards in (128, 512):
        written, size = published(shards)
        assert written < 3.5 * size  # the manifest anew with each shard: shards / 2 times its size


def test_a_shard_that_is_published_again_counts_as_it_was_last(store: Path) -> None:
    with suppress(EndError), open_writer(store, plan(N, shard_rows=SHARD_ROWS), None, data) as writer:
        write_shards(writer, range(5, 7))
        writer.adopt(replace(writer.manifest.shards[2], header="0" * 64))
        raise EndError
    assert len(read_journal(store, Disk(), FILE_BYTES).entries) == 2
    manifest = read_manifest(store, Disk())
    assert [shard.index for shard in manifest.shards] == list(range(7))
    assert manifest.shards[2].header == "0" * 64
    assert manifest == writer.manifest


# -- changes ------------------------------------------------------------------------------------------------------


def test_no_change_of_a_journal_goes_unnoticed(store: Path, amount: Callable[[int, int], int], record: Record) -> None:
    whole = (store / JOURNAL).read_bytes()
    rng, injected, naive = np.random.default_rng(0), 0, 0
    bits = rng.permutation(8 * len(whole))[: amount(2000, 8 * len(whole))]
    for bit in bits.tolist():
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        (store / JOURNAL).write_bytes(changed)
        assert refusal(store), f"bit {bit}"
        injected += 1
    for changed in rearranged(whole.splitlines(keepends=True)):
        (store / JOURNAL).write_bytes(changed)
        assert refusal(store), changed
        injected += 1
        naive += believed(changed)
    assert naive > 10
    why = f"each line under a digest of its own: {naive} of the rearranged ones are believed"
    record("F23", "bits and lines of a journal changed", injected=injected, recovered=0, refused=injected, silent=0,
           control=why)  # fmt: skip


def rearranged(lines: list[bytes]) -> Iterator[bytes]:
    """Lines dropped, repeated and swapped; the last ones dropped are the journal as it was."""
    for i in range(len(lines)):
        yield b"".join([*lines[:i], *lines[i + 1 :]]) if i < len(lines) - 1 else b""
        yield b"".join([*lines[: i + 1], *lines[i:]])
    for a, b in combinations(range(len(lines)), 2):
        swapped = list(lines)
        swapped[a], swapped[b] = swapped[b], swapped[a]
        yield b"".join(swapped)


def believed(changed: bytes) -> bool:
    """The control: whether a reader takes a journal of which each line is what was written, wherever it stands."""
    first, *entries = changed.splitlines() or [b""]
    return first.startswith(b"gradstore journal") and all(entry.startswith(b"{") for entry in entries)


def test_a_torn_line_is_left_out_and_a_shorter_journal_is_the_one_before(store: Path, record: Record) -> None:
    whole, end = (store / JOURNAL).read_bytes(), []
    for line in whole.splitlines(keepends=True):
        end.append((end[-1] if end else 0) + len(line))
    injected = refused = 0
    for size in range(0, len(whole), 3):
        (store / JOURNAL).write_bytes(whole[:size])
        injected += 1
        if size < end[0]:
            refused += 1
            assert refusal(store)
        else:
            assert listed(store) == list(range(sum(size >= at for at in end)))
    for hole in range(end[-2], end[-1], 64):  # sectors of the last line that never reached the medium
        for low, high in ((end[-2], hole), (hole, min(hole + 512, end[-1])), (hole, end[-1])):
            if high - low > 1:
                (store / JOURNAL).write_bytes(whole[:low] + bytes(high - low) + whole[high:])
                injected += 1
                assert listed(store) == list(range(4))
    finish(store)
    assert FeatureStore(store).complete
    assert not (store / JOURNAL).exists()
    why = "a torn line taken for damage: the same command does not go on"
    record("F23", "a journal torn at any byte", injected=injected, recovered=injected - refused, refused=refused,
           silent=0, control=why)  # fmt: skip


def test_a_journal_of_another_manifest_says_nothing(store: Path, fast: Path) -> None:
    other = unfinished(fast / "other", 7, seed=1)
    shutil.copy(other / JOURNAL, store / JOURNAL)
    assert listed(store) == [0]
    shutil.rmtree(other)
    unfinished(store, 6)  # which computes shards 1 to 5 again
    kept = (store / JOURNAL).read_bytes() if (store / JOURNAL).exists() else b""
    finish(store)
    (store / JOURNAL).write_bytes(kept)  # as where its removal was lost
    assert FeatureStore(store).complete
    finish(store)
    assert not (store / JOURNAL).exists()


def test_a_journal_that_an_earlier_writer_left_goes_into_the_manifest(store: Path) -> None:
    with open_for_repair(store):
        pass
    assert not (store / JOURNAL).exists()
    assert listed(store) == list(range(5))


def test_a_damaged_journal_may_be_deleted_as_the_error_says(store: Path, fast: Path) -> None:
    content = bytearray((store / JOURNAL).read_bytes())
    content[300] ^= 1
    (store / JOURNAL).write_bytes(content)
    line = r"store\.journal: the journal is not what was written \(got line 2 does not match its digest\)\. .*delete it"
    for use in (FeatureStore, verify, finish):
        with pytest.raises(CorruptError, match=line):
            use(store)
    (store / JOURNAL).unlink()
    finish(store)
    finish(fast / "whole")
    assert files(store) == files(fast / "whole")


# -- hostile ------------------------------------------------------------------------------------------------------


def sealed(folder: Path, base: str, entries: list[str]) -> None:
    """A journal whose digests are right, whatever it says."""
    (folder / JOURNAL).unlink(missing_ok=True)
    journal = Journal(folder, base, Disk())
    for entry in entries:
        journal.append(entry)


def test_strange_values_under_right_digests_are_refused(
    store: Path, amount: Callable[[int, int], int], record: Record
) -> None:
    rng, lines = np.random.default_rng(0), read_journal(store, Disk(), FILE_BYTES)
    entries = [json.loads(entry) for entry in lines.entries]
    spots: list[Place] = list(places(entries[0]))
    injected, refused = amount(500, 20_000), 0
    for i in range(injected):
        changed = list(entries)
        changed[i % len(entries)] = with_strange_value(rng, entries[i % len(entries)], spots)
        sealed(store, lines.manifest, [json.dumps(entry) for entry in changed])
        error = refusal(store)
        refused += error is not None
        if error is None:
            assert set(listed(store)) <= set(range(SHARDS))
            assert all(plausible(shard) for shard in read_manifest(store, Disk()).shards)
    assert refused > injected / 2
    control = sum(not fits(with_strange_value(rng, entries[0], spots)) for _ in range(100))
    why = f"entries not checked: {control} of 100 have another form"
    record("F23", "strange values in a journal", injected=injected, recovered=injected - refused, refused=refused,
           silent=0, control=why)  # fmt: skip


def plausible(shard: Any) -> bool:
    return shard.rows == SHARD_ROWS and all(0 <= offset < shard.size for offset in shard.offsets.values())


def fits(entry: dict[str, Any]) -> bool:
    try:
        return entry["rows"] == SHARD_ROWS and all(type(offset) is int for offset in entry["offsets"].values())
    except (KeyError, AttributeError, TypeError):
        return False


@pytest.mark.parametrize("content", [
    b"", b"\n", b"\0" * 4096, b"gradstore journal 1 of", b"{}\n", b"[" * 100_000 + b"\n", b"x" * 200 + b"\n",
    b"\n" * (2 << 20),
])  # fmt: skip
def test_what_is_no_journal_is_refused(content: bytes, store: Path) -> None:
    (store / JOURNAL).write_bytes(content)
    assert refusal(store)


@pytest.mark.parametrize("entry", ["[" * 50_000, '{"index": 1, "index": 2}', "1.5", '"x"', "null", "{}", ""])
def test_what_is_no_entry_is_refused(entry: str, store: Path) -> None:
    sealed(store, read_journal(store, Disk(), FILE_BYTES).manifest, [entry])
    assert refusal(store)


def test_a_journal_of_another_version_is_refused(store: Path) -> None:
    journal = Journal(store, "0" * 64, Disk())
    journal._sealed = lambda text: Journal._sealed(journal, text.replace("journal 1", "journal 2"))  # type: ignore[method-assign]
    journal.append("{}")
    error = refusal(store)
    assert error is not None
    assert "a first line of another form or version" in str(error)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to(path.with_name("store.json"))


@pytest.mark.parametrize("made", [pipe, link, endless, huge, Path.mkdir])
def test_what_stands_for_a_journal_is_refused(made: Callable[[Path], None], store: Path) -> None:
    (store / JOURNAL).unlink()
    made(store / JOURNAL)
    for use in (FeatureStore, finish):
        with pytest.raises((UnsafeError, CorruptError)) as refused:
            use(store)
        assert "\n" not in str(refused.value)


def test_a_folder_with_a_journal_alone_is_no_store(store: Path) -> None:
    (store / "store.json").unlink()
    with pytest.raises(UsageError, match="not a gradstore store"):
        FeatureStore(store)
    with pytest.raises(UsageError, match="not a gradstore store"):
        finish(store)


# -- calls that fail ----------------------------------------------------------------------------------------------


def outcome(path: Path, disk: Disk, stored: list[int]) -> BaseException | None:
    """What ends a run, if anything does; `stored` gets the shards that it reports."""
    try:
        write(path, 12, disk, stored.append, SHARD_ROWS)
    except (GradstoreError, KilledError) as error:
        return error
    return None


def of_journal(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a system call is about the journal, or the file that becomes it."""
    paths = [os.readlink(f"/proc/self/fd/{a}") if isinstance(a, int) and name != "_open" else a for a in arguments[:1]]
    return JOURNAL in Path(str(paths[0])).name


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds names of descriptors in /proc")
@pytest.mark.parametrize("kind", ["ENOSPC", "EIO", "short", "EINTR", "killed"])
def test_every_call_on_a_journal_may_fail(
    kind: str, fast: Path, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    monkeypatch.setattr(store_writer, "_LINES", 1)
    path, whole = fast / "store", fast / "whole"
    write(whole, 12, shard_rows=SHARD_ROWS)
    injected = refused = 0
    for for_good in (False, True):
        for at in range(1, 1000):
            disk, stored = failing_where(of_journal, at, kind, for_good), []
            error = outcome(path, disk, stored)
            refused += error is not None
            assert not isinstance(error, GradstoreError) or error.exit_code == (7 if kind == "ENOSPC" else 5)
            assert "\n" not in str(error)
            if disk.concerned < at:
                break
            injected += 1
            assert set(stored) <= set(listed(path))
            assert wrong_rows(FeatureStore(path)) == []
            write(path, 12, shard_rows=SHARD_ROWS)
            assert files(path) == files(whole)
            shutil.rmtree(path)
        shutil.rmtree(path)
    assert injected > 20
    assert (refused == 0) == (kind == "short")
    record("F23", f"{kind} at every call on a journal", injected=injected, recovered=injected - refused,
           refused=refused, silent=0, control="see F2: errors ignored lose rows")  # fmt: skip


def test_a_writer_goes_on_after_a_line_that_did_not_fit(store: Path, fast: Path) -> None:
    """What a failed line left behind never comes back: the manifest is written whole next."""
    with open_writer(fast / "other", plan(N, shard_rows=SHARD_ROWS), None, data) as writer:
        write_shards(writer, range(3))
        torn = b'{"index": 9'
        with (writer.path / JOURNAL).open("ab") as file:
            file.write(torn)
        with pytest.raises(CorruptError, match="the file was changed meanwhile"):
            write_shards(writer, range(3, 4))
        write_shards(writer, range(4, SHARDS))
    assert FeatureStore(fast / "other").complete
    assert wrong_rows(FeatureStore(fast / "other")) == []


# -- readers ------------------------------------------------------------------------------------------------------


def base_first(path: Path, disk: Disk) -> Manifest:
    """The control: a reader that reads the manifest before the journal."""
    content = disk.read_file(path / "store.json", FILE_BYTES)
    journal = read_journal(path, disk, FILE_BYTES)
    manifest = manifest_file.parse_manifest(content, path)
    same = journal.manifest == manifest_file._digest_in(content)
    return manifest_file._with_entries(manifest, journal.entries, path) if same else manifest


def missed(fast: Path, read: Callable[[Path, Disk], Manifest]) -> tuple[int, int]:
    """(interleavings, those in which a reader misses a shard): all is written anew just before one of its calls."""
    calls = WatchedDisk()
    read(unfinished(fast / read.__name__, 5), calls)
    lost = 0
    for at in range(1, calls.calls + 1):
        with open_writer(fast / f"{read.__name__}{at}", plan(N, shard_rows=SHARD_ROWS), None, data) as writer:
            write_shards(writer, range(5))
            disk = compacting(writer, at)
            lost += [shard.index for shard in read(writer.path, disk).shards] != list(range(5))
            assert not (writer.path / JOURNAL).exists()
    return calls.calls, lost


def compacting(writer: StoreWriter, at: int) -> WatchedDisk:
    """A reader's disk, before whose call number `at` a writer writes the manifest anew."""

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        if disk.calls == at:
            writer.settle()

    disk = WatchedDisk(before)
    return disk


def test_a_reader_misses_no_shard_beside_a_writer_that_compacts(fast: Path, record: Record) -> None:
    tries, lost = missed(fast, read_manifest)
    assert (lost, tries > 6) == (0, True)
    _, control = missed(fast, base_first)
    assert control > 0
    why = f"the manifest read before the journal: shards missed in {control} of {tries} interleavings"
    record("F23", "a manifest written anew beside a reader", injected=tries, recovered=tries, refused=0, silent=0,
           control=why)  # fmt: skip


def test_readers_beside_a_writer_see_all_that_was_published(
    fast: Path, amount: Callable[[int, int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "_LINES", 2)
    path, stored, reads = fast / "store", [-1], 0
    shards = amount(150, 3000)
    thread = threading.Thread(target=write, args=(path, shards, None, stored.append, 1))
    thread.start()
    while thread.is_alive():
        before = stored[-1]
        if before >= 0:
            assert len(FeatureStore(path)) > before
            reads += 1
    thread.join()
    assert FeatureStore(path).complete
    assert reads > 20


# -- limits -------------------------------------------------------------------------------------------------------


def test_what_could_not_be_read_again_is_refused_before_the_work(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan(N, shard_rows=SHARD_ROWS)
    finish(fast / "whole")
    size = (fast / "whole/store.json").stat().st_size
    assert size <= whole.finished_bytes < 1.1 * size
    with monkeypatch.context() as patch:
        patch.setattr(store_writer, "FILE_BYTES", size // 2)
        with pytest.raises(UsageError, match=r"manifest .*too large to be read \(expected at most \d+ bytes"):
            write(fast / "other", N, shard_rows=SHARD_ROWS)
    assert not (fast / "other").exists()
    before = files(fast / "whole")
    monkeypatch.setattr(manifest_file, "_SHARDS", SHARDS + 1)
    with pytest.raises(UsageError, match=r"a store cannot hold this \(got 12 shards\)"):
        write(fast / "whole", 24, shard_rows=8)  # 3 shards of 8 rows, but the store goes on in shards of 2
    assert files(fast / "whole") == before


def test_lines_of_no_journal_say_nothing() -> None:
    assert JournalLines() == read_journal(Path("/nowhere"), Disk(), 0)
