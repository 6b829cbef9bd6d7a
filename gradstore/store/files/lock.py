"""One writer a store: a lock that the kernel drops when its owner dies, whatever HDF5's own locking does.

Where a file system has no `flock`, as some network file systems, a file that names its owner stands in.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gradstore.errors import GradstoreError, LockedError, UsageError
from gradstore.store.files.disk import Disk, NoFlockError
from gradstore.store.files.lock_owner import is_alive
from gradstore.store.files.owner_file import owner_lock, require_no_owner

LOCK = ".lock"
OWNER = ".lock.owner"
LOCKS = {
    "auto": "flock, or an owner file where the file system has none",
    "flock": "flock or nothing",
    "file": "an owner file as well, for file systems whose flock holds on one machine only",
    "none": "no lock: you see to it that nothing else writes this store",
}
"""How a store is locked, and what that means."""
_TRIES = 100
_log = logging.getLogger(__name__)


@contextmanager
def writer_lock(directory: Path, disk: Disk, how: str = "auto") -> Iterator[Callable[[], None]]:
    """Hold the writer's lock of the store in `directory`.

    The lock is `flock` on a file that stays in place and names its owner for the message only: a dead owner's
    lock is gone with the owner, so there is no stale lock to recognise or remove. Where that cannot be had, it is
    `owner_file.owner_lock`. Writers of all ways but "none" keep one another out.

    Args:
        directory: the store.
        disk: where its files are.
        how: one of `LOCKS`.

    Yields:
        A function that raises a LockedError if the lock was lost; to be asked before anything is published.

    Raises:
        LockedError: another process holds it; names its pid and host.
        UsageError: an unknown way, or "flock" on a file system that has none.
    """
    if how not in LOCKS:
        raise UsageError("unknown lock", where="--lock", expected=f"one of {', '.join(LOCKS)}", got=repr(how))
    if how == "none":
        _log.info("nothing keeps another writer from %s: two at once would lose rows", directory)
        yield lambda: None
        return
    with ExitStack() as held:
        flocked = held.enter_context(_flock(directory, disk, needed=how == "flock"))
        if flocked and how != "file":
            require_no_owner(directory / OWNER, disk)
            yield lambda: None
            return
        if how == "auto":
            _log.info("this file system has no flock; %s is locked by the file %s", directory, OWNER)
        yield held.enter_context(owner_lock(directory / OWNER, disk)).require_held


@contextmanager
def _flock(directory: Path, disk: Disk, *, needed: bool) -> Iterator[bool]:
    path = directory / LOCK
    try:
        fd = _locked(path, disk)
    except NoFlockError as error:
        if needed:
            hint = "Use --lock auto, which takes an owner file there"
            raise UsageError("this file system has no flock", where=directory, hint=hint) from error
        yield False
        return
    try:
        disk.overwrite(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), path)
        yield True
    finally:
        os.close(fd)


@contextmanager
def locked_file(path: Path, disk: Disk, refusal: LockedError) -> Iterator[int]:
    """Open a file, created where missing, as its only writer: by `flock`, or where there is none by an owner file.

    Args:
        path: the file.
        disk: where it is.
        refusal: what to raise where another process writes it.

    Yields:
        Its descriptor, open within the block.

    Raises:
        LockedError: the refusal.
    """
    with ExitStack() as held:
        try:
            fd = disk.lock(path)
        except NoFlockError:
            try:
                held.enter_context(owner_lock(path.with_name(f"{path.name}.owner"), disk))
            except LockedError as error:
                raise refusal from error
            fd = disk.open_in_place(path)
        if fd is not None:
            held.callback(os.close, fd)
        if fd is None or not disk.is_at(fd, path):  # its writer may finish between our opening and locking it
            raise refusal
        yield fd


def _locked(path: Path, disk: Disk) -> int:
    while True:
        fd = disk.lock(path)
        if fd is None:
            raise LockedError(
                "another process is writing this store",
                where=path.parent,
                got=_owner(path, disk),
                hint="Wait for it to finish, or stop it; finished shards are kept",
            )
        # Someone may have removed the file between our opening and our locking it; a lock on it would bind nobody.
        try:
            bound = disk.is_at(fd, path)
        except BaseException:
            os.close(fd)
            raise
        if bound:
            return fd
        os.close(fd)


def _owner(path: Path, disk: Disk) -> str:
    """Who holds the lock. It writes its name just after taking it, and until then a dead owner's may stand there."""
    for _ in range(_TRIES):
        with suppress(ValueError, KeyError, TypeError, OSError, GradstoreError):
            owner = json.loads(disk.read_file(path, 4096))
            pid, host = int(owner["pid"]), str(owner["host"])[:64]
            if host != socket.gethostname() or is_alive(pid):
                return f"pid {pid} on host {host}"
        time.sleep(0.01)
    return "an owner that has not written its name yet"
