"""A lock for file systems without `flock`: a file that says who writes, and whose date says that they still do.

The file is made by a hard link, which fails where its name is taken, and removed by its owner. An owner that died
leaves it behind. On the same host that is seen at once, by its process; from elsewhere by a date that has not changed
for `STALE` seconds, which is measured by the file system's own clock: against a file that was just written there.

Nobody removes a dead owner's file, for between looking and removing it may have become somebody else's. Who wants to
replace the file with number x first makes `<lock>.x`, by the same rules: of all that want to, one can. It looks again,
and if x is still there, renames its own file over it, in one step. If it dies before, `<lock>.x` is itself a dead
owner's file and is replaced in the same way.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gradstore.errors import GradstoreError, LockedError
from gradstore.store.files.disk import Disk
from gradstore.store.files.disk_errors import MissingFileError
from gradstore.store.files.lock_owner import Owner

BEAT = 10.0  # seconds after which an owner dates its file again
STALE = 120.0  # seconds after which an owner that does not is dead; more than NFS keeps dates, which is 60
_DEPTH = 16  # takeovers that died one within another


@dataclass(frozen=True)
class _Found:
    """A lock as it stands on the disk."""

    owner: Owner | None
    number: str
    changed: float


class OwnerLock:
    """A held lock.

    Args:
        path: its file.
        owner: this process, as the file names it.
        disk: where it is.
    """

    def __init__(self, path: Path, owner: Owner, disk: Disk) -> None:
        self._path, self._owner, self._disk = path, owner, disk

    def require_held(self) -> None:
        """Do nothing while the lock is ours.

        Raises:
            LockedError: this process was taken for dead, and another one has the lock.
        """
        found = _look(self._path, self._disk)
        if found is None or found.number != self._owner.number:
            raise LockedError(
                "this process has lost the lock: it was stopped for so long that another one took it for dead",
                where=self._path.parent,
                got=None if found is None or found.owner is None else f"pid {found.owner.pid} on {found.owner.host}",
                hint="Run the same command again when nobody else writes here; what was stored is kept",
            )


@contextmanager
def owner_lock(path: Path, disk: Disk) -> Iterator[OwnerLock]:
    """Hold the lock whose file is `path`.

    Yields:
        It, which says whether it is still held.

    Raises:
        LockedError: another process holds it, or may; names its pid and host.
    """
    owner = Owner.here()
    own = path.with_name(f"{path.name}.{owner.number}.new")
    fd = disk.open_new(own)
    try:
        disk.write(fd, json.dumps(vars(owner)).encode(), 0, own)
        held = OwnerLock(path, owner, disk)
        try:
            _Attempt(path, own, fd, owner, disk).take(path)
            _remove_old(path, fd, owner, disk)
            with _beating(fd, own, disk):
                yield held
        finally:
            for _ in range(2):  # a disk may fail once
                with suppress(GradstoreError):
                    held.require_held()
                    disk.remove(path)
    finally:
        disk.try_remove(own)
        os.close(fd)


def require_no_owner(path: Path, disk: Disk) -> None:
    """Refuse where a living owner has the lock whose file is `path`; for those who hold another one.

    Raises:
        LockedError: names its pid and host.
    """
    found = _look(path, disk)
    if found is not None and (found.owner is None or found.owner.is_dead() is not True):
        own = path.with_name(f"{path.name}.{secrets.token_hex(8)}.new")
        fd = disk.open_new(own)
        try:
            _require_dead(found, path, fd, own, disk)
        finally:
            disk.try_remove(own)
            os.close(fd)


@dataclass(frozen=True)
class _Attempt:
    """One process that wants a lock, and its own file, which is to get the lock's name."""

    path: Path
    own: Path
    fd: int
    owner: Owner
    disk: Disk

    def take(self, path: Path, depth: int = 0) -> None:
        """Give our file the name `path`, if that is free or a dead owner's."""
        while not self.disk.link(self.own, path):
            found = _look(path, self.disk)
            if found is None:
                continue  # it was given back meanwhile
            if found.number == self.owner.number:
                return  # renamed below, or linked by a call whose answer was lost on the network
            _require_dead(found, path, self.fd, self.own, self.disk)
            if depth == _DEPTH:
                raise LockedError(
                    "too many writers died one after another when they took over this lock",
                    where=path,
                    hint=f"If nobody writes here, remove {self.path.name}* and run the same command again",
                )
            step = self.path.with_name(f"{self.path.name}.{found.number}")
            self.take(step, depth + 1)
            again = _look(path, self.disk)
            if again is not None and again.number == found.number:
                with suppress(MissingFileError):  # who slept here for minutes may have been taken for dead
                    self.disk.rename(step, path)
            else:
                self.disk.remove(step)


def _require_dead(found: _Found, path: Path, fd: int, own: Path, disk: Disk) -> None:
    """Refuse a lock whose owner lives, or may; `own` is a file of ours, which tells the file system's time."""
    owner = found.owner
    dead = None if owner is None else owner.is_dead()
    if dead is None:
        disk.touch(fd, own)
        dead = disk.stat(fd, own).st_mtime - found.changed > STALE
    if not dead:
        raise LockedError(
            "another process is writing here",
            where=path.parent,
            got="an owner without a name" if owner is None else f"pid {owner.pid} on host {owner.host}",
            hint=f"Wait for it to finish, or stop it; one that died on another host is passed over after {STALE:.0f} s",
        )


def _look(path: Path, disk: Disk) -> _Found | None:
    """Who has a lock; None where nobody has."""
    try:
        with disk.open(path) as fd:
            said = disk.stat(fd, path)
            content = bytearray(min(said.st_size, 4096))
            disk.read_into(fd, memoryview(content), 0, path)
    except MissingFileError:
        return None
    owner = Owner.read(bytes(content))
    number = f"{said.st_ino:x}-{said.st_mtime_ns:x}" if owner is None else owner.number
    return _Found(owner, number, said.st_mtime)


def _remove_old(path: Path, fd: int, owner: Owner, disk: Disk) -> None:
    """Remove what writers left that died while they tried to get the lock, so long ago that no living one needs it."""
    now = disk.stat(fd, path).st_mtime
    for name in os.listdir(path.parent):
        if name.startswith(f"{path.name}.") and owner.number not in name:
            with suppress(OSError, GradstoreError):
                if now - os.lstat(path.with_name(name)).st_mtime > STALE:
                    disk.remove(path.with_name(name))


@contextmanager
def _beating(fd: int, path: Path, disk: Disk) -> Iterator[None]:
    """Date the file again and again in a thread, as long as the block runs."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with suppress(GradstoreError, OSError):
                disk.touch(fd, path)

    thread = threading.Thread(target=beat, name="gradstore lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
