"""Whether a split is still what a store was made of: the inputs of stored rows, read again and compared by digest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradstore.errors import CorruptError, MismatchError, UnsafeError, UsageError
from gradstore.model.examples import Examples, input_digests
from gradstore.store.annotations import read_annotations
from gradstore.store.files.disk import Disk
from gradstore.store.files.manifest import Manifest
from gradstore.store.files.shard_file import ShardFile

DATA_CHECKS = ("all", "sample")
SAMPLE = 256
_TOGETHER = 64
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Compared:
    """How stored rows compare with a split.

    Attributes:
        rows: that were read again.
        stored: rows that are stored.
        relabelled: those that now have another label than the store says; no fault, since labels are annotations.
    """

    rows: int
    stored: int
    relabelled: np.ndarray

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of it."""
        lines = []
        if self.rows < self.stored:
            missed = (1 - 0.01) ** self.rows
            lines.append(
                f"the inputs of {self.rows} of {self.stored} stored rows were compared; a change of one row in a "
                f"hundred goes unseen with a chance of {missed:.0%}"
            )
        if len(self.relabelled):
            lines.append(
                f"{len(self.relabelled)} stored rows have another label now, row {self.relabelled[0]} first; "
                "`gradstore annotate STORE --from PROJECT.PY` takes them over"
            )
        return tuple(lines)


def compare_inputs(
    examples: Examples,
    path: Path,
    manifest: Manifest,
    how: str,
    disk: Disk,
    progress: Callable[[int, int], None] | None = None,
) -> Compared:
    """Read stored rows of a split again and compare their inputs with what the store was made of.

    Args:
        examples: the split.
        path: the store.
        manifest: of the store, finished or not, of version 3 on.
        how: "all" stored rows that are there, or "sample" for 256 random ones, other ones each time.
        disk: where bytes come from.
        progress: called with (rows compared, rows to compare).

    Returns:
        What was compared. Holds 64 rows at a time, and 9 bytes a row.

    Raises:
        UsageError: `how` is neither.
        MismatchError: a row has other inputs; names the first, and how many have.
    """
    if how not in DATA_CHECKS:
        expected = f"one of {', '.join(DATA_CHECKS)}"
        raise UsageError("unknown check of the data", where="--data-check", expected=expected, got=repr(how))
    spans = [(shard.index, manifest.rows_of(shard.index)) for shard in manifest.shards]
    stored = np.concatenate([_NONE, *(_there(ShardFile(path, manifest, index, disk), rows) for index, rows in spans)])
    chosen = stored
    if how == "sample" and len(stored) > SAMPLE:
        chosen = np.sort(np.random.default_rng().choice(stored, SAMPLE, replace=False))
    said = read_annotations(path, manifest, disk).labels
    changed, relabelled, done = [_NONE], [_NONE], 0
    for index, rows in spans:
        here = chosen[slice(*np.searchsorted(chosen, (rows.start, rows.stop)))]
        if not len(here):
            continue
        file = ShardFile(path, manifest, index, disk)
        try:
            known, labels = (file.column(name)[here - rows.start] for name in ("input_digest", "label"))
        except (CorruptError, UnsafeError):
            continue  # whoever verifies the store says what is damaged
        if said is not None:
            annotated = here < len(said)
            labels[annotated] = said[here[annotated]]
        for start in range(0, len(here), _TOGETHER):
            some = slice(start, start + _TOGETHER)
            inputs, now = examples.read(here[some].tolist())
            differ = (input_digests(inputs) != known[some]).any(axis=1) & known[some].any(axis=1)
            changed.append(here[some][differ])
            relabelled.append(here[some][now != labels[some]])
            done += len(now)
            if progress is not None:
                progress(done, len(chosen))
    _require_none(np.concatenate(changed), len(chosen), examples.split, path)
    return Compared(len(chosen), len(stored), np.concatenate(relabelled))


def _there(file: ShardFile, rows: range) -> np.ndarray:
    """Rows of a shard that are there; all of one that is damaged, of which whoever verifies the store speaks."""
    try:
        return rows.start + np.flatnonzero(file.column("absent") == 0)
    except (CorruptError, UnsafeError):
        return np.arange(rows.start, rows.stop)


def _require_none(changed: np.ndarray, compared: int, split: str, path: Path) -> None:
    if not changed.size:
        return
    raise MismatchError(
        f"row {int(changed[0])} of split {split!r} has other inputs than when it was stored",
        where=path,
        expected="the same bytes",
        got=f"{changed.size} of {compared} compared rows differ",
        hint="Restore the data, or choose another --out; labels may change, inputs may not",
    )
