"""S8 and S9: files of FAISS that others wrote, and factory strings that end the process, do no harm."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from conftest import Record
from mutations import endless, huge
from synthetic import clustered, write_store

from gradstore.errors import UsageError
from gradstore.machine.user_cache import cache_folder, made_user_key, user_key
from gradstore.search.index import faiss_factory
from gradstore.search.index.faiss_factory import require_sound
from gradstore.search.index.faiss_index import open_faiss
from gradstore.search.index.store_index import open_index
from gradstore.search.session import Session
from gradstore.store.feature_store import FeatureStore

faiss = pytest.importorskip("faiss")
pytestmark = pytest.mark.usefixtures("own_cache")

VICTIM = b"precious" * 26_000
STRANGER = "built: this user has not written it here"


@pytest.fixture
def store(fast: Path) -> FeatureStore:
    return write_store(fast / "store", clustered(64, 2, 32), shard_rows=32)


def index_file(store: FeatureStore) -> Path:
    (file,) = store.path.glob("*.faiss")
    return file


def with_lists_on_disk(path: Path, victim: Path, width: int) -> None:
    """A FAISS file that names another file, which whoever parses it opens for writing."""
    index = faiss.index_factory(width, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    vectors = np.random.default_rng(0).standard_normal((200, width), np.float32)
    index.train(vectors)
    made = victim.with_name("m" * len(victim.name))
    lists = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(made))
    index.replace_invlists(lists)
    index.add(vectors)
    faiss.write_index(index, str(path))
    path.write_bytes(path.read_bytes().replace(os.fsencode(made), os.fsencode(victim)))
    made.unlink()


def forged_note(store: FeatureStore, file: Path, binding: list[str], key: bytes | None) -> bytes:
    """A note that agrees with the file, sealed with a key of the forger's or with none."""
    note = json.dumps(
        {
            "binding": binding,
            "shards": store.shard_marks,
            "size": file.stat().st_size,
            "blake3": blake3(file.read_bytes()).hexdigest(),
        },
        sort_keys=True,
    )
    return json.dumps({"note": note, "seal": blake3(note.encode(), key=key).hexdigest()}).encode()


def earlier_note(store: FeatureStore, file: Path, binding: list[str]) -> bytes:
    """What earlier versions wrote, which anyone can."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    known = [binding[0], *binding[3:]]
    return json.dumps({"binding": known, "shards": store.shard_marks, "sha256": digest}).encode()


@pytest.mark.parametrize("kind", ["no key", "another key", "an earlier version", "the seal of another note"])
def test_a_foreign_index_names_no_other_file(kind: str, store: FeatureStore, fast: Path, record: Record) -> None:
    victim = fast / "victim"
    victim.write_bytes(VICTIM)
    opened = Session(store, faiss="IVF4,Flat", size=16).faiss
    file = index_file(store)
    seal = json.loads(file.with_suffix(".json").read_bytes())["seal"]
    binding = json.loads(json.loads(file.with_suffix(".json").read_bytes())["note"])["binding"]
    with_lists_on_disk(file, victim, opened.index.d)
    if kind == "an earlier version":
        note = earlier_note(store, file, binding)
    else:
        note = forged_note(store, file, binding, secrets.token_bytes(32) if kind == "another key" else None)
        if kind == "the seal of another note":
            note = json.dumps({**json.loads(note), "seal": seal}).encode()
    file.with_suffix(".json").write_bytes(note)
    assert Session(store, faiss="IVF4,Flat", size=16).faiss.event == STRANGER
    assert victim.read_bytes() == VICTIM
    control = "the same file read by faiss.read_index: a file outside the store is opened for writing and grows"
    record("S8", "forged FAISS files", injected=1, recovered=1, refused=0, silent=0, control=control)


def test_what_faiss_does_with_such_a_file(fast: Path) -> None:
    """The control, in a process of its own."""
    victim = fast / "victim"
    victim.write_bytes(VICTIM)
    with_lists_on_disk(fast / "x.faiss", victim, 16)
    code = f"""
import numpy as np, faiss
faiss.read_index({str(fast / "x.faiss")!r}).add(np.ones((9000, 16), "f"))  # as the store has grown
"""
    subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert victim.read_bytes() != VICTIM


def deep(path: Path) -> None:
    path.write_text("[" * 100_000)


def linked(path: Path) -> None:
    shutil.copy(path.parent / "copy", path.parent / "elsewhere")
    path.symlink_to("elsewhere")


SWAPS: dict[str, Callable[[Path], None]] = {
    "endless device": endless,
    "huge": huge,
    "deep": deep,
    "link to a copy": linked,
    "empty": Path.touch,
}


@pytest.mark.parametrize("suffix", [".faiss", ".json"])
@pytest.mark.parametrize("kind", SWAPS)
def test_only_regular_files_of_the_right_size_are_read(
    kind: str, suffix: str, store: FeatureStore, record: Record
) -> None:
    Session(store, faiss="Flat")
    file = index_file(store).with_suffix(suffix)
    shutil.copy(file, file.parent / "copy")
    file.unlink()
    SWAPS[kind](file)
    event = open_faiss(open_index(store), "Flat", "sketch").event
    assert event in (STRANGER, "built: it is damaged")
    assert open_faiss(open_index(store), "Flat", "sketch").event == "opened"
    control = "the same file read by faiss.read_index: a file outside the store is opened for writing and grows"
    record("S8", "forged FAISS files", injected=1, recovered=1, refused=0, silent=0, control=control)


@pytest.mark.parametrize("suffix", [".faiss", ".json"])
@pytest.mark.parametrize(("make", "what"), [(os.mkdir, "a directory"), (os.mkfifo, "a pipe")])
def test_what_is_no_file_in_its_place_is_one_line(
    make: Callable[[Path], None], what: str, suffix: str, store: FeatureStore, record: Record
) -> None:
    Session(store, faiss="Flat")
    file = index_file(store).with_suffix(suffix)
    file.unlink()
    make(file)
    with pytest.raises(UsageError, match=f"the output is {what}"):
        Session(store, faiss="Flat")
    record("S8", "forged FAISS files", injected=1, recovered=0, refused=1, silent=0, control="see a foreign index")


def test_a_file_that_others_can_write_to_is_built_anew(store: FeatureStore) -> None:
    """It could be changed between its digest and its use."""
    Session(store, faiss="Flat")
    index_file(store).chmod(0o664)
    assert Session(store, faiss="Flat").faiss.event == "built: it is damaged"
    assert Session(store, faiss="Flat").faiss.event == "opened"


def test_a_copied_store_builds_its_index_again_and_says_so(
    store: FeatureStore, fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Session(store, faiss="Flat")
    monkeypatch.setenv("GRADSTORE_CACHE", str(fast / "another machine"))
    shutil.copytree(store.path, fast / "copy")
    assert Session(FeatureStore(fast / "copy"), faiss="Flat").faiss.event == STRANGER
    session = Session(FeatureStore(fast / "copy"), faiss="Flat")
    assert session.faiss.event == "opened"
    assert session.topk(store, 1, mode="approx").indices[:, 0].tolist() == list(range(64)), "mapped, and still there"


def unreadable_by_mode(key: Path) -> None:
    key.chmod(0o640)


def short(key: Path) -> None:
    key.write_bytes(b"x")
    key.chmod(0o600)


def swapped(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def swap(key: Path) -> None:
        key.unlink()
        make(key)

    return swap


KEYS: dict[str, Callable[[Path], None]] = {
    "gone": Path.unlink,
    "readable by others": unreadable_by_mode,
    "short": short,
    "a pipe": swapped(os.mkfifo),
    "a link": swapped(lambda key: key.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_that_cannot_be_relied_on_is_made_again(
    kind: str, store: FeatureStore, fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSTORE_CACHE", str(fast / "cache"))
    Session(store, faiss="Flat")
    (key,) = (fast / "cache").iterdir()
    assert key.stat().st_mode & 0o777 == 0o600
    before = key.read_bytes()
    KEYS[kind](key)
    assert user_key() is None
    assert Session(store, faiss="Flat").faiss.event == STRANGER
    assert Session(store, faiss="Flat").faiss.event == "opened"
    assert user_key() not in (None, before)


def test_without_a_key_nothing_is_kept(store: FeatureStore, fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fast / "file").touch()
    monkeypatch.setenv("GRADSTORE_CACHE", str(fast / "file"))
    assert made_user_key() is None
    event = Session(store, faiss="Flat").faiss.event
    assert event == "built: there is none yet; not kept, for this user's cache folder cannot be written"
    assert list(store.path.glob("*.faiss")) == []


def test_the_key_is_outside_every_store(store: FeatureStore) -> None:
    Session(store, faiss="Flat")
    key = user_key()
    assert key is not None
    assert store.path not in cache_folder().parents
    assert not any(key in path.read_bytes() for path in store.path.iterdir())


# What ends a process: an abort, a division by zero, a bad address, no end, all memory; and what FAISS refuses itself.
HOSTILE = [
    *("HNSW0", "HNSW1", "IVF8_HNSW0,Flat", "PQ4x0", "IVF8,PQ4x4fs_0", "ZnLattice0x10_6", "IVF8,FlatPanorama0"),
    *("RR0,Flat", "HNSW8_0+PQ4", "IVF8,PQ4,Refine(HNSW0)", "HNSW999999999", "RR99999999,Flat", "IVF1000000000,Flat"),
    *("PQ4x24", "IVF0,Flat", "PQ0", "IVF1e9,Flat", "IVF99999999999,Flat", "OPQ9999", "", " ", ",,,", "Flat,Flat"),
    *("x" * 100_000, "IVF8(" * 2000, "IDMap,Flat", "PCA9999,Flat", "LSH", "PQ1000", "IVF-8,Flat", "a\0b", "é"),
    *("/etc/x", "OnDisk(/tmp/x)", "IVF8,OnDisk", "Flat\nFlat"),
]


@pytest.mark.parametrize("factory", HOSTILE, ids=lambda text: repr(text[:20]))
def test_a_factory_string_that_faiss_cannot_stand_is_one_line(factory: str, record: Record) -> None:
    with pytest.raises(UsageError, match="--faiss: FAISS refuses this index") as error:
        require_sound(factory, 64)
    assert "\n" not in error.value.line
    assert len(error.value.line) < 700
    control = "HNSW0 built in this process: it aborts"
    record("S9", "hostile factory strings", injected=1, recovered=0, refused=1, silent=0, control=control)


def test_a_factory_string_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_factory, "_SECONDS", 2)
    with pytest.raises(UsageError, match="FAISS refuses this index"):
        require_sound("NSG1", 64)


def test_what_such_a_string_does(fast: Path) -> None:
    """The control: the process is gone, and with it whatever it held."""
    code = """
import numpy as np, faiss
index, rows = faiss.index_factory(8, "HNSW0"), np.eye(8, dtype="f")
index.add(rows)
index.search(rows, 2)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, cwd=fast)
    assert done.returncode < 0


GOOD = ["Flat", "IVF1024,Flat", "PQ4x8", "OPQ4,PQ4", "IVF8,PQ4,RFlat", "SQ8", "PCA8,Flat", "RaBitQ"]


@pytest.mark.parametrize("factory", GOOD)
def test_a_good_factory_string_passes(factory: str) -> None:
    require_sound(factory, 64)
