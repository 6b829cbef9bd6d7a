"""`StoreWriter`: the one writer of a store. A row counts as stored only after manifest or journal list its shard."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gradstore.errors import CorruptError, NoSpaceError, UsageError
from gradstore.machine.byte_counts import format_bytes
from gradstore.store.files.disk import Disk
from gradstore.store.files.journal import JOURNAL, Journal
from gradstore.store.files.lock import LOCK, OWNER, writer_lock
from gradstore.store.files.manifest import MANIFEST, Manifest, Shard, shard_name
from gradstore.store.files.manifest_file import FILE_BYTES, parse_manifest, read_manifest, write_manifest
from gradstore.store.files.output import remove_leftovers
from gradstore.store.files.shard_writer import ShardWriter, write_shard
from gradstore.store.identity import require_same
from gradstore.store.schema import Schema

RUN_LOG = "run.jsonl"
_TEMPORARY = re.compile(
    r"\.(?:shard-\d{5,}(?:-\d+)?(?:\.r\d+)?\.h5|store\.json|store\.journal|annotations\.safetensors)\.tmp"
)
_SHARD = re.compile(r"shard-\d{5,}(?:-\d+)?(?:\.r\d+)?\.h5")
_LINES = 64  # that a journal may have before the manifest is written anew, however few shards that one lists
_INDEX = r"index-[a-z0-9]+\.(?:safetensors|faiss|json)"


class StoreWriter:
    """The one writer of a store; made by `open_writer`, which holds the lock.

    Args:
        path: the store.
        manifest: what is published so far.
        disk: where bytes go.
        short: a short last shard, listed on the disk, that a longer one will replace. Until then the manifest on the
            disk stays as it is, so that no stored row is lost, not even for a moment.

    Attributes:
        manifest: what is published so far.
        computation: `Shard.computation` of the rows that will be written.
        require_lock: asked before anything is published or dropped; raises where the lock was lost.
    """

    def __init__(self, path: Path, manifest: Manifest, disk: Disk, short: Shard | None = None) -> None:
        self.path, self.manifest, self.disk = path, manifest, disk
        self._short = short
        self.computation = 0
        self._journal: Journal | None = None  # until this writer has written the manifest, whatever another one left
        self.require_lock: Callable[[], None] = lambda: None

    @property
    def missing(self) -> tuple[int, ...]:
        """Shards to write, in order: first a longer one for a short last one, since only then others can be listed."""
        first = () if self._short is None else (self._short.index,)
        return (*first, *(i for i in self.manifest.missing if i not in first))

    @property
    def bytes_missing(self) -> int:
        """Bytes that the missing shards will take."""
        missing = self.manifest.missing
        if not missing:
            return 0
        # All but the last shard of a store are of one size.
        return self.manifest.layout_of(missing[0]).size * (len(missing) - 1) + self.manifest.layout_of(missing[-1]).size

    def require_space(self) -> None:
        """Refuse to start what the disk cannot hold.

        Raises:
            NoSpaceError: fewer bytes are free than the missing shards take, or a shard is larger than a file may be.
        """
        need, free = self.bytes_missing, self.disk.free_bytes(self.path)
        hint = "Choose another --out, a smaller --proj-dim, --dtype int8, or --layout sum"
        if need > free:
            raise NoSpaceError(
                "the store does not fit the disk",
                where=self.path,
                expected=f"{format_bytes(need)} free",
                got=format_bytes(free),
                hint=hint,
            )
        largest = max((self.manifest.layout_of(i).size for i in self.manifest.missing[:1]), default=0)
        limit = self.disk.largest_file()
        if limit is not None and largest > limit:
            raise NoSpaceError(
                "a shard is larger than a file of this process may be (ulimit -f)",
                where=self.path,
                expected=format_bytes(largest),
                got=format_bytes(limit),
                hint=hint,
            )

    @contextmanager
    def shard(self, index: int) -> Iterator[ShardWriter]:
        """Write shard `index`, one that exists anew; it counts when the block ends, and is removed when it raises."""
        with write_shard(self.path, self.manifest, index, self.disk, self.computation) as writer:
            yield writer
        self.adopt(writer.shard)

    def adopt(self, shard: Shard) -> None:
        """List a shard that has its final name and is on the medium, whoever wrote it."""
        self.require_lock()
        earlier = self.manifest.shard(shard.index)
        replaced = None if earlier is None else self.manifest.file_of(shard.index)
        self.manifest = self.manifest.with_shard(shard)
        short = self._short
        if short is None or shard.index == short.index:
            self._publish(shard, last=earlier is None and self.manifest.complete)
        if short is not None and shard.index == short.index:
            self._short = None
            # Just this file: workers may have published others that are not listed yet.
            self.disk.remove(self.path / shard_name(short.index, short.rows, short.revision))
        if replaced is not None:
            self.disk.remove(self.path / replaced)

    def _publish(self, shard: Shard, *, last: bool) -> None:
        """List on the disk a shard that is in the manifest: by a line of the journal, or by writing the manifest anew.

        Which is done when a journal is as long as its manifest, so that n shards cost bytes of the order of n.

        Args:
            shard: the shard.
            last: whether it makes the store complete; a finished store has no journal.
        """
        journal, self._journal = self._journal, None  # until the line is known to be there
        if last or journal is None or journal.lines >= max(len(self.manifest.shards) // 2, _LINES):
            self._rewrite()
        else:
            journal.append(shard.line)
            self._journal = journal

    def _rewrite(self) -> None:
        self._journal = None  # while it is not known which manifest is on the disk
        self._journal = write_manifest(self.path, self.manifest, self.disk)

    def settle(self) -> None:
        """Leave no journal behind, neither this writer's nor an earlier one's; asked for when all is done."""
        if self._short is None and os.path.lexists(self.path / JOURNAL):
            self.require_lock()
            self._rewrite()

    def drop(self, indices: Iterable[int]) -> None:
        """Make damaged shards missing, so that they are computed again."""
        self.require_lock()
        dropped = set(indices)
        files = [self.manifest.file_of(index) for index in dropped]
        self.manifest = self.manifest.without(dropped)
        if dropped and self._short is None:
            self._rewrite()
        for name in files:
            self.disk.remove(self.path / name)

    def forget(self, removed: tuple[tuple[int, int], ...]) -> None:
        """Put down which rows are removed for good, as stretches: from now on no shard is written that holds them."""
        self.require_lock()
        if removed != self.manifest.removed:
            self.manifest = replace(self.manifest, removed=removed)
            self._rewrite()

    def remove_indexes(self) -> None:
        """Delete the indexes kept beside the shards, which are built again where they are wanted."""
        self.require_lock()
        for name in sorted(os.listdir(self.path)):
            if re.fullmatch(_INDEX, name):
                self.disk.remove(self.path / name)

    def clean(self) -> None:
        """Remove what no row is in: temporary files, and shards that were never listed or are not any more."""
        kept = {self.manifest.file_of(shard.index) for shard in self.manifest.shards}
        if self._short is not None:
            kept.add(shard_name(self._short.index, self._short.rows, self._short.revision))
        for name in sorted(os.listdir(self.path)):
            if _TEMPORARY.fullmatch(name) or (_SHARD.fullmatch(name) and name not in kept):
                self.disk.remove(self.path / name)
        remove_leftovers(self.path, _INDEX, self.disk)

    def log(self, **event: Any) -> None:
        """Add one line to the run log, which is a record for people and no part of the store's identity."""
        self.disk.append_line(self.path / RUN_LOG, json.dumps(event))


@contextmanager
def open_writer(
    path: Path,
    plan: Manifest,
    disk: Disk | None = None,
    data: Callable[[Schema, int], Mapping[str, Any]] | None = None,
    accept: Callable[[Manifest], object] = lambda stored: None,
    lock: str = "auto",
) -> Iterator[StoreWriter]:
    """Create the store that `plan` describes, continue it, or append to it, as its only writer.

    Args:
        path: directory of the store; created where missing.
        plan: what the store shall be. Of a store that exists, the row groups, the shard size and the version of the
            format are kept as they are.
        disk: where bytes go.
        data: names the first n rows of the planned split as a store of some schema does; with it, a store of just those
            is appended to.
        accept: called with the manifest of a store that exists and has this identity, before anything is changed; what
            it raises leaves the store alone.
        lock: how other writers are kept out, one of `gradstore.store.files.lock.LOCKS`.

    Yields:
        Its writer, which says what is missing.

    Raises:
        UsageError: `path` exists and is not a store, or the plan is of one that could not be opened again.
        MismatchError: `path` is a store of another identity; the difference is listed field by field.
        LockedError: another process is writing it.
        CorruptError: the manifest is damaged.
    """
    disk = disk or Disk()
    _require_readable(plan, path)
    _require_store_or_nothing(path)
    disk.make_directory(path)
    with writer_lock(path, disk, lock) as require_lock:
        if os.path.lexists(path / MANIFEST):
            writer = _continued(path, plan, disk, data, accept)
        else:
            writer = StoreWriter(path, plan, disk)
            write_manifest(path, plan, disk)
        writer.require_lock = require_lock
        writer.clean()
        yield writer
        writer.settle()


@contextmanager
def open_for_repair(path: Path, disk: Disk | None = None, lock: str = "auto") -> Iterator[StoreWriter]:
    """Open a store that exists for writing, just as it is; `lock` as in `open_writer`.

    Yields:
        Its writer.

    Raises:
        UsageError: there is no store.
        LockedError: another process is writing it.
        CorruptError: the manifest is damaged.
    """
    disk = disk or Disk()
    read_manifest(path, disk)
    with writer_lock(path, disk, lock) as require_lock:
        remove_leftovers(path, _INDEX, disk)
        writer = StoreWriter(path, read_manifest(path, disk), disk)
        writer.require_lock = require_lock
        yield writer
        writer.settle()


def _require_readable(plan: Manifest, path: Path) -> None:
    """Refuse what a reader would refuse, such as a name of a class that is no text, before it is written."""
    try:
        parse_manifest(plan.to_bytes(), path)
    except CorruptError as error:
        hint = "Change the name, label or setting that is meant"
        raise UsageError("a store cannot hold this", where=path, got=error.got, hint=hint) from error
    if plan.finished_bytes > FILE_BYTES:
        raise UsageError(
            "the manifest of the finished store would be too large to be read",
            where=path,
            expected=f"at most {FILE_BYTES} bytes",
            got=f"{plan.finished_bytes} for {plan.shard_count} shards",
            hint="Split the rows over several stores, or give fewer or shorter names",
        )


def _continued(
    path: Path,
    plan: Manifest,
    disk: Disk,
    data: Callable[[Schema, int], Mapping[str, Any]] | None,
    accept: Callable[[Manifest], object],
) -> StoreWriter:
    stored = read_manifest(path, disk)
    # It goes on as it began.
    schema = replace(plan.schema, version=stored.schema.version, truth=stored.schema.truth)

    def described(n: int) -> Mapping[str, Any]:
        return plan.identity if data is None else {**plan.identity, "data": data(schema, n)}

    planned, longer = described(min(stored.n, plan.n)), data is not None and stored.n < plan.n
    plan = replace(plan, schema=schema, identity=described(plan.n))
    ours = "the first rows of this run" if longer else "this run"
    for a, b in ((stored.identity, planned), (asdict(stored.schema), asdict(plan.schema))):
        require_same(a, b, where=path, theirs="the store", ours=ours)
    accept(stored)
    if os.path.lexists(path / JOURNAL):
        write_manifest(path, stored, disk)
    if not longer:
        return StoreWriter(path, stored, disk)
    return _extended(path, plan, stored, disk)


def _extended(path: Path, plan: Manifest, stored: Manifest, disk: Disk) -> StoreWriter:
    """The writer of a longer store that keeps the full shards; a short last one is computed again as a longer one."""
    last = stored.shards[-1] if stored.shards else None
    short = last if last is not None and last.rows < stored.shard_rows else None
    kept = tuple(shard for shard in stored.shards if shard is not short)
    kept_as_is = {name: getattr(stored, name) for name in ("group", "shard_rows", "removed")}
    manifest = replace(plan, **kept_as_is, shards=kept)
    _require_readable(manifest, path)
    if short is None:
        write_manifest(path, manifest, disk)
    return StoreWriter(path, manifest, disk, short)


def _require_store_or_nothing(path: Path) -> None:
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise UsageError("the output exists and is not a directory", where=path, hint="Choose another --out")
        names = sorted(os.listdir(path))
        # Asked after the listing: another writer's files come after its manifest, which may have come this moment.
        if os.path.lexists(path / MANIFEST):
            return
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            "the output cannot be used", where=repr(str(path))[:200], got=reason, hint="Choose another --out"
        ) from error
    foreign = [n for n in names if n not in (LOCK, RUN_LOG) and not n.startswith(OWNER) and not _TEMPORARY.fullmatch(n)]
    if foreign:
        raise UsageError(
            "the output exists and is not a gradstore store",
            where=path,
            got=f"it contains {', '.join(foreign[:5])}",
            hint="Choose another --out; nothing was touched",
        )
