"""Featurize: the one place where model → Jacobian → projection meets the store."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradstore.errors import GradstoreError, MismatchError, UsageError
from gradstore.featurization.bad_rows import BadRows, is_retried, skips
from gradstore.featurization.batch import Stopwatch, audit_schedule, compute
from gradstore.featurization.batch_size import BatchSize
from gradstore.featurization.environment import environment, require_same_computation, require_same_environment
from gradstore.featurization.grow import SmallerStore
from gradstore.featurization.plan import Plan, to_device
from gradstore.featurization.poison_marks import mark_poisoned
from gradstore.featurization.row_independence import Looked, RowIndependence
from gradstore.featurization.same_inputs import compare_inputs
from gradstore.featurization.settings import Given, Settings, takes_settings
from gradstore.featurization.workers import require_workers, write_shards
from gradstore.indices import spans
from gradstore.jacobians.revision import REVISION
from gradstore.machine.byte_counts import spendable
from gradstore.machine.clock import now_utc
from gradstore.machine.out_of_memory import is_out_of_memory
from gradstore.machine.threads import worker_count
from gradstore.model.project import Project
from gradstore.projection.kinds import BY_DEVICE
from gradstore.store.background_writer import Columns, in_background
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.disk import Disk
from gradstore.store.files.manifest import Manifest, Shard
from gradstore.store.files.shard_file import ShardFile
from gradstore.store.rewrite import absent_of, rewrite_shard
from gradstore.store.store_writer import RUN_LOG, ShardWriter, StoreWriter, open_writer
from gradstore.store.verify import Damage, find_damage, require_read

if TYPE_CHECKING:
    from typing_extensions import Unpack

Write = Callable[[Callable[[], Columns]], None]  # takes the next rows of a shard, once they are computed

# Rows (example × class) from which generating P is cheap beside multiplying by it.
_ENOUGH_ROWS = 640


@dataclass(frozen=True)
class Progress:
    """State of a run, handed to the `progress` callback after every batch.

    Attributes:
        rows: rows of the split stored or computed so far.
        total: rows of the split.
        computed: rows computed by this run.
        seconds: since this run's first gradient.
        written: bytes published so far, by this run and earlier ones.
        size: bytes of the finished store's rows.
        busy: seconds of this run in each stage: "jacobians", "projection", "checks", and "writing", which is what they
            waited for rows to be written in the background.
    """

    rows: int
    total: int
    computed: int
    seconds: float
    written: int
    size: int
    busy: Mapping[str, float]


@takes_settings
def featurize(
    project: Project,
    *,
    split: str,
    out: str | os.PathLike[str],
    device: str = "auto",
    batch_size: int | None = None,
    memory: int | str = "auto",
    allow_other_versions: bool = False,
    verify: bool = True,
    grow_from: str | os.PathLike[str] | None = None,
    workers: int = 1,
    alone: bool = False,
    data_check: str = "all",
    on_bad_row: str = "stop",
    retry_absent: bool = False,
    lock: str = "auto",
    on_plan: Callable[[Plan], None] | None = None,
    on_damage: Callable[[Sequence[Damage]], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    on_data_check: Callable[[int, int], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    disk: Disk | None = None,
    like: FeatureStore | str | Path | None = None,
    **settings: Unpack[Given],
) -> FeatureStore:
    """Store the projected per-example Jacobians of one split: `P ∇_θ F^c(x; θ) / sqrt(K)` for every row and class.

    Jacobians are of logits, in eval mode (Engel et al., ICLR 2024, eq. 7 and 8). Rows are computed in fixed groups, so
    that their bits depend neither on the batch size nor on interruptions. Calling it again continues an unfinished
    store, computes damaged shards again, appends the new rows of a split that has grown, and leaves a finished store
    alone.

    Args:
        project: model, weights and splits.
        split: name of the split to featurize.
        out: directory of the store.
        device: "auto", "cpu", "cuda" or "cuda:<index>".
        batch_size: rows projected together, rounded down to whole groups; None doubles it from one group on while rows
            do not become slower and the memory allows. Out of memory, half as many are tried.
        memory: bytes, or text like "2GB", that activations, Jacobian blocks and features of a batch may take beside
            the model and the data; "auto" is 2 GB on a CPU, and three quarters of a GPU's memory.
        allow_other_versions: continue a store that was begun with another torch, device type, projection backend or
            revision of the computation; the change is written to the run log, and the revision with each shard.
        verify: read the shards that exist first and compute the damaged ones again; False trusts them.
        grow_from: a finished store of the same rows with a smaller `proj_dim`, whose columns are taken over; the new
            store is the same, to the bit, as one computed from nothing, unless a layer's fastest route changes with K.
        workers: processes that compute shards, on the CPU, with one thread each; every one takes `memory`.
        alone: compute each example by itself, for a model whose examples look at one another; right by definition, and
            slower, as `gradstore check --alone` measures. A store that was begun otherwise does not go on so.
        data_check: "all" reads every stored row's input again and compares its digest; "sample" does so for 256 random
            rows, and a note says what that can miss.
        on_bad_row: what becomes of a row that the dataset raises an error for, whose logits or gradient are not finite,
            or whose gradient is zero: "stop" ends the run; "skip" leaves the row out, which keeps its place, with the
            reason.
        retry_absent: compute rows that were left out again, and only these; a row that was removed stays so.
        lock: how other writers are kept out: "auto", which is `flock`, or an owner file where the file system has
            none; "flock"; "file"; or "none". See `gradstore.store.files.lock.LOCKS`.
        on_plan: called once with the plan, before anything is written.
        on_damage: called with the damaged shards, if there are any, before they are dropped and computed again.
        on_note: called with a line where the run goes on otherwise than planned, such as with smaller batches.
        on_data_check: called with (rows compared, rows to compare).
        progress: called after every batch.
        disk: where bytes go; for tests.
        like: a store whose settings are taken, all of them: that of the training rows, for queries.
        **settings: those of `gradstore.featurization.settings.Settings`, which says what each does; a store keeps them.

    Returns:
        The finished store, opened.

    Raises:
        UsageError: an argument is unusable, `out` exists and is not a store, or memory runs out with one group of rows.
        ProjectError: the project is wrong.
        MismatchError: `out` holds a store of another identity, or a stored row has other inputs now.
        LockedError: another process is writing it.
        CorruptError: the disk fails to read a shard; nothing is dropped.
        NoSpaceError: the disk has too little room; said before the first gradient.
        NonFiniteError: a gradient is NaN, infinite or zero, or the projection did not keep its norm or is
            not that by P. Rows that are bad in the way that `on_bad_row` says do not raise it where they are skipped.

    Example:
        >>> gs.featurize(project, split="test", out="stores/small", proj_dim=256).shape
        (8, 10, 256)
    """
    grown = None if grow_from is None else FeatureStore(grow_from)
    if grown is not None and alone:
        _require_begun_alone(grown.path, grown.manifest.group)
    plan = Plan(
        project,
        split,
        _settings(like, Path(out), settings),
        device,
        memory,
        group=None if grown is None else grown.manifest.group,
        alone=alone,
        skipping=skips(on_bad_row),
    )
    smaller = None
    if grown is not None:
        smaller = SmallerStore(grown, plan.manifest, plan.data_of(grown.schema, plan.manifest.n))
        now = environment(plan.device, plan.projection)
        require_same_environment(grown.path / RUN_LOG, now, allow_other_versions, disk or Disk())
        require_same_computation(grown.manifest, REVISION, allow_other_versions, grown.path)
    if on_plan is not None:
        on_plan(plan)
    for note in (*project.notes, *plan.notes):
        if on_note is not None:
            on_note(note)
    same = partial(_require_same_inputs, plan, Path(out), data_check, disk or Disk(), on_note, on_data_check)
    planned = plan.manifest if grown is None else replace(plan.manifest, removed=grown.manifest.removed)
    with open_writer(Path(out), planned, disk, plan.data_of, same, lock) as writer:
        if alone:
            _require_begun_alone(writer.path, writer.manifest.group)
        if verify:
            _drop_damaged(writer, on_damage)
        mark_poisoned(plan, writer, on_note)
        again = _to_retry(writer) if retry_absent else {}
        writer.computation = REVISION
        if writer.manifest.missing or again:
            _require_continuable(plan, writer, allow_other_versions)
            writer.require_space()
            bad_rows = BadRows(plan, writer.manifest, on_bad_row)
            run = _Run(plan, writer, batch_size, progress, smaller, workers, on_note, bad_rows)
            run.write_missing(again)
    return _say_absent(FeatureStore(out), on_note)


def _settings(like: FeatureStore | str | Path | None, out: Path, given: Given) -> Settings:
    """What was asked for, what another store has, or, for "auto", what this one was begun with."""
    if like is not None:
        return Settings.like(like, given)
    settings = Settings(**given)
    if settings.projection == BY_DEVICE:
        with suppress(GradstoreError):  # where there is no such store yet
            return replace(settings, projection=Settings.of(FeatureStore(out).identity, where=out).projection)
    return settings


class _Run:
    """Computes the missing shards of one store."""

    def __init__(
        self,
        plan: Plan,
        writer: StoreWriter,
        batch_size: int | None,
        progress: Callable[[Progress], None] | None,
        smaller: SmallerStore | None = None,
        workers: int = 1,
        note: Callable[[str], None] | None = None,
        bad_rows: BadRows | None = None,
    ) -> None:
        self.bad_rows = bad_rows
        self.workers = require_workers(workers, plan.device)
        self.plan, self.writer, self.progress, self.smaller = plan, writer, progress, smaller
        self.group = writer.manifest.group
        self.batch = self._batch_size(batch_size)
        self.note = note
        self.watch = Stopwatch()
        self.truth = plan.project.poisoned_mask(plan.split)
        self.audits, self.independence = audit_schedule(plan), RowIndependence(plan, self.group)
        self.computed = self.audited = 0

    def write_missing(self, again: Mapping[int, int]) -> None:
        """Compute and publish shards in ascending order: those with absent rows anew, and then the missing ones.

        Args:
            again: the shards to write anew, and of how many rows each of them has groups to compute.
        """
        manifest = self.writer.manifest
        stored = manifest.n - sum(len(manifest.rows_of(i)) for i in manifest.missing) - sum(again.values())
        written = sum(shard.size for shard in manifest.shards)
        began = time.perf_counter()

        def published(shard: Shard) -> None:
            nonlocal written
            written += shard.size

        def report() -> None:
            if self.progress is not None:
                seconds = time.perf_counter() - began
                rows = stored + self.computed
                self.progress(
                    Progress(rows, manifest.n, self.computed, seconds, written, self.plan.bytes, dict(self.watch.busy))
                )

        report()
        self._retry_absent(again, report)
        if self.workers > 1:

            def count(shard: Shard, checks: tuple[int, Looked]) -> None:
                published(shard)
                self.computed += shard.rows
                self.audited += checks[0]
                self.independence.looked += checks[1]
                report()

            write_shards(self.writer, self._fill_here, self.workers, count)
        else:
            with in_background(self.writer, published) as background:
                for index in self.writer.missing:
                    self._fill(index, background.write, report)
            self.watch.lap("writing")
        report()
        busy = {stage: round(seconds, 3) for stage, seconds in self.watch.busy.items()}
        seconds = round(time.perf_counter() - began, 3)
        looked = asdict(self.independence.looked)
        done = {"rows": self.computed, "seconds": seconds, "busy": busy, "audited": self.audited, "looked": looked}
        self.writer.log(event="finish", at=now_utc(), **done)

    def _retry_absent(self, indices: Iterable[int], report: Callable[[], None]) -> None:
        """Write some shards anew, of which just the groups with rows to try again are computed."""

        def again(rows: range, stored: Columns) -> Columns:
            if not is_retried(stored["absent"]).any():
                return stored
            looking, bad = self.independence, self.bad_rows
            found = compute(self.plan, rows, self.group, self.truth, self.watch, independence=looking, bad_rows=bad)()
            self.computed += len(rows)
            report()
            return found

        for index in indices:
            rewrite_shard(self.writer, index, self.group, again)

    def _fill(self, index: int, write: Write, report: Callable[[], None] = lambda: None) -> None:
        """Compute all rows of shard `index`."""
        rows = self.writer.manifest.rows_of(index)
        while rows:
            rows = range(self._compute(write, rows[: self.batch.rows]), rows.stop)
            report()

    def _fill_here(self, shard: ShardWriter) -> tuple[int, Looked]:
        """Write all rows of one shard in this thread: a worker has others beside it that compute meanwhile.

        Returns:
            How many rows were audited, and how many were looked at a second time.
        """
        before, self.independence.looked = self.audited, Looked()
        self._fill(shard.index, lambda make: shard.write(make()))
        return self.audited - before, self.independence.looked

    def _group_bytes(self) -> int:
        return max(1, self.plan.bytes_needed(self.writer.manifest.schema, self.group))

    def _most_groups(self) -> int:
        """Groups of the largest batch that gains anything and fits the memory."""
        enough = max(1, _ENOUGH_ROWS // (self.group * self.writer.manifest.schema.c))
        return max(1, min(enough, spendable(self.plan.memory, worker_count()) // self._group_bytes()))

    def _batch_size(self, fixed: int | None) -> BatchSize:
        if fixed is not None and fixed < 1:
            raise UsageError("unusable batch size", where="--batch-size", expected="at least 1", got=fixed)
        most = self._most_groups()
        if self.plan.device.type != "cpu":  # where this thread queues work, its clock says nothing
            fixed = fixed or most * self.group
        return BatchSize(self.group, most, fixed)

    def _compute(self, write: Write, rows: range) -> int:
        """Compute the first of these rows, in as many groups as memory allows; the row after the last one computed."""
        began = time.perf_counter()
        try:
            audited, looking = self.audits.due, self.independence
            make = compute(
                self.plan,
                rows,
                self.group,
                self.truth,
                self.watch,
                self.smaller,
                audited=audited,
                independence=looking,
                bad_rows=self.bad_rows,
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) <= self.group or not self.batch.halve():
                raise UsageError(
                    f"memory ran out with one group of {len(rows)} rows",
                    where=str(self.plan.device),
                    hint="Free what else is held there; or begin the store anew with a smaller --memory, which makes "
                    "smaller groups",
                ) from error
            self._say(f"out of memory with {len(rows)} rows at once; going on with {self.batch.rows}")
        else:
            write(make)
            self.batch.took(len(rows), time.perf_counter() - began)
            self.computed += len(rows)
            self.audited += audited
            self.audits.computed(len(rows))
            self.watch.lap("writing")
            return rows.stop
        # Here the failed batch and the frames that held it are gone.
        return self._compute(write, rows[: self.batch.rows])

    def _say(self, line: str) -> None:
        self.writer.log(event="note", at=now_utc(), note=line)
        if self.note is not None:
            self.note(line)


def _say_absent(store: FeatureStore, note: Callable[[str], None] | None) -> FeatureStore:
    if note is not None and store.absent.any():
        places = np.flatnonzero(store.absent)
        note(f"absent, {len(places)} of {len(store)} rows: {spans(places)}; `gradstore info` says why")
    return store


def _drop_damaged(writer: StoreWriter, on_damage: Callable[[Sequence[Damage]], None] | None) -> None:
    """Make the damaged shards of a store missing, so that they are computed again."""
    damage = require_read(find_damage(writer.path, writer.manifest, writer.disk), writer.path)
    if damage:
        if on_damage is not None:
            on_damage(damage)
        writer.log(event="damage", at=now_utc(), files=[found.file for found in damage])
        writer.drop(found.shard for found in damage)


def _to_retry(writer: StoreWriter) -> dict[int, int]:
    """Listed shards with rows that were left out and may be computed after all -> rows of the groups with such rows."""
    found, group = {}, writer.manifest.group
    for shard in writer.manifest.shards:
        groups = np.unique(np.flatnonzero(is_retried(absent_of(writer, shard.index))) // group)
        if len(groups):
            found[shard.index] = int(np.minimum(group, shard.rows - groups * group).sum())
    return found


def _require_same_inputs(
    plan: Plan,
    path: Path,
    how: str,
    disk: Disk,
    note: Callable[[str], None] | None,
    progress: Callable[[int, int], None] | None,
    stored: Manifest,
) -> None:
    """Go on with a store only where its rows' inputs are still what they were."""
    if not stored.shards or not stored.schema.has_inputs:
        return
    found = compare_inputs(plan.examples, path, stored, how, disk, progress)
    for line in found.notes:
        if note is not None:
            note(line)


def _require_continuable(plan: Plan, writer: StoreWriter, allow_other_versions: bool) -> None:
    """Begin or continue a store only where the same model writes the same rows."""
    now = environment(plan.device, plan.projection)
    require_same_environment(writer.path / RUN_LOG, now, allow_other_versions, writer.disk)
    require_same_computation(writer.manifest, REVISION, allow_other_versions, writer.path)
    writer.log(event="start", at=now_utc(), missing=len(writer.manifest.missing), **now)
    if writer.manifest.shards:
        _require_same_logits(plan, writer)


def _require_begun_alone(store: Path, group: int) -> None:
    if group > 1:
        raise UsageError(
            "the store was begun with examples computed together",
            where=store,
            expected="one begun with --alone",
            got=f"groups of {group} rows",
            hint="Begin a store of its own with --alone, or go on without it",
        )


def _require_same_logits(plan: Plan, writer: StoreWriter) -> None:
    """Weights are compared by digest; this catches code that computes something else with the same weights."""
    shard = writer.manifest.shards[0]
    there = np.flatnonzero(absent_of(writer, shard.index) == 0)
    if not len(there):
        return
    row = writer.manifest.rows_of(shard.index)[int(there[0])]
    stored = ShardFile(writer.path, writer.manifest, shard.index, writer.disk).column("logits")[there[0]]
    inputs = to_device(plan.examples.read([row])[0], plan.device)
    now = plan.engine.logits([inputs])[0][0].cpu().numpy()
    if not np.allclose(now, stored, rtol=1e-3, atol=1e-3 * float(np.abs(stored).max())):
        raise MismatchError(
            f"the model computes other logits for row {row} than when this store was begun",
            where=writer.path,
            expected=np.array2string(stored[:4], precision=4),
            got=np.array2string(now[:4], precision=4),
            hint="The weights are the same, so the model's code has changed; choose another --out",
        )
