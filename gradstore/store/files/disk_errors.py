"""What a failed system call means: damage, a full disk, a refusal, a limit of this process, or a disk that failed.

Only bytes that were read and are not what was written are damage. A call that fails says nothing of the bytes, so that
nobody may take it for damage and remove them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from gradstore.errors import ClosedError, CorruptError, GradstoreError, NoSpaceError, UnsafeError, UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_UNUSABLE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)
_LIMITS = {
    errno.EMFILE: "Raise the limit of open files (ulimit -n) and run the same command again",
    errno.ENFILE: "Wait until other processes have closed some and run the same command again",
    errno.ENOMEM: "Free some memory and run the same command again",
}
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What a file system answers that has no `flock`."""


class MissingFileError(CorruptError):
    """A file that should be there is not."""


class FailingDiskError(CorruptError):
    """The disk failed, so that nothing is known of the bytes."""


def explained(error: OSError | ValueError, path: Path, size: int | None, free: Callable[[Path], int]) -> GradstoreError:
    """The error of a system call as one that a caller can act on.

    Args:
        error: what was raised; a ValueError is a NUL in the path.
        path: the file.
        size: bytes that were asked for, if any.
        free: bytes that are free below a folder.

    Returns:
        The error to raise.
    """
    code = (error.errno or errno.EIO) if isinstance(error, OSError) else errno.EINVAL
    reason = os.strerror(code)
    if code in _FULL:
        return NoSpaceError(
            "the disk is full",
            where=path,
            expected=None if size is None else f"room for {size} bytes",
            got=f"{free(path.parent)} bytes free, {reason}",
            hint="Free some space and run the same command again; finished shards are kept",
        )
    if code == errno.ENOENT:
        return MissingFileError("the file is gone", where=path)
    if code == errno.ELOOP:
        return UnsafeError("a symbolic link stands where a file of the store should be", where=path)
    if code == errno.EPIPE:
        return ClosedError("nobody reads this output any more", where=path)
    if code in _DENIED:
        return UsageError("this file may not be touched", where=path, got=reason)
    if code in _UNUSABLE:
        return UsageError("this path cannot be used", where=repr(str(path)), got=reason)
    if code in _LIMITS:
        return UsageError("the system has no more for this process", where=path, got=reason, hint=_LIMITS[code])
    return FailingDiskError(
        "the disk reports a failure",
        where=path,
        got=reason,
        hint="Finished shards are kept; look at the system log",
    )
