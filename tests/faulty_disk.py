"""Disks that fail: at the N-th call, by being slow, by forgetting what was not synced."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradstore.store.files.disk import Disk

CALLS = (
    "_open",
    "_stat",
    "_pwrite",
    "_preadv",
    "_allocate",
    "_truncate",
    "_fsync",
    "_begin_sync",
    "_flock",
    "_replace",
    "_link",
    "_touch",
    "_unlink",
    "_mkdir",
)


class KilledError(BaseException):
    """The process is gone: nothing after this call happens, no clean-up either."""


class WatchedDisk(Disk):
    """Tells `before` of every system call; `before` may raise, or return a value to use instead of calling."""

    def __init__(self, before: Callable[[str, tuple[Any, ...]], Any] = lambda name, arguments: None) -> None:
        self.before = before
        self.calls = self.concerned = 0


def _watched(name: str) -> Callable[..., Any]:
    def call(self: WatchedDisk, *arguments: Any) -> Any:
        self.calls += 1
        instead = self.before(name, arguments)
        return getattr(Disk, name)(self, *arguments) if instead is None else instead

    return call


for _name in CALLS:
    setattr(WatchedDisk, _name, _watched(_name))


def failing(at: int, kind: str, for_good: bool) -> WatchedDisk:
    """Call number `at` fails (and all later ones too); "short" does half of what it should."""
    return failing_where(lambda name, arguments: True, at, kind, for_good)


def failing_where(concerns: Callable[[str, tuple[Any, ...]], bool], at: int, kind: str, for_good: bool) -> WatchedDisk:
    """The same of just those calls that `concerns` tells from their name and arguments; counted as `concerned`."""

    def before(name: str, arguments: tuple[Any, ...]) -> Any:
        if not concerns(name, arguments):
            return None
        disk.concerned += 1
        if disk.concerned != at and not (for_good and disk.concerned > at):
            return None
        if kind == "killed":
            raise KilledError
        if kind != "short":
            raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))
        if name in ("_pwrite", "_preadv") and len(arguments[1]) > 1:
            fd, view, offset = arguments
            return getattr(Disk, name)(disk, fd, view[: len(view) // 2], offset)
        return None

    disk = WatchedDisk(before)
    return disk


def slow(seconds: float) -> WatchedDisk:
    """Each call takes some time, so that a kill at a random moment falls anywhere."""
    return WatchedDisk(lambda name, arguments: time.sleep(seconds))


def without_flock(kind: str = "ENOLCK") -> WatchedDisk:
    """A network file system that has no `flock`."""

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "_flock":
            raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))

    return WatchedDisk(before)


class NoLockDisk(Disk):
    """A control: a lock that nobody holds."""

    def _flock(self, fd: int) -> None:
        pass


class LoggingDisk(Disk):
    """Writes to the real disk and keeps a log of what it did, from which `crash_state` makes what a power cut leaves.

    Args:
        syncs: whether `fsync` is asked for; without it this is the control.
    """

    def __init__(self, syncs: bool = True) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.syncs = syncs
        self._names: dict[Path, int] = {}
        self._fds: dict[int, int | Path] = {}
        self._inodes = 0

    def _open(self, path: Path, flags: int, mode: int = 0o666) -> int:
        fd = super()._open(path, flags, mode)
        if path.is_dir():
            self._fds[fd] = path
            return fd
        if path not in self._names:
            self._inodes += 1
            self._names[path] = self._inodes
            self.log.append(("create", path, self._inodes))
        self._fds[fd] = self._names[path]
        return fd

    def _pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        done = super()._pwrite(fd, data, offset)
        self.log.append(("write", self._fds[fd], offset, bytes(data[:done])))
        return done

    def _allocate(self, fd: int, size: int) -> None:
        super()._allocate(fd, size)
        self.log.append(("size", self._fds[fd], size))

    def _truncate(self, fd: int, size: int) -> None:
        super()._truncate(fd, size)
        self.log.append(("size", self._fds[fd], size))

    def _fsync(self, fd: int) -> None:
        if self.syncs:
            self.log.append(("sync", self._fds[fd]))

    def _replace(self, source: Path, target: Path) -> None:
        super()._replace(source, target)
        self._names[target] = self._names.pop(source)
        self.log.append(("rename", source, target, self._names[target]))

    def _unlink(self, path: Path) -> None:
        super()._unlink(path)
        if self._names.pop(path, None) is not None:
            self.log.append(("unlink", path))

    def _mkdir(self, path: Path) -> None:
        super()._mkdir(path)
        self.log.append(("mkdir", path))
