"""One writer a store: a lock that the kernel drops when its owner dies, whatever HDF5's own locking does."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gradstore.disk import Disk
from gradstore.errors import GradstoreError, LockedError

LOCK = ".lock"


@contextmanager
def writer_lock(directory: Path, disk: Disk) -> Iterator[None]:
    """Hold the writer's lock of the store in `directory`.

    The lock is `flock` on a file that stays in place and names its owner for the message only: a dead owner's
    lock is gone with the owner, so there is no stale lock to recognise or remove.

    Raises:
        LockedError: another process holds it; names its pid and host.
    """
    path = directory / LOCK
    fd = _locked(path, disk)
    try:
        disk.overwrite(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), path)
        yield
    finally:
        os.close(fd)


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
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.lstat(path)):
                return fd
        os.close(fd)


def _owner(path: Path, disk: Disk) -> str:
    try:
        owner = json.loads(disk.read_file(path, 4096))
        return f"pid {int(owner['pid'])} on host {str(owner['host'])[:64]!r}".replace("'", "")
    except (ValueError, KeyError, TypeError, OSError, GradstoreError):
        return "an owner that has not written its name yet"
