"""Where an output may go: what stands there already, asked before the work begins and again when it is written.

An output replaces a regular file or makes a new one. It never replaces a directory, a device, a pipe or a socket, and
never a file of a store. A symbolic link stays, and the file that it names is replaced, as editors do. A pipe or a
terminal (`/dev/stdout`, `/dev/fd/3`, `>(gzip)`, a FIFO) is written to as it is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from gradstore.errors import UsageError

_DESCRIPTOR = re.compile(r"/dev/(?:fd/(?P<fd>\d{1,9})|(?P<name>stdin|stdout|stderr))|/proc/self/fd/(?P<proc>\d{1,9})")
_NAMES = {"stdin": 0, "stdout": 1, "stderr": 2}
_STORE_NAMES = re.compile(
    r"store\.(?:json|journal)|run\.jsonl|annotations\.safetensors|shard-\d+(?:-\d+)?(?:\.r\d+)?\.h5"
    r"|index-[a-z0-9]+\.(?:safetensors|faiss|json)|\.lock(?:\.owner.*)?"
    r"|\.(?:store\.j(?:son|ournal)|annotations|shard-|index-).*",
    re.IGNORECASE,
)
_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
_ANOTHER = "Name another file"
_LINKS = 40  # one after another, as many as Linux follows


@dataclass(frozen=True)
class Target:
    """A place where an output may go.

    Attributes:
        path: the file, links at its end followed.
        mode: permissions of the file that is there, which its successor keeps; None where there is none.
        stream: whether it is written to as it is rather than replaced.
        fd: the open descriptor of this process that the path names, if it names one.
    """

    path: Path
    mode: int | None = None
    stream: bool = False
    fd: int | None = None


def target_of(path: str | os.PathLike[str], *, streams: bool = True, of_store: bool = False) -> Target:
    """Where an output named `path` goes; changes nothing.

    Args:
        path: as the user gave it.
        streams: whether what is written can go to a pipe or a terminal.
        of_store: whether it is a file that gradstore keeps in a store: then no link is followed, since somebody else
            may have made the store, and its name may be one that a store uses.

    Returns:
        The place.

    Raises:
        UsageError: nothing can be written there, or what is there must not be replaced.
    """
    named = Path(path)
    try:
        final = named if of_store else _followed(named)
        match = None if of_store else _DESCRIPTOR.fullmatch(os.path.abspath(final))
        if match is not None:
            return _open_stream(named, _NAMES.get(match["name"] or "", int(match["fd"] or match["proc"] or 0)), streams)
        found = _standing(final)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        where = repr(str(path))[:200]
        raise UsageError("the output cannot be used", where=where, got=reason, hint=_ANOTHER) from error
    if not of_store:
        _refuse_store_file(final, named)
    if found is None:
        _require_folder(final, named)
        return Target(final)
    kind = stat.S_IFMT(found.st_mode)
    if kind in (stat.S_IFIFO, stat.S_IFCHR) and not of_store:
        return _stream(Target(final, stream=True), named, streams)
    if kind != stat.S_IFREG and not (of_store and kind == stat.S_IFLNK):
        what = _KINDS.get(kind, "a pipe")
        raise UsageError(f"the output is {what}", where=named, expected="a file, or a name for one", hint=_ANOTHER)
    _require_folder(final, named)
    if kind == stat.S_IFREG and not os.access(final, os.W_OK):
        raise UsageError("the output exists and is read-only", where=named, hint=f"{_ANOTHER}, or make it writable")
    return Target(final, stat.S_IMODE(found.st_mode) & 0o777 if kind == stat.S_IFREG else None)


def _followed(named: Path) -> Path:
    """What a path names in the end; the descriptors of this process are names of their own."""
    for _ in range(_LINKS):
        if _DESCRIPTOR.fullmatch(os.path.abspath(named)) or not stat.S_ISLNK(getattr(_standing(named), "st_mode", 0)):
            return named
        named = named.parent / os.readlink(named)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _standing(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _open_stream(named: Path, fd: int, streams: bool) -> Target:
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise UsageError("this descriptor cannot be written to", where=named, hint=_ANOTHER)
    return _stream(Target(named, stream=True, fd=fd), named, streams)


def _stream(target: Target, named: Path, streams: bool) -> Target:
    if not streams:
        raise UsageError("the output must be a file, not a stream", where=named, hint=_ANOTHER)
    return target


def _refuse_store_file(final: Path, named: Path) -> None:
    """No output takes the name of a store's file: neither of one that is there, nor of one that a store would miss."""
    folder = final.parent
    is_store = any(os.path.lexists(folder / name) for name in ("store.json", ".lock"))
    if is_store and _STORE_NAMES.fullmatch(final.name):
        raise UsageError(
            "the output would take the place of a store's own file",
            where=named,
            expected="a name that the store does not use",
            hint="Write it outside the store; nothing was touched",
        )


def _require_folder(final: Path, named: Path) -> None:
    """The folder can be written to, or be made."""
    if final.name in ("", ".."):
        raise UsageError("the output has no name", where=repr(str(named)), hint=_ANOTHER)
    folder = next(folder for folder in final.absolute().parents if os.path.lexists(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError("the output's folder may not be written to", where=named, got=folder, hint=_ANOTHER)
