"""One writer a store: a lock that the kernel drops when its owner dies, whatever HDF5's own locking does."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gradstore.errors import GradstoreError, LockedError
from gradstore.store.files.disk import Disk

LOCK = ".lock"
_TRIES = 100


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
        if disk.is_at(fd, path):
            return fd
        os.close(fd)


def _owner(path: Path, disk: Disk) -> str:
    """Who holds the lock. It writes its name just after taking it, and until then a dead owner's may stand there."""
    for _ in range(_TRIES):
        with suppress(ValueError, KeyError, TypeError, OSError, GradstoreError):
            owner = json.loads(disk.read_file(path, 4096))
            pid, host = int(owner["pid"]), str(owner["host"])[:64]
            if host != socket.gethostname() or _alive(pid):
                return f"pid {pid} on host {host}"
        time.sleep(0.01)
    return "an owner that has not written its name yet"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
