"""One writer a store: a lock that the kernel drops when its owner dies, whatever HDF5's own locking does."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradstore.errors import LockedError

LOCK = ".lock"


@contextmanager
def writer_lock(directory: Path) -> Iterator[None]:
    """Hold the writer's lock of the store in `directory`.

    The lock is `flock` on a file that stays in place and names its owner for the message only: a dead owner's
    lock is gone with the owner, so there is no stale lock to recognise or remove.

    Raises:
        LockedError: another process holds it; names its pid and host.
    """
    fd = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                "another process is writing this store",
                where=directory,
                got=_owner(fd),
                hint="Wait for it to finish, or stop it; finished shards are kept",
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        os.close(fd)


def _owner(fd: int) -> str:
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
        return f"pid {int(owner['pid'])} on host {str(owner['host'])[:64]}"
    except (ValueError, KeyError, TypeError):
        return "an owner that has not written its name yet"
