"""Every byte a store reads or writes goes through one `Disk`, so that tests can inject faults.

The underscore methods are single system calls; the public ones add the loops that make them whole: short
writes are continued, interrupted calls repeated, and every failure becomes one clear error.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeVar

from gradstore.errors import CorruptError, GradstoreError, UnsafeError, UsageError
from gradstore.store.files.disk_errors import NO_FLOCK, MissingFileError, explained

__all__ = ["Disk", "MissingFileError", "NoFlockError"]

T = TypeVar("T")

_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux only
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]

_INTERRUPTIONS = 1000  # in a row, after which a call is given up
# No link is followed, and opening a pipe does not wait for somebody who may never come.
_AS_IT_IS = os.O_NOFOLLOW | os.O_NONBLOCK


class NoFlockError(UsageError):
    """The file system has no `flock`."""


class Disk:
    """Positioned reads and writes, allocation, durable renames; replaceable by a faulty one in tests."""

    def _open(self, path: Path, flags: int, mode: int = 0o666) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def _stat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def _pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def _preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def _allocate(self, fd: int, size: int) -> None:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        else:  # macOS: a hole, found full at the write instead of here
            os.ftruncate(fd, size)

    def _truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def _fsync(self, fd: int) -> None:
        os.fsync(fd)

    def _begin_sync(self, fd: int) -> None:
        if _sync_file_range is not None:
            _sync_file_range(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)

    def _flock(self, fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def _link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def _touch(self, fd: int) -> None:
        os.utime(fd)

    def _unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def _mkdir(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    # -- files ---------------------------------------------------------------------------------------------------

    @contextmanager
    def create(self, path: Path, size: int) -> Iterator[int]:
        """Create a file, every byte of it paid for on the disk; replaces one of that name.

        Yields:
            Its descriptor, open within the block.

        Raises:
            NoSpaceError: the disk (or a quota, or a file size limit) has no room for it.
        """
        self.remove(path)
        fd = self.open_new(path)
        try:
            if size:
                self._call(path, lambda: self._allocate(fd, size), size)
            yield fd
        finally:
            os.close(fd)

    def open_new(self, path: Path, mode: int = 0o666) -> int:
        """A descriptor of a file that did not exist."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        return self._call(path, lambda: self._open(path, flags, mode))

    def open_in_place(self, path: Path, *, create: bool = True) -> int:
        """A descriptor of a regular file that is read and written where it is, or locked.

        Returns:
            The descriptor.

        Raises:
            UnsafeError: a symbolic link, pipe or device stands in its place.
        """
        return self._open_regular(path, os.O_RDWR | (os.O_CREAT if create else 0))

    def _open_regular(self, path: Path, flags: int) -> int:
        fd = self._call(path, lambda: self._open(path, flags | _AS_IT_IS))
        try:
            if not stat.S_ISREG(self.stat(fd, path).st_mode):
                raise UnsafeError("this is not a regular file", where=path, expected="a file that gradstore wrote")
        except BaseException:
            os.close(fd)
            raise
        return fd

    @contextmanager
    def open(self, path: Path) -> Iterator[int]:
        """Open an existing regular file, read-only.

        Yields:
            Its descriptor, open within the block.

        Raises:
            MissingFileError: there is none.
            UnsafeError: a symbolic link, pipe or device stands in its place.
        """
        fd = self._open_regular(path, os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)

    def stat(self, fd: int, path: Path) -> os.stat_result:
        """What the file system says of an open file."""
        return self._call(path, lambda: self._stat(fd))

    def is_at(self, fd: int, path: Path) -> bool:
        """Whether an open file still has its name: another process may have removed or renamed it meanwhile."""
        with suppress(FileNotFoundError):
            return os.path.samestat(self.stat(fd, path), os.lstat(path))
        return False

    def open_stream(self, path: Path) -> int:
        """A descriptor of a pipe or a terminal; waits for a reader, as every program does that writes to one."""
        return self._call(path, lambda: self._open(path, os.O_WRONLY | os.O_NOCTTY))

    def append(self, fd: int, data: memoryview, path: Path) -> int:
        """Write to a stream; how many bytes it took."""
        return self._call(path, lambda: os.write(fd, data), len(data))

    def allocate(self, fd: int, size: int, path: Path) -> None:
        """Pay now for `size` bytes of an open file.

        Raises:
            NoSpaceError: there is no room for them.
        """
        self._call(path, lambda: self._allocate(fd, size), size)

    def write(self, fd: int, data: bytes | memoryview, offset: int, path: Path) -> None:
        """All of `data` at `offset`, however many calls it takes."""
        view = memoryview(data).cast("B")
        while view:
            done = self._call(path, partial(self._pwrite, fd, view, offset), len(view))
            if done == 0:
                raise CorruptError("the disk takes no more bytes", where=path, expected=f"{len(view)} more at {offset}")
            view, offset = view[done:], offset + done

    def read_into(self, fd: int, buffer: memoryview, offset: int, path: Path) -> None:
        """Fill `buffer` from `offset`.

        Raises:
            CorruptError: the file ends before the buffer is full.
        """
        view = memoryview(buffer).cast("B")
        while view:
            done = self._call(path, partial(self._preadv, fd, view, offset))
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
            size = self.stat(fd, path).st_size
            if size > limit:
                raise CorruptError("the file is too large", where=path, expected=f"at most {limit} bytes", got=size)
            buffer = bytearray(size)
            self.read_into(fd, memoryview(buffer), 0, path)
        return bytes(buffer)

    def replace_file(self, path: Path, data: bytes) -> None:
        """Put `data` at `path` so that a reader sees the old bytes or the new, never a mixture."""
        temporary = path.with_name(f".{path.name}.tmp")
        with self.create(temporary, len(data)) as fd:
            self.write(fd, data, 0, temporary)
            self.sync(fd, temporary)
        self.publish(temporary, path)

    def append_line(self, path: Path, line: str) -> None:
        """Add one line to a text file; a line that an earlier crash tore stays a line of its own."""
        fd = self.open_in_place(path)
        try:
            end = self.stat(fd, path).st_size
            last = bytearray(min(end, 1))
            self.read_into(fd, memoryview(last), end - len(last), path)
            start = "\n" if last and last != b"\n" else ""
            self.write(fd, f"{start}{line}\n".encode(), end, path)
        finally:
            os.close(fd)

    def extend(self, path: Path, data: bytes, size: int) -> None:
        """Add bytes to a file of `size` bytes, durably.

        Raises:
            CorruptError: it has another size, so that somebody else has changed it.
        """
        fd = self.open_in_place(path, create=False)
        try:
            found = self.stat(fd, path).st_size
            if found != size:
                raise CorruptError("the file was changed meanwhile", where=path, expected=f"{size} bytes", got=found)
            self.write(fd, data, size, path)
            self.sync(fd, path)
        finally:
            os.close(fd)

    def remove(self, path: Path) -> None:
        """Remove a file that may already be gone."""
        self._call(path, lambda: self._unlink(path))

    def try_remove(self, path: Path) -> None:
        """Remove a file while another error is on its way, which must not be hidden by a second one."""
        with suppress(GradstoreError, OSError):
            self.remove(path)

    # -- durability and locks ------------------------------------------------------------------------------------

    def begin_sync(self, fd: int) -> None:
        """Have the system begin what `sync` will wait for; a hint, whose failure `sync` will report."""
        with suppress(OSError):
            self._begin_sync(fd)

    def sync(self, fd: int, path: Path) -> None:
        """Return once the file's bytes are on the medium."""
        self._call(path, lambda: self._fsync(fd))

    def publish(self, temporary: Path, final: Path) -> None:
        """Give a synced temporary file its final name, durably."""
        self._call(final, lambda: self._replace(temporary, final))
        self.sync_directory(final.parent)

    def sync_directory(self, directory: Path) -> None:
        """Make the names in `directory` durable."""
        fd = self._call(directory, lambda: self._open(directory, os.O_RDONLY | os.O_DIRECTORY))
        try:
            self.sync(fd, directory)
        finally:
            os.close(fd)

    def make_directory(self, path: Path) -> None:
        """Create `path` and what is missing above it, durably."""
        missing = [directory for directory in (path, *path.parents) if not directory.exists()]
        for directory in reversed(missing):
            self._call(directory, partial(self._mkdir, directory))
            self.sync_directory(directory.parent)
        if not missing:  # it may be left from a run that died before its name was durable
            with suppress(UsageError):
                self.sync_directory(path.parent)

    def lock(self, path: Path) -> int | None:
        """Take the exclusive lock of a file, created where missing.

        Returns:
            The descriptor that holds it; None where another holds it.

        Raises:
            NoFlockError: the file system has no `flock`.
        """
        fd = self.open_in_place(path)
        try:
            held = self.lock_open(fd, path)
        except BaseException:
            os.close(fd)
            raise
        if not held:
            os.close(fd)
        return fd if held else None

    def lock_open(self, fd: int, path: Path) -> bool:
        """Take the exclusive lock of an open file; whether it was free."""
        try:
            self._call(path, lambda: self._flock(fd))
        except BlockingIOError:
            return False
        except GradstoreError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in NO_FLOCK:
                raise NoFlockError("this file system has no flock", where=path) from error
            raise
        return True

    def touch(self, fd: int, path: Path) -> None:
        """Date an open file by the clock of its file system."""
        self._call(path, lambda: self._touch(fd))

    def link(self, source: Path, target: Path) -> bool:
        """Give a file a second name; whether that name was free."""
        try:
            self._call(target, lambda: self._link(source, target))
        except GradstoreError as error:
            if isinstance(error.__cause__, FileExistsError):
                return False
            raise
        return True

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file over another, of whose name nothing need be durable."""
        self._call(target, lambda: self._replace(source, target))

    def overwrite(self, fd: int, data: bytes, path: Path) -> None:
        """Make `data` all that an open file holds."""
        self._call(path, lambda: self._truncate(fd, 0))
        self.write(fd, data, 0, path)

    # -- room ----------------------------------------------------------------------------------------------------

    def free_bytes(self, directory: Path) -> int:
        """Bytes that an unprivileged user may still write below `directory`."""
        return shutil.disk_usage(directory).free

    def largest_file(self) -> int | None:
        """Bytes that one file of this process may have; None for no limit."""
        soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        return None if soft == resource.RLIM_INFINITY else soft

    # -- errors --------------------------------------------------------------------------------------------------

    def _call(self, path: Path, call: Callable[[], T], size: int | None = None) -> T:
        """Make one system call, again where a signal interrupted it, and name the file in its error."""
        for attempt in count():
            try:
                return call()
            except BlockingIOError:
                raise  # a held lock, which the caller explains
            except (OSError, ValueError) as error:
                if not isinstance(error, InterruptedError) or attempt == _INTERRUPTIONS:
                    raise explained(error, path, size, self.free_bytes) from error
        raise AssertionError("unreachable")
