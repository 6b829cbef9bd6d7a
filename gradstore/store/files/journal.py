"""`store.journal`: the shards that were published since `store.json` was written, one a line.

The first line names the manifest that the journal goes on from, by that one's digest; every other line is the entry of
a shard as a manifest has it. Each line ends with SHA-256 over the digest that ends the line before it and its own text,
so that none can be changed, dropped, repeated or moved unnoticed, but for the last ones dropped: that is the journal as
it was before. A journal of another manifest says nothing: a manifest is written whole before the journal is removed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gradstore.errors import CorruptError
from gradstore.store.files.disk import Disk, MissingFileError

JOURNAL = "store.journal"
_FIRST = re.compile(rb"gradstore journal 1 of ([0-9a-f]{64})")
_MOST_LINES = 1 << 20  # each is held; a writer makes no more of them than a manifest may have shards
_SEAL = 65  # a space and 64 hexadecimal digits, which end each line
DAMAGED = "the journal is not what was written"
RESTORE = "Restore the file from a copy, or delete it: the shards that only it lists are then computed again"


class Journal:
    """The journal of a manifest that is on the disk, empty at first; only who wrote that manifest adds to it.

    Args:
        folder: the store.
        manifest: digest of the manifest.
        disk: where bytes go.

    Attributes:
        lines: shards that it lists.
    """

    def __init__(self, folder: Path, manifest: str, disk: Disk) -> None:
        self._file, self._manifest, self._disk = folder / JOURNAL, manifest, disk
        self._seal, self._size = b"", 0
        self.lines = 0

    def append(self, entry: str) -> None:
        """Add one shard, durably.

        Raises:
            GradstoreError: it may be there or not; nothing more can be added, and the manifest has to be written anew.
        """
        if self.lines == 0:
            first = self._sealed(f"gradstore journal 1 of {self._manifest}") + self._sealed(entry)
            self._disk.replace_file(self._file, first)  # so that no journal is ever there without its first line
            self._size = len(first)
        else:
            line = self._sealed(entry)
            self._disk.extend(self._file, line, self._size)
            self._size += len(line)
        self.lines += 1

    def _sealed(self, text: str) -> bytes:
        self._seal = _seal(self._seal, text.encode())
        return text.encode() + b" " + self._seal + b"\n"


@dataclass(frozen=True)
class JournalLines:
    """What a journal says.

    Attributes:
        manifest: digest of the manifest that it goes on from; "" where there is no journal.
        entries: JSON of a shard each, nothing checked but their digests.
    """

    manifest: str = ""
    entries: tuple[bytes, ...] = ()


def read_journal(folder: Path, disk: Disk, limit: int) -> JournalLines:
    """Read the journal of the store at `folder`, which is to be done before its manifest is read.

    A manifest is written before its journal is removed, so that who reads in this order misses no shard.

    Args:
        folder: the store.
        disk: where bytes come from.
        limit: bytes beyond which a file is refused.

    Returns:
        Its lines; none where there is no journal. A last line that a crash has torn never counted, and is left out.

    Raises:
        CorruptError: it is not what was written.
        UnsafeError: it is a symbolic link or no regular file.
    """
    file = folder / JOURNAL
    try:
        data = disk.read_file(file, limit)
    except MissingFileError:
        return JournalLines()
    try:
        first, *entries = _checked(data)
        return JournalLines(_manifest_of(first), tuple(entries))
    except ValueError as error:
        raise CorruptError(DAMAGED, where=file, got=error, hint=RESTORE) from error


def remove_journal(folder: Path, disk: Disk) -> None:
    """Remove the journal of a manifest that was replaced; harmless where the removal is lost."""
    disk.remove(folder / JOURNAL)


def _manifest_of(first: bytes) -> str:
    match = _FIRST.fullmatch(first)
    if match is None:
        raise ValueError("a first line of another form or version")
    return match[1].decode()


def _checked(data: bytes) -> Iterator[bytes]:
    """The text of each line, whose digests are as they were written, but for a torn last one."""
    if data.count(b"\n") > _MOST_LINES:
        raise ValueError("too many lines")
    *lines, rest = data.split(b"\n")
    seal = b""
    for number, line in enumerate(lines):
        text, seal = line[:-_SEAL], _seal(seal, line[:-_SEAL])
        if line[-_SEAL:] != b" " + seal:
            if number == len(lines) - 1 > 0 and not rest and _is_torn(line):
                return
            raise ValueError(f"line {number + 1} does not match its digest")
        yield text
    whole = rest[:-1]
    if not lines or (whole[-_SEAL:] == b" " + _seal(seal, whole[:-_SEAL]) and not rest.endswith(b"\0")):
        raise ValueError("a line without an end")


def _seal(last: bytes, text: bytes) -> bytes:
    return hashlib.sha256(last + text).hexdigest().encode()


def _is_torn(line: bytes) -> bool:
    """Whether parts of a line never reached the medium: they read as zeros, at an end or many; no line has one."""
    return line.startswith(b"\0") or b"\0\0" in line
