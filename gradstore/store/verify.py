"""`verify`: read every byte of a store and name the rows that are not what was written."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.errors import CorruptError, UnsafeError, UsageError
from gradstore.indices import spans
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.digests import THREADS
from gradstore.store.files.disk import Disk
from gradstore.store.files.disk_errors import FailingDiskError
from gradstore.store.files.foreign_header import UnreadHeaderError
from gradstore.store.files.manifest import Manifest
from gradstore.store.files.shard_file import ShardFile
from gradstore.store.store_writer import open_for_repair

_SPAN_BYTES = 4 << 20  # what one thread holds


@dataclass(frozen=True)
class Damage:
    """One shard that is not what was written.

    Attributes:
        shard: its index.
        file: its file name.
        problem: what was found, as one line.
        rows: the damaged rows; all of the shard's where its size, header or digests are wrong.
        unread: whether the disk failed, so that nothing is known of the rows; such a shard is never dropped.
    """

    shard: int
    file: str
    problem: str
    rows: tuple[int, ...]
    unread: bool = False


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        path: the store.
        rows: rows that were read.
        damage: the damaged shards.
        missing: rows that are not stored yet; no damage.
        repaired: whether the damaged shards were dropped.
    """

    path: str
    rows: int
    damage: tuple[Damage, ...]
    missing: int
    repaired: bool = False

    @property
    def ok(self) -> bool:
        """Whether every stored byte is what was written."""
        return not self.damage

    @property
    def damaged_rows(self) -> tuple[int, ...]:
        """All damaged rows, ascending."""
        return tuple(row for damage in self.damage for row in damage.rows)

    def require_ok(self) -> None:
        """Do nothing for an intact store.

        Raises:
            CorruptError: names the damaged rows and what to do.
        """
        if self.ok:
            return
        require_read(self.damage, Path(self.path))
        names = spans(self.damaged_rows)
        dropped = "The damaged shards were dropped; the" if self.repaired else "The"
        raise CorruptError(
            f"{len(self.damaged_rows)} of {self.rows} stored rows are damaged: {names}",
            where=self.path,
            hint=f"{dropped} same `gradstore featurize` command computes just these shards again",
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        damage = [
            {"shard": d.shard, "file": d.file, "problem": d.problem, "rows": list(d.rows), "unread": d.unread}
            for d in self.damage
        ]
        return {
            "store": self.path,
            "ok": self.ok,
            "rows": self.rows,
            "missing": self.missing,
            "repaired": self.repaired,
            "damage": damage,
        }


def verify(
    path: str | os.PathLike[str],
    *,
    repair: bool = False,
    lock: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    disk: Disk | None = None,
) -> Verification:
    """Compare every stored byte with its digest (`gradstore.store.verify`).

    Args:
        path: the store.
        repair: drop the damaged shards, so that the same `gradstore featurize` command computes just those again. Only
            what was read and is not what was written is damage, and a file that is missing; one that the disk fails to
            read is reported and kept.
        lock: with `repair`, how other writers are kept out: "auto", "flock", "file" or "none"; see
            `gradstore.store.files.lock.LOCKS`.
        progress: called with (rows read, rows stored).
        disk: where bytes come from.

    Returns:
        what was found; holds some megabytes a thread while it reads.

    Raises:
        UsageError: there is no store.
        UsageError: a file may not be read, or files, memory or threads ran out; nothing is dropped.
        CorruptError: the manifest itself is damaged, so nothing can be vouched for.
        LockedError: with `repair`, another process is writing the store.
    """
    if not repair:
        store = FeatureStore(path, disk=disk)
        return _verification(store, find_damage(store.path, store.manifest, store.disk, progress))
    with open_for_repair(Path(path), disk, lock) as writer:
        store = FeatureStore(path, disk=disk)
        damage = find_damage(store.path, store.manifest, store.disk, progress)
        writer.drop(found.shard for found in damage if not found.unread)
    return _verification(store, damage, repaired=any(not found.unread for found in damage))


def find_damage(
    path: Path, manifest: Manifest, disk: Disk, progress: Callable[[int, int], None] | None = None
) -> tuple[Damage, ...]:
    """Every published shard of the store at `path` that is not what was written, or that the disk fails to read.

    Returns:
        One for each such shard.

    Raises:
        UsageError: a file may not be read, or files, memory or threads ran out: that is no damage.
    """
    total = sum(shard.rows for shard in manifest.shards)
    done = 0
    damage: list[Damage] = []
    with ThreadPoolExecutor(THREADS + 1) as pool:
        for shard in manifest.shards:
            file = ShardFile(path, manifest, shard.index, disk)
            found = _examined(file, pool)
            if found is not None and found.unread:
                found = _examined(file, pool)  # a failure that passes is none
            damage += [found] if found is not None else []
            done += shard.rows
            if progress is not None:
                progress(done, total)
    return tuple(damage)


def require_read(damage: tuple[Damage, ...], path: Path) -> tuple[Damage, ...]:
    """The damage, if every shard was read: what the disk fails to read may be intact, and only its owner gives it up.

    Returns:
        The damage.

    Raises:
        CorruptError: names the first file that cannot be read, and how to go on.
    """
    for found in damage:
        if found.unread:
            raise CorruptError(
                f"{len(found.rows)} rows cannot be read, so that nobody knows whether they are intact: "
                f"{spans(found.rows)}",
                where=path / found.file,
                got=found.problem,
                hint="The file was kept. Look at the disk and try again; to give these rows up, delete the file "
                "yourself and run the same `gradstore featurize` command, which computes them again",
            )
    return damage


def _examined(file: ShardFile, pool: ThreadPoolExecutor) -> Damage | None:
    """The damage of one shard, or that it cannot be read.

    Returns:
        None for an intact one.

    Raises:
        UsageError: what this process or its user lacks.
    """
    try:
        return _examine(file, pool)
    except (FailingDiskError, UnreadHeaderError) as error:
        problem = error.what if error.got is None else f"{error.what}: {error.got}"
        return Damage(file.index, file.path.name, problem, tuple(file.manifest.rows_of(file.index)), unread=True)
    except (MemoryError, RuntimeError) as error:  # RuntimeError: no thread could be started
        raise UsageError(
            "memory or threads ran out while this file was read",
            where=file.path,
            got=str(error) or None,
            hint="Nothing was dropped; free some and run the same command again",
        ) from error


def _examine(file: ShardFile, pool: ThreadPoolExecutor) -> Damage | None:
    rows = file.manifest.rows_of(file.index)
    try:
        digests = file.check()
    except (FailingDiskError, UnreadHeaderError):
        raise
    except (CorruptError, UnsafeError) as error:
        return Damage(file.index, file.path.name, error.what, tuple(rows))
    step = max(1, _SPAN_BYTES // file.schema.row_bytes)
    parts = [range(low, min(low + step, len(rows))) for low in range(0, len(rows), step)]
    found = list(pool.map(lambda part: _bad_rows(file, part, digests), parts))
    bad = np.concatenate([positions for positions, _ in found])
    if not bad.size:
        return None
    problem = next((text for _, text in found if text), "bytes do not match their digest")
    return Damage(file.index, file.path.name, problem, tuple(int(rows.start + i) for i in bad))


def _bad_rows(file: ShardFile, part: range, digests: np.ndarray) -> tuple[np.ndarray, str]:
    """Positions of the damaged rows of a part of a shard, and why where the file has become another meanwhile."""
    views = file.schema.empty(len(part))
    try:
        file.fill(part.start, views)
    except FailingDiskError:
        raise
    except CorruptError as error:
        return np.arange(part.start, part.stop), error.what
    return part.start + file.damaged(views, digests[part.start : part.stop]), ""


def _verification(store: FeatureStore, damage: tuple[Damage, ...], repaired: bool = False) -> Verification:
    stored = sum(shard.rows for shard in store.manifest.shards)
    return Verification(str(store.path), stored, damage, store.manifest.n - stored, repaired)
