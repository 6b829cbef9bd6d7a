"""Every byte a store reads or writes goes through one `Disk`, so that tests can inject faults.

The underscore methods are single system calls; the public ones add the loops that make them whole: short
writes are continued, interrupted calls repeated, and every failure becomes one clear error.
"""

from __future__ import annotations

import ctypes
import errno
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

from gradstore.errors import CorruptError, GradstoreError, NoSpaceError, UnsafeError, UsageError

T = TypeVar("T")

_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux only
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]

_INTERRUPTIONS = 1000  # in a row, after which a call is given up


class MissingFileError(CorruptError):
    """A file that should be there is not."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_UNUSABLE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)


class Disk:
    """Positioned reads and writes, allocation, durable renames; replaceable by a faulty one in tests."""

    def _open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o644)

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
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        fd = self._call(path, lambda: self._open(path, flags))
        try:
            if size:
                self._call(path, lambda: self._allocate(fd, size), size)
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def open(self, path: Path) -> Iterator[int]:
        """Open an existing regular file, read-only.

        Yields:
            Its descriptor, open within the block.

        Raises:
            MissingFileError: there is none.
            UnsafeError: a symbolic link, pipe or device stands in its place.
        """
        # O_NONBLOCK: opening a pipe without it waits for a writer that may never come.
        fd = self._call(path, lambda: self._open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UnsafeError("this is not a regular file", where=path, expected="a file that gradstore wrote")
            yield fd
        finally:
            os.close(fd)

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
            size = os.fstat(fd).st_size
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
        fd = self._call(path, lambda: self._open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW))
        try:
            end = os.fstat(fd).st_size
            last = bytearray(min(end, 1))
            self.read_into(fd, memoryview(last), end - len(last), path)
            start = "\n" if last and last != b"\n" else ""
            self.write(fd, f"{start}{line}\n".encode(), end, path)
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
        """A descriptor that holds the exclusive lock of `path`, created where missing; None where another holds it."""
        fd = self._call(path, lambda: self._open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW))
        try:
            self._call(path, lambda: self._flock(fd))
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return fd

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
                    raise self._explained(error, path, size) from error
        raise AssertionError("unreachable")

    def _explained(self, error: OSError | ValueError, path: Path, size: int | None) -> GradstoreError:
        code = error.errno if isinstance(error, OSError) else errno.EINVAL  # ValueError: a NUL in the path
        reason = os.strerror(code or errno.EIO)
        if code in _FULL:
            return NoSpaceError(
                "the disk is full",
                where=path,
                expected=None if size is None else f"room for {size} bytes",
                got=f"{self.free_bytes(path.parent)} bytes free, {reason}",
                hint="Free some space and run the same command again; finished shards are kept",
            )
        if code == errno.ENOENT:
            return MissingFileError("the file is gone", where=path)
        if code == errno.ELOOP:
            return UnsafeError("a symbolic link stands where a file of the store should be", where=path)
        if code in _DENIED:
            return UsageError("this file may not be touched", where=path, got=reason)
        if code in _UNUSABLE:
            return UsageError("this path cannot be used", where=repr(str(path)), got=reason)
        return CorruptError(
            "the disk reports a failure",
            where=path,
            got=reason,
            hint="Finished shards are kept; look at the system log",
        )
