"""Whose a lock is, and whether its owner still lives."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """Whose a lock is.

    Attributes:
        number: of this lock, 16 random digits.
        host: name of the machine.
        place: what tells its processes from those of others: the machine's boot and the numbering of its processes.
        pid: of the process.
        started: when it started, by its machine's clock; numbers of processes are used again.
    """

    number: str
    host: str
    place: str
    pid: int
    started: str

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        pid = os.getpid()
        return cls(secrets.token_hex(8), socket.gethostname(), _place(), pid, _started(pid))

    @classmethod
    def read(cls, content: bytes) -> Owner | None:
        """The owner that a file names; None where it says something else."""
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            said = json.loads(content)
            number, host, place, started = (str(said[name])[:256] for name in ("number", "host", "place", "started"))
            if re.fullmatch("[0-9a-f]{16}", number):
                return cls(number, host, place, int(said["pid"]), started)
        return None

    def is_dead(self) -> bool | None:
        """Whether the process is gone; None where that cannot be seen from here."""
        if (self.host, self.place) != (socket.gethostname(), _place()):
            return None
        return _started(self.pid) != self.started if self.started else not is_alive(self.pid)


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _place() -> str:
    """The boot of this machine and its numbering of processes, where the system tells."""
    boot = _read("/proc/sys/kernel/random/boot_id").decode(errors="replace").strip()
    with suppress(OSError):
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return boot


def _started(pid: int) -> str:
    """When a process started, in ticks since the boot; "" where there is none, or the system does not tell."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return fields[19].decode() if len(fields) > 19 and fields[0] != b"Z" else ""


def _read(path: str) -> bytes:
    with suppress(OSError):
        return Path(path).read_bytes()
    return b""
