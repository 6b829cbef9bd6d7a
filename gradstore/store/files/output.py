"""The one way to write an output: tables, pages, surrogates, exports, indexes, project files. Whole or not at all.

It is written beside its place under a random name, `.<name>.<12 digits>.tmp`, synced, renamed, and its folder synced.
As long as it is written its temporary file is locked by `flock`, which ends with the process however that ends: so the
next writer of the same output knows which ones nobody writes any more, and removes these alone. Some network file
systems have no `flock`, or one that other hosts do not see: there leftovers stay, and the first digits stand for the
host. Two writers never share a temporary file, and whoever renames last wins, with a whole file.
"""

from __future__ import annotations

import os
import re
import secrets
import select
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from gradstore.errors import GradstoreError, UsageError
from gradstore.store.files.disk import Disk, NoFlockError
from gradstore.store.files.target import Target, target_of

_LONGEST = 200  # bytes of an output's name that its temporary file's name begins with
_TRIES = 100


def write_output(
    path: str | os.PathLike[str],
    pieces: Iterable[bytes | memoryview],
    *,
    size: int = 0,
    keep: bool = False,
    of_store: bool = False,
    disk: Disk | None = None,
) -> Path:
    """Write a file that a user named; its folder is created. A pipe or a terminal is written to as it is.

    Args:
        path: the file; one that is there is replaced, and its permissions kept.
        pieces: its bytes, asked for one after another while it is written.
        size: bytes to be sure of before the first one, where they are known.
        keep: leave a file alone that is there.
        of_store: whether it is a file that gradstore keeps in a store; see `target_of`.
        disk: where bytes go.

    Returns:
        The path, as given.

    Raises:
        UsageError: nothing can be written there, or with `keep` something is there.
        NoSpaceError: the disk is full; nothing is left behind.
        ClosedError: nobody reads the pipe.
    """
    disk = disk or Disk()
    target = target_of(path, streams=not keep, of_store=of_store)
    if target.stream:
        _pour(target, pieces, disk)
        return Path(path)
    with new_file(target, disk, size, keep=keep) as (fd, _):
        at = 0
        for piece in pieces:
            disk.write(fd, piece, at, target.path)
            at += len(piece)
    return Path(path)


@contextmanager
def new_file(target: Target, disk: Disk, size: int = 0, *, keep: bool = False) -> Iterator[tuple[int, Path]]:
    """Write a file in the block; it gets its name when the block ends, and is removed when the block raises.

    Yields:
        (its descriptor, its temporary path, at which another library may write in place).

    Raises:
        UsageError: with `keep`, there is a file of that name.
        NoSpaceError: there is no room for `size` bytes.
    """
    path = target.path
    disk.make_directory(path.parent)
    remove_leftovers(path.parent, re.escape(_stem(path)), disk)
    fd, temporary = _begin(target, disk)
    try:
        if size:
            disk.allocate(fd, size, path)
        yield fd, temporary
        if target.mode is not None:
            with suppress(OSError):  # of a file that belongs to somebody else
                os.fchmod(fd, target.mode)
        disk.sync(fd, path)
        if keep:
            _publish_new(temporary, path, disk)
        else:
            disk.publish(temporary, path)
    except BaseException:
        disk.try_remove(temporary)
        raise
    finally:
        os.close(fd)


def remove_leftovers(folder: Path, stem: str, disk: Disk) -> None:
    """Remove temporary files of this host that no process writes any more.

    Args:
        folder: where they are.
        stem: a regular expression of the names that outputs have, such as those of indexes.
        disk: where files are.
    """
    pattern = re.compile(rf"\.(?:{stem})\.{_host()}[0-9a-f]{{8}}\.tmp")
    with suppress(OSError):
        for name in os.listdir(folder):
            if pattern.fullmatch(name):
                with suppress(GradstoreError, OSError):
                    _remove_if_dead(folder / name, disk)


def _remove_if_dead(temporary: Path, disk: Disk) -> None:
    fd = disk.open_in_place(temporary, create=False)
    try:
        # Its writer may have renamed it since it was listed: then another file may have this name, or none.
        if disk.lock_open(fd, temporary) and disk.is_at(fd, temporary):
            disk.remove(temporary)
    finally:
        os.close(fd)


def _begin(target: Target, disk: Disk) -> tuple[int, Path]:
    """A new temporary file that this process holds the lock of."""
    mode = 0o666 if target.mode is None else 0o600  # of a private file nobody sees a byte meanwhile
    for _ in range(_TRIES):
        temporary = target.path.with_name(f".{_stem(target.path)}.{_host()}{secrets.token_hex(4)}.tmp")
        fd = disk.open_new(temporary, mode)
        try:
            with suppress(NoFlockError):
                # Another writer may look at it just now, before it is locked, and take it for a leftover.
                if not disk.lock_open(fd, temporary) or not disk.is_at(fd, temporary):
                    os.close(fd)
                    continue
        except BaseException:
            os.close(fd)
            disk.try_remove(temporary)
            raise
        return fd, temporary
    raise UsageError("other writers remove what is begun here", where=target.path, hint="Name another file")


def _publish_new(temporary: Path, path: Path, disk: Disk) -> None:
    """Give a file its name if that is free."""
    if not disk.link(temporary, path):
        raise UsageError("this file exists and is left alone", where=path, hint="Name another file")
    disk.remove(temporary)
    disk.sync_directory(path.parent)


def _host() -> str:
    """Four digits that stand for this host."""
    return sha256(socket.gethostname().encode()).hexdigest()[:4]


def _stem(path: Path) -> str:
    return os.fsdecode(os.fsencode(path.name)[:_LONGEST])


def _pour(target: Target, pieces: Iterable[bytes | memoryview], disk: Disk) -> None:
    fd = os.dup(target.fd) if target.fd is not None else disk.open_stream(target.path)
    try:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            while view:
                try:
                    view = view[disk.append(fd, view, target.path) :]
                except BlockingIOError:  # a terminal whose other programs do not want to wait
                    select.select([], [fd], [])
    finally:
        os.close(fd)
