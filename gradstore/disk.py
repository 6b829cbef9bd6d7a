"""Every byte a store reads or writes goes through one `Disk`, so that tests can inject faults.

The underscore methods are single system calls; the public ones add the loops that make them whole: short
writes are continued, interrupted calls repeated, and a full disk becomes one clear error.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradstore.errors import CorruptError, NoSpaceError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Disk:
    """Positioned reads and writes, allocation, durable renames; replaceable by a faulty one in tests."""

    def _pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def _preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def _allocate(self, fd: int, size: int) -> None:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        else:  # macOS: a hole, found full at the write instead of here
            os.ftruncate(fd, size)

    def _fsync(self, fd: int) -> None:
        os.fsync(fd)

    def _replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def _open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o644)

    def _unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    @contextmanager
    def create(self, path: Path, size: int) -> Iterator[int]:
        """A new file of `size` bytes, every one of them already paid for on the disk.

        Raises:
            NoSpaceError: the disk (or a quota, or a file size limit) has no room for it.
        """
        fd = self._open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            if size:
                with self._full_disk_named(path, size):
                    _retry(lambda: self._allocate(fd, size))
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def open(self, path: Path) -> Iterator[int]:
        """An existing regular file, read-only; a symbolic link is refused by the system."""
        fd = self._open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            yield fd
        finally:
            os.close(fd)

    def write(self, fd: int, data: bytes | memoryview, offset: int, path: Path) -> None:
        """All of `data` at `offset`, however many calls it takes."""
        view = memoryview(data).cast("B")
        with self._full_disk_named(path, len(view)):
            while view:
                rest, at = view, offset
                done = _retry(lambda: self._pwrite(fd, rest, at))
                view, offset = view[done:], offset + done

    def read_into(self, fd: int, buffer: memoryview, offset: int, path: Path) -> None:
        """Fill `buffer` from `offset`.

        Raises:
            CorruptError: the file ends before the buffer is full.
        """
        view = memoryview(buffer).cast("B")
        while view:
            rest, at = view, offset
            done = _retry(lambda: self._preadv(fd, rest, at))
            if done == 0:
                raise CorruptError(
                    "the file ends too early",
                    where=path,
                    expected=f"{len(view)} more bytes at {offset}",
                    hint="Run `gradstore verify` on the store",
                )
            view, offset = view[done:], offset + done

    def read_file(self, path: Path, limit: int) -> bytes:
        """A whole small file, refused when it is larger than `limit` bytes."""
        with self.open(path) as fd:
            size = os.fstat(fd).st_size
            if size > limit:
                raise CorruptError("the file is too large", where=path, expected=f"at most {limit} bytes", got=size)
            buffer = bytearray(size)
            self.read_into(fd, memoryview(buffer), 0, path)
        return bytes(buffer)

    def sync(self, fd: int) -> None:
        """Return once the file's bytes are on the medium."""
        _retry(lambda: self._fsync(fd))

    def publish(self, temporary: Path, final: Path) -> None:
        """Give a synced temporary file its final name, durably."""
        _retry(lambda: self._replace(temporary, final))
        self.sync_directory(final.parent)

    def sync_directory(self, directory: Path) -> None:
        """Make the names in `directory` durable."""
        fd = self._open(directory, os.O_RDONLY)
        try:
            self.sync(fd)
        finally:
            os.close(fd)

    def replace_file(self, path: Path, data: bytes) -> None:
        """Put `data` at `path` so that a reader sees the old bytes or the new, never a mixture."""
        temporary = path.with_name(f".{path.name}.tmp")
        with self.create(temporary, len(data)) as fd:
            self.write(fd, data, 0, temporary)
            self.sync(fd)
        self.publish(temporary, path)

    def remove(self, path: Path) -> None:
        """Remove a file that may already be gone."""
        _retry(lambda: self._unlink(path))

    def free_bytes(self, directory: Path) -> int:
        """Bytes that an unprivileged user may still write below `directory`."""
        return shutil.disk_usage(directory).free

    @contextmanager
    def _full_disk_named(self, path: Path, size: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise NoSpaceError(
                "the disk is full",
                where=path,
                expected=f"room for {size} bytes",
                got=f"{self.free_bytes(path.parent)} free",
                hint="Free some space and run the same command again; finished shards are kept",
            ) from error


def _retry(call):  # type: ignore[no-untyped-def]
    """Repeat a call that a signal interrupted before it did anything."""
    while True:
        try:
            return call()
        except InterruptedError:
            continue
