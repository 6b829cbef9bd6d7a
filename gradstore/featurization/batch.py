"""A batch: some groups of rows, from examples to what a feature file stores of them.

On a GPU nothing here waits for the device before the last block of a batch is queued: whether its norms are finite and
were kept, its rounding and its way to the host are left to the call that `compute` returns, for another thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import GradstoreError, ProjectError
from gradstore.featurization.bad_rows import BadRows
from gradstore.featurization.gradient_audit import GradientAudit
from gradstore.featurization.grow import SmallerStore
from gradstore.featurization.lowered_features import LoweredFeatures
from gradstore.featurization.plan import Plan, one_row, slice_rows, to_device
from gradstore.featurization.preview_column import preview_table
from gradstore.featurization.row_audit import (
    require_draws_preserved,
    require_finite,
    require_labels,
    require_preserved,
)
from gradstore.featurization.row_independence import RowIndependence
from gradstore.featurization.second_look import SecondLook
from gradstore.jacobians import (
    DenseBlock,
    EmbeddingBlock,
    JacobianBlock,
    LoweredBlock,
    OwnRowBlock,
    join_blocks,
)
from gradstore.jacobians.reused_memory import reused
from gradstore.machine.cuda_streams import Beside, Handover, to_host
from gradstore.machine.devices import full_float32
from gradstore.machine.mapped_memory import mapped_zeros
from gradstore.model.examples import Inputs, input_digests
from gradstore.projection import Projection
from gradstore.projection.block_routes import route
from gradstore.projection.block_sums import BlockSums
from gradstore.projection.projection_audit import AuditSchedule, Comparison, ProjectionAudit
from gradstore.store.absent_rows import blanked
from gradstore.store.files.encoding import encode

Columns = dict[str, np.ndarray]


class Stopwatch:
    """Seconds of this thread in each stage; on a GPU, whose work it does not wait for, those of queueing it."""

    def __init__(self) -> None:
        self.busy = {"jacobians": 0.0, "projection": 0.0, "checks": 0.0, "writing": 0.0}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap as `stage`."""
        now = time.perf_counter()
        self.busy[stage] += now - self._last
        self._last = now


def compute(
    plan: Plan,
    rows: range,
    group: int,
    truth: np.ndarray | None,
    watch: Stopwatch | None = None,
    smaller: SmallerStore | None = None,
    *,
    audited: bool = False,
    independence: RowIndependence | None = None,
    bad_rows: BadRows | None = None,
) -> Callable[[], Columns]:
    """Compute some groups of rows.

    Args:
        plan: the model, the data and how to featurize.
        rows: they begin and end where groups do, or the split does.
        group: rows that are computed together.
        truth: which rows of the split are poisoned, bool, where that is known.
        watch: takes the time of the stages.
        smaller: a store whose columns are taken over.
        audited: whether one row is projected by the definition of P, too, and compared.
        independence: looks at every row a second time.
        bad_rows: says which rows are left out; None leaves out none.

    Returns:
        A call, for any thread, that gives every dataset but the digests, or raises `NonFiniteError` for a row whose
        logits or gradient are not finite or zero, or whose projection did not keep its norm or is not that by P, and
        `ProjectError` for one that depends on other rows, on its turn or on when it is read.

    Raises:
        ProjectError: a row cannot be read, does not fit beside the others, or is none that the model takes.
    """
    inputs, labels = plan.examples.read(rows)
    plan.examples.require_labels(rows, labels)
    require_labels(labels, plan.classes, plan.split, rows.start)
    digests = input_digests(inputs)
    if smaller is not None:
        smaller.require_inputs(rows, digests)
    spans = list(_groups(rows, group))
    parts = [to_device(slice_rows(inputs, s.start - rows.start, s.stop - rows.start), plan.device) for s in spans]
    watch = watch or Stopwatch()
    try:
        sums = _grown(plan, parts, spans, watch, smaller, independence, bad_rows, audited=audited)
    except Exception as error:
        _require_forward(plan, inputs, rows, error)
        raise
    seen = None
    if independence is not None:
        seen = independence.look(inputs, labels, parts, rows, sums.logits, sums.gradient, sums.absent)
        sums = replace(sums, handover=Handover(plan.device))
        watch.lap("checks")
    columns = {"label": labels, "row": np.arange(rows.start, rows.stop, dtype=np.int64), "input_digest": digests}
    if truth is not None:
        columns["poisoned"] = truth[rows.start : rows.stop].astype(np.uint8)
    show = plan.project.show
    if show is not None:
        shape = plan.manifest.schema.preview
        columns["preview"] = preview_table(show, [one_row(inputs, i) for i in range(len(rows))], shape)
    return partial(_finished, sums, seen, plan, columns)


def _require_forward(plan: Plan, inputs: Inputs, rows: range, error: Exception) -> None:
    """Where a batch has failed because the model fails on an example, say on which: a word that it does not have, say.

    A GPU is not asked: its errors come late, and after some of them every call fails.

    Raises:
        ProjectError: the model fails on a row by itself.
    """
    if isinstance(error, (GradstoreError, MemoryError)) or plan.device.type != "cpu":
        return
    for i, row in enumerate(rows):
        try:
            plan.project.logits(slice_rows(inputs, i, i + 1))
        except ProjectError as failure:
            hint = "Run the model on this example by hand"
            raise ProjectError(
                f"{failure.what}, here on row {row}", where=f"split {plan.split!r}", got=failure.got, hint=hint
            ) from error


def project_rows(plan: Plan, rows: range, bad_rows: BadRows | None = None) -> Tensor:
    """Features float32 [len(rows), c, K] of a few rows, as featurize computes them but neither rounded nor stored."""
    inputs = to_device(plan.examples.read(rows)[0], plan.device)
    spans = list(_groups(rows, plan.manifest.group))
    parts = [slice_rows(inputs, span.start - rows.start, span.stop - rows.start) for span in spans]
    sums = _project(plan, parts, spans, Stopwatch(), bad_rows=bad_rows)
    with plan.projection.explained(plan.device):
        sums.require_good(plan)
    return sums.features.mul_(plan.projection.scale)


def row_columns(plan: Plan, groups: Iterable[range], bad_rows: BadRows | None = None) -> Iterator[Columns]:
    """Every dataset but the digests for some groups of rows, one group after another, as featurize would store them."""
    truth, audits, group = plan.project.poisoned_mask(plan.split), audit_schedule(plan), plan.manifest.group
    independence = RowIndependence(plan, group)
    for rows in groups:
        audited = audits.due
        yield compute(plan, rows, group, truth, audited=audited, independence=independence, bad_rows=bad_rows)()
        audits.computed(len(rows))


def audit_schedule(plan: Plan) -> AuditSchedule:
    """Which batches of a run are audited."""
    streams = plan.classes if plan.settings.layout == "mixed" else 1
    sizes = [block.size for block in plan.blocks]
    return AuditSchedule(plan.projection, plan.device, sizes, streams, plan.flops / plan.manifest.n)


def _groups(rows: range, size: int) -> Iterator[range]:
    """Some rows, at most `size` at a time."""
    for start in range(rows.start, rows.stop, size):
        yield range(start, min(start + size, rows.stop))


@dataclass(frozen=True)
class _Sums:
    """What is computed of some rows, on the device, where it may still be under way.

    Attributes:
        rows: which rows.
        features: P g, float32 [n, c, K].
        sq_norm: ‖g‖², float64 [n, c].
        added_up: the same of what g is the sum of where that is projected in its place (`LoweredFeatures`), else zero.
        parts: the same of each parameter and class.
        logits: [n, classes].
        comparison: of a row whose projection was audited.
        gradient: of a row whose gradient was audited.
        handover: for the thread that goes on.
        absent: why rows are left out, uint8 [n]; None for none.
    """

    rows: range
    features: Tensor
    sq_norm: Tensor
    added_up: Tensor
    parts: Mapping[str, Tensor]
    logits: Tensor
    comparison: Comparison | None
    gradient: GradientAudit | None
    handover: Handover
    absent: np.ndarray | None = None

    def require_good(self, plan: Plan, norms: np.ndarray | None = None) -> None:
        """Raise `NonFiniteError` for the first row that must not be stored.

        Args:
            plan: of the run.
            norms: of the rows as they are stored, float64 [n, c], where they are known; they are not taken again.
        """
        rows: Sequence[int] = self.rows
        features, sq_norm, added_up, parts = self.features, self.sq_norm, self.added_up, self.parts
        if self.absent is not None:
            there = np.flatnonzero(self.absent == 0)
            rows, at = [rows[i] for i in there.tolist()], torch.from_numpy(there).to(features.device)
            features, sq_norm, added_up = features[at], sq_norm[at], added_up[at]
            norms = None if norms is None else norms[there]
            parts = {name: part[at] for name, part in parts.items()}
        require_finite(sq_norm, parts, rows, plan.split)
        kind = plan.settings.projection
        if (draws := plan.settings.draws) and len(rows):
            require_draws_preserved(features, parts, rows, plan.split, draws, kind=kind)
        else:
            require_preserved(
                features, sq_norm, rows, plan.split, plan.projection.scale, added_up, kind=kind, norms=norms
            )
        if self.comparison is not None and self.has(self.comparison.i):
            by_draw = torch.stack([*self.parts.values()]).sum(0) if plan.settings.draws else self.sq_norm
            self.comparison.require(by_draw, plan.split)

    def has(self, i: int) -> bool:
        """Whether row i of the batch is there."""
        return self.absent is None or not self.absent[i]

    def without_absent(self) -> _Sums:
        """The same with zeros for rows that are left out."""
        if self.absent is None:
            return self
        gone = torch.from_numpy(np.flatnonzero(self.absent)).to(self.features.device)
        return replace(self, features=self.features.index_fill(0, gone, 0), sq_norm=self.sq_norm.index_fill(0, gone, 0))


def _finished(sums: _Sums, seen: SecondLook | None, plan: Plan, columns: Columns) -> Columns:
    """Check, round and fetch what was computed."""
    with plan.projection.explained(plan.device), sums.handover.taken():
        if seen is not None:
            seen.require_finite(plan.split)
        sums = sums.without_absent()
        encoded = encode(sums.features, plan.settings.dtype, plan.projection.scale)
        sums.require_good(plan, encoded.norm)
        if seen is not None:
            seen.require(plan.split)
        sq_norm, logits = to_host(sums.sq_norm, sums.logits.float())
    computed = {"sq_norm": sq_norm.numpy(), "logits": logits.numpy()}
    columns = {**columns, **computed, "features": encoded.features, "scale": encoded.scale, "norm": encoded.norm}
    return columns if sums.absent is None else blanked(columns, sums.absent)


def _grown(
    plan: Plan,
    groups: Sequence[Inputs],
    spans: Sequence[range],
    watch: Stopwatch,
    smaller: SmallerStore | None,
    independence: RowIndependence | None,
    bad_rows: BadRows | None,
    *,
    audited: bool,
) -> _Sums:
    """What `_project` returns, with the first columns taken from a smaller store where that gives the same digits."""
    rows = range(spans[0].start, spans[-1].stop)
    if smaller is not None and smaller.has(rows):
        old, exponent, small = smaller.sums(rows)
        sums = _project(plan, groups, spans, watch, old, independence, bad_rows, audited=audited)
        sums.require_good(plan)
        if sums.absent is None and smaller.exact(sums.features.cpu(), exponent, small):
            return sums
    return _project(plan, groups, spans, watch, None, independence, bad_rows, audited=audited)


def _project(
    plan: Plan,
    groups: Sequence[Inputs],
    spans: Sequence[range],
    watch: Stopwatch,
    old: Tensor | None = None,
    independence: RowIndependence | None = None,
    bad_rows: BadRows | None = None,
    *,
    audited: bool = False,
) -> _Sums:
    """Compute the features of some groups of rows.

    The groups' Jacobians are computed one group at a time and projected together, block by block, each block while the
    next one is made. The first columns are those of `old`, if given, and not computed.

    Returns:
        Features and what goes with them, on the device.
    """
    first_k = 0 if old is None else old.shape[-1]
    projection, rows = plan.projection, range(spans[0].start, spans[-1].stop)
    draws = plan.settings.draws
    mixed = plan.settings.layout == "mixed" or bool(draws)  # a P of its own for each row of an example's Jacobian
    watch.lap("jacobians")
    streams = [plan.engine(inputs) for inputs in groups]
    logits = torch.cat([stream.logits for stream in streams])
    parts: dict[str, Tensor] = {}
    shape = (len(rows), plan.manifest.schema.c)
    gradients = draws or (plan.classes if mixed else plan.manifest.schema.c)
    features = _zeros((*shape, projection.dim - first_k), logits.device)
    sq_norm = torch.zeros(shape, dtype=torch.float64, device=logits.device)
    audit = gradient = None
    if audited:
        each = replace(projection, dim=projection.dim // max(1, draws))
        audit = ProjectionAudit(
            each, spans, gradients, mixed=mixed and not draws, apart=bool(draws), first_k=first_k, device=logits.device
        )
    if independence is not None:
        gradient = independence.gradient_audit(groups, spans, gradients)
    audits = [found for found in (audit, gradient) if found is not None]

    def room(n: int, below: int, columns: int) -> Tensor:
        return reused((n, below or gradients, columns), features)

    lowered, adding = LoweredFeatures(projection, features, first_k), BlockSums(projection, features, first_k)
    added_up = torch.zeros_like(sq_norm)

    with projection.explained(plan.device), full_float32(plan.device), Beside(logits.device) as beside:
        for blocks in zip(*streams, strict=True):
            name, (runs, part, terms) = blocks[0].name, _joined(projection, blocks, spans, room, audits, mixed=mixed)
            parts[name] = parts[name] + part if name in parts else part
            # In the layout "mixed", E ‖Σ_c P_c g^c‖² / K = Σ_c ‖g^c‖²; in "sketched", E ‖f‖² = Σ_j ‖v_j‖² / r.
            sq_norm += part.sum(dim=1, keepdim=True) / max(1, draws) if mixed else part
            added_up += terms.sum(dim=1, keepdim=True) if mixed else terms
            watch.lap("jacobians")
            for sums in (lowered, adding):
                sums.expect(blocks[0].size)
            for places, block in runs:
                if isinstance(block, LoweredBlock) and not mixed:
                    lowered.add(places, block, beside)
                elif not mixed:
                    beside.run(partial(adding.add, places, block), reads=block)
                else:
                    out = features[places].view(-1, draws, projection.dim // draws) if draws else features[places]
                    work = partial(_accumulate_mixed_block, projection, out, block, first_k)
                    beside.run(work, reads=block)
            watch.lap("projection")
        adding.finish()
        lowered.raise_into(beside)
    if old is not None:
        features = torch.cat([old.to(features.device), features], dim=-1)
    by_draw = features.view(len(rows), draws, -1) if draws else features
    comparison = None if audit is None else audit.compare(by_draw)
    absent = None if bad_rows is None else bad_rows.reasons(rows, logits, sq_norm, groups, spans)
    found = (features, sq_norm, added_up, parts, logits, comparison, gradient)
    return _Sums(rows, *found, Handover(logits.device), absent)


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Float32 zeros, which another thread will drop."""
    if device.type == "cpu":
        return torch.from_numpy(mapped_zeros(shape, np.float32))
    return torch.zeros(shape, device=device)


def _joined(
    projection: Projection,
    blocks: Sequence[JacobianBlock],
    spans: Sequence[range],
    room: Callable[[int, int, int], Tensor],
    audits: Sequence[ProjectionAudit | GradientAudit],
    *,
    mixed: bool,
) -> tuple[list[tuple[slice, JacobianBlock]], Tensor, Tensor]:
    """Join the same columns of several groups, as far as they have the same shape: texts may differ in their length.

    Where the values of all rows are needed at once they are formed a group at a time, since their bits depend on it,
    and dropped before the next group's. A group that fell back to another route than its neighbours is by itself.

    Args:
        projection: by which blocks are multiplied.
        blocks: of the groups.
        spans: rows of the groups.
        room: (examples, rows of each below the last call or 0 for all classes, columns) -> memory for values.
        audits: take what they need of each group's block while its values are held.
        mixed: whether blocks are multiplied by a P for each class, which takes their values.

    Returns:
        Blocks, each with its rows of the batch; squared norms float64 [n, c]; and those of what rows are the sums of.
        The bits of a row do not depend on which groups are beside its own.
    """
    runs: list[tuple[slice, JacobianBlock]] = []
    norms: list[Tensor] = []
    terms: list[Tensor] = []

    def look(block: JacobianBlock, formed: bool) -> None:
        norms.append(block.sq_norm())
        terms.append(block.added_up() if isinstance(block, LoweredBlock) else torch.zeros_like(norms[-1]))
        for audit in audits:
            audit.look(len(norms) - 1, block, formed=formed)

    at = 0
    for _, alike in groupby(zip(blocks, map(len, spans), strict=True), key=lambda pair: type(pair[0])):
        some, counts = zip(*alike, strict=True)
        formed = _is_formed(projection, some[0], mixed)
        if formed and len(some) > 1:
            found = [_formed_together(some, counts, room, look, mixed)]
        else:
            for block in some:
                look(block, formed)
            found = _together(some, counts)
        runs += [(slice(at + places.start, at + places.stop), block) for places, block in found]
        at += sum(counts)
    return runs, torch.cat(norms), torch.cat(terms)


def _is_formed(projection: Projection, block: JacobianBlock, mixed: bool) -> bool:
    """Whether the values of all rows are needed at once; an embedding matrix is projected in parts."""
    if mixed or isinstance(block, OwnRowBlock):
        return not isinstance(block, OwnRowBlock)
    multiplied = _multiplied(block, mixed)
    return route(projection, multiplied, projection.dim) == "dense" and not isinstance(multiplied, EmbeddingBlock)


def _multiplied(block: JacobianBlock, mixed: bool) -> JacobianBlock:
    """What P multiplies of a block."""
    return block.base if isinstance(block, LoweredBlock) and not mixed else block


def _together(blocks: Sequence[JacobianBlock], counts: Sequence[int]) -> list[tuple[slice, JacobianBlock]]:
    """Groups one after another, neighbours of one structure joined; each with its places."""
    runs, at = [], 0
    for _, alike in groupby(zip(blocks, counts, strict=True), key=lambda pair: pair[0].structure):
        some, lengths = zip(*alike, strict=True)
        runs.append((slice(at, at + sum(lengths)), join_blocks(some)))
        at += sum(lengths)
    return runs


def _formed_together(
    blocks: Sequence[JacobianBlock],
    counts: Sequence[int],
    room: Callable[[int, int, int], Tensor],
    look: Callable[[JacobianBlock, bool], None],
    mixed: bool,
) -> tuple[slice, JacobianBlock]:
    """The values of all groups in one block; each group's are formed, seen and dropped in turn."""
    first = blocks[0]
    below = first.weight.shape[1] if isinstance(first, LoweredBlock) and not mixed else 0
    values, at = room(sum(counts), below, first.size), 0
    for block, count in zip(blocks, counts, strict=True):
        _multiplied(block, mixed).form(values[at : at + count])
        look(block, True)
        block.forget()
        at += count
    joined = DenseBlock(first.name, first.start, values)
    return slice(0, at), LoweredBlock(joined, first.weight) if below else joined  # type: ignore[attr-defined]


def _accumulate_mixed_block(projection: Projection, out: Tensor, block: JacobianBlock, first_k: int) -> None:
    """Add a block's products to out [n, c or 1, K] in the layouts "mixed" and "sketched", with a P for each row."""
    if isinstance(block, OwnRowBlock):
        for c in range(block.first, block.last):
            own = replace(projection, stream=c)
            own.accumulate(out[:, 0], block.inputs, block.own_start(c), first_k=first_k)
    else:
        _accumulate_mixed(projection, out, block.dense(), block.start, first_k)


def _accumulate_mixed(projection: Projection, out: Tensor, block: Tensor, start: int, first_k: int) -> None:
    """Add P_c g^c of a block [n, c, size] to out [n, c, K], or all of them to out [n, 1, K]; P_c is stream c.

    One row stands for the whole Jacobian [c · p] under one projection, so ⟨Σ_c P_c g_i^c, Σ_c P_c g_j^c⟩ / K estimates
    T = Σ_c ⟨g_i^c, g_j^c⟩ without bias, with variance (Σ_c ‖g_i^c‖² Σ_c ‖g_j^c‖² + T²) / K, less for Rademacher.
    """
    for c in range(block.shape[1]):
        target = out[:, c if out.shape[1] > 1 else 0]
        replace(projection, stream=c).accumulate(target, block[:, c].contiguous(), start, first_k=first_k)
