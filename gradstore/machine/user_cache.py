"""What is kept of one user on this machine, outside every store: compiled code, verdicts, and a secret key.

All of it can be removed at any time and costs only time. The key marks files in stores that this user has written here,
for readers that cannot stand a file of anyone else's.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

_KEY = "store-files.key"
_KEY_BYTES = 32


def cache_folder() -> Path:
    """Where it is: ``GRADSTORE_CACHE``, or the user's cache directory."""
    chosen = os.environ.get("GRADSTORE_CACHE")
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gradstore"
    except RuntimeError:  # there is no home: a place where nothing can be, so that it costs time only
        return Path(os.devnull) / "gradstore"


def publish(path: Path, content: bytes) -> None:
    """Put a file into the cache by rename, so that another process sees all of it or nothing, and others never."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def user_key() -> bytes | None:
    """The user's secret key, 32 bytes; None where there is none that only this user can have read."""
    path = cache_folder() / _KEY
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        found = os.fstat(fd)
        private = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
        key = os.read(fd, _KEY_BYTES + 1) if private else b""
        return key if len(key) == _KEY_BYTES else None
    except OSError:
        return None
    finally:
        os.close(fd)


def made_user_key() -> bytes | None:
    """The user's secret key, made where there is none; None where the cache cannot be written."""
    if user_key() is None:
        with suppress(OSError, ValueError):
            publish(cache_folder() / _KEY, secrets.token_bytes(_KEY_BYTES))
    return user_key()
