"""A FAISS index on disk, read only where this user has written it here, for these rows.

FAISS follows what a file says: one with on-disk inverted lists names another file, which is then opened for writing. So
nothing of a file reaches FAISS unless a note beside it is sealed with this user's key (keyed BLAKE3), which no store
holds, and the file is the one that the note names by size and BLAKE3. What fails that, in a store from elsewhere
everything, is built anew.

The file is opened once, and what was digested is what FAISS maps: nobody else may write to it.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from blake3 import blake3

from gradstore.errors import GradstoreError
from gradstore.machine.user_cache import made_user_key, user_key
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.disk import Disk
from gradstore.store.files.output import new_file, write_output
from gradstore.store.files.target import target_of

_MOST_NOTE = 16 << 20  # bytes of a note: some 80 a shard
_CHUNK = 1 << 20
_UNKNOWN = "this user has not written it here"

Binding = Sequence[str]
"""What besides the rows decides what the vectors are."""


def read_sealed(
    faiss: ModuleType, path: Path, store: FeatureStore, binding: Binding, disk: Disk | None = None
) -> tuple[Any, int] | str:
    """The index in a file that can be relied on.

    Mapped into memory, rather than loaded, where it covers the whole store.

    Args:
        faiss: the module.
        path: the file.
        store: whose rows are indexed.
        binding: what it must have been made with.
        disk: where bytes come from; for tests.

    Returns:
        (index, leading rows of the store that it covers), or one clause that says why there is none to use.
    """
    disk = disk or Disk()
    if not os.path.lexists(path):
        return "there is none yet"
    try:
        note = _note(path, disk)
        if note is None:
            return _UNKNOWN
        covered = _covered(note["shards"], store)
        if note["binding"] != list(binding) or covered == 0:
            return "the store or its sketch has changed"
        with disk.open(path) as fd:
            if not _is_ours(fd) or os.fstat(fd).st_size != note["size"] or _digest(fd, disk, path) != note["blake3"]:
                return "it is damaged"
            whole = covered == len(store)
            opened = f"/dev/fd/{fd}"  # the file that was digested, whatever now has its name
            return faiss.read_index(opened, faiss.IO_FLAG_MMAP_IFC) if whole else faiss.read_index(opened), covered
    except (GradstoreError, OSError, RuntimeError, ValueError, KeyError, TypeError):
        return "it is damaged"


def write_sealed(
    faiss: ModuleType, index: Any, path: Path, store: FeatureStore, binding: Binding, disk: Disk | None = None
) -> bool:
    """Keep an index beside the store, and a sealed note.

    Returns:
        Whether it is kept: not where this user's cache cannot be written, and with it no key.

    Raises:
        UsageError: it cannot be written there.
    """
    key = made_user_key()
    if key is None:
        return False
    disk = disk or Disk()
    with new_file(target_of(path, of_store=True), disk) as (fd, temporary):
        faiss.write_index(index, faiss.PyCallbackIOWriter(_Appended(disk, fd, path)))
        with disk.open(temporary) as read:
            size, digest = os.fstat(read).st_size, _digest(read, disk, temporary)
    path.chmod(0o644)  # whatever the file had that it replaces
    note = json.dumps(
        {"binding": list(binding), "shards": store.shard_marks, "size": size, "blake3": digest}, sort_keys=True
    )
    sealed = json.dumps({"note": note, "seal": _seal(key, note)}).encode()
    write_output(_note_of(path), [sealed], of_store=True, disk=disk)
    return True


class _Appended:
    """Takes the bytes of an index as FAISS hands them over."""

    def __init__(self, disk: Disk, fd: int, path: Path) -> None:
        self._disk, self._fd, self._path, self._end = disk, fd, path, 0

    def __call__(self, piece: bytes) -> int:
        self._disk.write(self._fd, piece, self._end, self._path)
        self._end += len(piece)
        return len(piece)


def _note_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _note(path: Path, disk: Disk) -> dict[str, Any] | None:
    """What the note says, of which nothing is parsed before its seal is found right; None where it is not."""
    key = user_key()
    if key is None or not os.path.lexists(_note_of(path)):
        return None
    try:
        outer = json.loads(disk.read_file(_note_of(path), _MOST_NOTE))
        note, seal = outer["note"], outer["seal"]
        sealed = hmac.compare_digest(seal.encode(), _seal(key, note).encode())
    except (GradstoreError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return json.loads(note) if sealed else None


def _seal(key: bytes, note: str) -> str:
    return blake3(note.encode(), key=key).hexdigest()


def _covered(shards: Sequence[Sequence[Any]], store: FeatureStore) -> int:
    """Leading rows of the store that are those which the note lists; 0 where it lists others."""
    theirs = [list(shard) for shard in store.shard_marks]
    mine = [list(shard) for shard in shards]
    return sum(rows for rows, _ in mine) if mine == theirs[: len(mine)] else 0


def _is_ours(fd: int) -> bool:
    """Whether nobody but this user can write to a file between its being digested and its being used."""
    found = os.fstat(fd)
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _digest(fd: int, disk: Disk, path: Path) -> str:
    digest, size = blake3(), os.fstat(fd).st_size
    room = memoryview(bytearray(min(size, _CHUNK)))
    for at in range(0, size, _CHUNK):
        part = room[: size - at]
        disk.read_into(fd, part, at, path)
        digest.update(part)
    return digest.hexdigest()
