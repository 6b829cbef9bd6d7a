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
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.digests import THREADS
from gradstore.store.files.disk import Disk
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
    """

    shard: int
    file: str
    problem: str
    rows: tuple[int, ...]


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
        names = spans(self.damaged_rows)
        dropped = "The damaged shards were dropped; the" if self.repaired else "The"
        raise CorruptError(
            f"{len(self.damaged_rows)} of {self.rows} stored rows are damaged: {names}",
            where=self.path,
            hint=f"{dropped} same `gradstore featurize` command computes just these shards again",
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        damage = [{"shard": d.shard, "file": d.file, "problem": d.problem, "rows": list(d.rows)} for d in self.damage]
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
    progress: Callable[[int, int], None] | None = None,
    disk: Disk | None = None,
) -> Verification:
    """Compare every stored byte with its digest (`gradstore.store.verify`).

    Args:
        path: the store.
        repair: drop the damaged shards, so that the same `gradstore featurize` command computes just those again.
        progress: called with (rows read, rows stored).
        disk: where bytes come from.

    Returns:
        what was found; holds some megabytes a thread while it reads.

    Raises:
        UsageError: there is no store.
        CorruptError: the manifest itself is damaged, so nothing can be vouched for.
        LockedError: with `repair`, another process is writing the store.
    """
    if not repair:
        store = FeatureStore(path, disk=disk)
        return _verification(store, find_damage(store.path, store.manifest, store.disk, progress))
    with open_for_repair(Path(path), disk) as writer:
        store = FeatureStore(path, disk=disk)
        damage = find_damage(store.path, store.manifest, store.disk, progress)
        writer.drop(found.shard for found in damage)
    return _verification(store, damage, repaired=bool(damage))


def find_damage(
    path: Path, manifest: Manifest, disk: Disk, progress: Callable[[int, int], None] | None = None
) -> tuple[Damage, ...]:
    """Every published shard of the store at `path` that is not what was written."""
    total = sum(shard.rows for shard in manifest.shards)
    done = 0
    damage: list[Damage] = []
    for shard in manifest.shards:
        found = _examine(ShardFile(path, manifest, shard.index, disk))
        damage += [found] if found is not None else []
        done += shard.rows
        if progress is not None:
            progress(done, total)
    return tuple(damage)


def spans(rows: tuple[int, ...], limit: int = 8) -> str:
    """Rows as people write them: "3, 7-9, 12"; the first `limit` stretches."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    parts = [f"{part[0]}" if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in np.split(np.array(rows), breaks)]
    return ", ".join(parts[:limit]) + (f" and {len(parts) - limit} more stretches" if len(parts) > limit else "")


def _examine(file: ShardFile) -> Damage | None:
    rows = file.manifest.rows_of(file.index)
    try:
        digests = file.check()
    except (CorruptError, UnsafeError, UsageError) as error:
        return Damage(file.index, file.path.name, error.what, tuple(rows))
    step = max(1, _SPAN_BYTES // file.schema.row_bytes)
    parts = [range(low, min(low + step, len(rows))) for low in range(0, len(rows), step)]
    with ThreadPoolExecutor(THREADS + 1) as pool:
        found = list(pool.map(lambda part: _bad_rows(file, part, digests), parts))
    bad = np.concatenate([positions for positions, _ in found])
    if not bad.size:
        return None
    problem = next((text for _, text in found if text), "bytes do not match their digest")
    return Damage(file.index, file.path.name, problem, tuple(int(rows.start + i) for i in bad))


def _bad_rows(file: ShardFile, part: range, digests: np.ndarray) -> tuple[np.ndarray, str]:
    """Positions of the damaged rows of a part of a shard, and why where the disk itself fails."""
    views = file.schema.empty(len(part))
    try:
        file.fill(part.start, views)
    except CorruptError as error:
        return np.arange(part.start, part.stop), error.what
    return part.start + file.damaged(views, digests[part.start : part.stop]), ""


def _verification(store: FeatureStore, damage: tuple[Damage, ...], repaired: bool = False) -> Verification:
    stored = sum(shard.rows for shard in store.manifest.shards)
    return Verification(str(store.path), stored, damage, store.manifest.n - stored, repaired)
