"""A few values of a run projected a second time, by the definition of P, and compared with what the fast path gave.

A wrong P keeps norms as well as the right one does: signs of another seed, columns that are shifted or exchanged, rows
k in another order are all random matrices. So in some batches one row of the Jacobian is taken again, block by block as
it streams past, and multiplied in float64 by some rows k of P, whose entries come from `Entries` and not from the path
that is audited. Everything between the Jacobian and the features is on trial: routes, places of blocks, joined groups,
streams of classes, compiled code, fused kernels. Whether the Jacobian is right is not asked here.

What is seen. Let a share s of a row's ‖g‖² meet entries that are not those of P but independent of them, and let T be
the tolerance over ‖g‖: 3e-5 for paths that are right to float32 rounding, 3.2e-3 for the fast ones of a GPU. One value
is then off by about sqrt(2 s) ‖g‖, and within the tolerance with a chance of 0.6 T / sqrt(s).

- Always, what is wrong for the audited row at every k: all 16 values slip through with a chance of about 1e-12 where
  s = 1e-8 (fast: 1e-4), and less where s is larger. Only where one parameter carries all of s, its wrong sign
  is the right one by chance in half of the cases, and all 16 times with a chance of 2e-5.
- Always, what is wrong at an eighth of all k in succession, at one k at least: one is drawn from every sixteenth.
- Of a sparse P all k of four neighbouring blocks are taken, 4096, whose non-zeros come from one counter: always what is
  wrong there for the audited row, at however few k; what is wrong in other blocks with the chance that these are drawn.
- By chance, what is wrong elsewhere: at a share f of scattered k an audit sees it with a chance of 1 - (1 - f)^16, for
  a share f of rows (example and class) with the chance f, and in some batches only if one of them is audited.
- Never, what is wrong in the definition itself, which is read by the audit and by the reference path, or before and
  after the projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import NonFiniteError
from gradstore.jacobians import EmbeddingBlock, JacobianBlock, LinearBlock, LoweredBlock
from gradstore.jacobians.footprint import max_columns
from gradstore.jacobians.side_by_side import uncut_if_small
from gradstore.projection import Projection
from gradstore.projection.entries import Entries
from gradstore.projection.kind_record import Kind
from gradstore.projection.kinds import kind_of

_LARGER_ON_GPU = 32  # pieces of P that are made at once, as each launch has a price
_TERMS = 1 << 17  # values of deltas or activations that are held in float64 at once

# Relative errors of feature vectors. The paths' rounding errors are sums with random signs (an entry of P times what
# was rounded away of a gradient), so one value is off by more than t · error · ‖g‖ with a chance below 2 exp(-t²/2):
# 3e-14 for t = 8, or once in 2000 runs of 10^9 audited rows.
_GRADIENTS = 4e-4  # of a GPU's fast paths: gradients rounded to one float16
_SUMS = 3e-6  # every path, of the terms that are added up
_ADDITION = 2.0**-24  # of two float32
_DEVIATIONS = 8
_TINY = torch.finfo(torch.float32).tiny  # below it, float32 has no relative precision

# Flops of the fast path in the time that an audit takes for one entry of P, and for one block, as `AuditCost` has them
# for a CPU. Twice what was measured on a GPU, most of it for launching, beside 6 · 10^14 flops a second.
_GPU_COST = (6e4, 2e12)
_SHARE = 1 / 200  # of the projection's time that audits may take, after the first


class AuditSchedule:
    """Which batches are audited: the first one, and then one for every so much work.

    Audits take at most 1/200 of the projection's time, the first one aside: work is counted in flops, not read from a
    clock.

    Args:
        projection: as the run has it.
        device: where it computes.
        sizes: of the parameters.
        streams: projections a row is a sum of: classes in the layout "mixed", or 1.
        row_flops: of projecting one example.
    """

    def __init__(
        self, projection: Projection, device: torch.device, sizes: Sequence[int], streams: int, row_flops: float
    ) -> None:
        audit = kind_of(projection.kind).audit
        entry, block = _GPU_COST if device.type == "cuda" else (audit.entry, audit.block)
        columns = max_columns(device, 1)
        blocks = sum(-(-size // columns) for size in sizes)
        made = kind_of(projection.kind).nonzeros(min(audit.rows, projection.dim))
        cost = streams * (made * sum(sizes) * entry + blocks * block)
        if device.type != "cuda":
            cost *= torch.get_num_threads()  # an audit uses one of them
        self._spacing, self._row_flops = cost / _SHARE, row_flops
        self._left = 0.0

    @property
    def due(self) -> bool:
        """Whether the next batch shall be audited."""
        return self._left <= 0

    def computed(self, rows: int) -> None:
        """Count a batch of so many examples, audited if it was due."""
        if self.due:
            self._left = self._spacing
        self._left -= rows * self._row_flops


class ProjectionAudit:
    """One row of a batch and 16 rows of P, drawn by the seed and the batch; gathers ⟨P_k, g⟩ from the batch's blocks.

    All of it is queued on torch's current stream, and the host waits for nothing. Holds a few megabytes on a CPU, 150
    on a GPU.

    Args:
        projection: that is audited.
        groups: rows of the batch by groups, one after another.
        classes: of the blocks.
        mixed: whether a row is the sum of its classes, each under a stream of its own.
        first_k: rows of P from which on features are computed.
        device: of the blocks.
        apart: whether each class has a stream of its own and is by itself.
    """

    def __init__(
        self,
        projection: Projection,
        groups: Sequence[range],
        classes: int,
        *,
        mixed: bool,
        first_k: int,
        device: torch.device,
        apart: bool = False,
    ) -> None:
        draw = np.random.default_rng((projection.seed, groups[0].start))
        self._row = int(draw.integers(groups[0].start, groups[-1].stop))
        self._group = next(number for number, rows in enumerate(groups) if self._row in rows)
        self._i, self._in_group = self._row - groups[0].start, self._row - groups[self._group].start
        chosen = range(classes) if mixed else [int(draw.integers(classes))]
        self._class = 0 if mixed else chosen[0]
        streams = chosen if mixed or apart else [projection.stream]
        kind, seed = projection.kind, projection.seed
        self._under = [(c, Entries(kind, seed, stream)) for c, stream in zip(chosen, streams, strict=True)]
        rows = torch.ones(classes) if mixed else torch.zeros(classes).index_fill(0, torch.tensor(self._class), 1)
        self._rows = _on(rows, device)  # of the Jacobian, those that are added up
        self._ks = _drawn_rows(draw, first_k, projection.dim, kind_of(kind))
        self._k = _on(torch.from_numpy(self._ks), device)
        self._path = projection.path(device)
        self._piece = kind_of(kind).audit.columns * (1 if device.type == "cpu" else _LARGER_ON_GPU)
        self._want = torch.zeros(len(self._ks), dtype=torch.float64, device=device)
        self._sq_terms = torch.zeros((), dtype=torch.float64, device=device)
        self._additions = 0

    def look(self, group: int, block: JacobianBlock, *, formed: bool) -> None:
        """Take what the audit needs of the next block of a group.

        Args:
            group: number of the group.
            block: Jacobians of its rows.
            formed: whether values that the block keeps are those that are projected, and not its structure.
        """
        if group != self._group:
            return
        if isinstance(block, LoweredBlock):  # what is projected is what its rows are the sums of
            self._sq_terms += block.sq_terms(self._in_group, self._rows)
        for c, entries in self._under:
            picked = block.picked(self._in_group, c, formed=formed)
            with uncut_if_small(0):  # no operation here is worth a second thread
                self._add(entries, picked)

    def compare(self, features: Tensor) -> Comparison:
        """Set P g float32 [n, c, K] of the batch beside what was gathered; queued, so for `require` to judge later."""
        got = features[self._i, self._class].index_select(0, self._k)
        found = (self._want, got, self._sq_terms)
        return Comparison(self._row, self._i, self._class, self._ks, *found, self._additions, self._path)

    def _add(self, entries: Entries, block: JacobianBlock) -> None:
        """Add the product with a block [1, 1, size]."""
        if isinstance(block, EmbeddingBlock):
            # An embedding is a linear layer of one-hot activations, whose squared norm is the number of tokens.
            self._sq_terms += block.indices.shape[1] * _square(block.deltas[0, 0])
            self._add_strips(entries, block.start, block.indices[0], block.shares()[0, 0])
        elif isinstance(block, LinearBlock):
            deltas, activations = block.deltas[0, 0], block.activations[0]
            self._sq_terms += _square(deltas) * _square(activations)
            outputs = max(1, self._piece // block.width)
            for first in range(0, deltas.shape[1], outputs):
                values = _outer_sum(deltas[:, first : first + outputs], activations)
                self._add_columns(entries, block.start + first * block.width, values)
        else:
            values = block.dense()[0, 0]
            self._sq_terms += _square(values[None])
            self._add_columns(entries, block.start, values)

    def _add_columns(self, entries: Entries, start: int, values: Tensor) -> None:
        """Add the product with neighbouring columns [size]."""
        for part in values.split(self._piece):
            if entries.record.sparse is None:
                self._want += entries.columns(self._k, start, start + len(part)) @ part.double()
            else:
                self._add_nonzeros(entries, start + torch.arange(len(part), device=part.device), part)
            self._additions += 1
            start += len(part)

    def _add_strips(self, entries: Entries, start: int, indices: Tensor, shares: Tensor) -> None:
        """Add the product with shares [S, d] of the rows [S] of an embedding matrix."""
        width = shares.shape[1]
        some = max(1, self._piece // (width + 2 * entries.period))
        for rows, values in zip(indices.split(some), shares.split(some), strict=True):
            starts = start + rows * width
            if entries.record.sparse is None:
                self._want += entries.strips(self._k, starts, width).flatten(1) @ values.double().flatten()
            else:
                self._add_nonzeros(
                    entries, (starts[:, None] + torch.arange(width, device=starts.device)).flatten(), values.flatten()
                )
        self._additions += len(indices)

    def _add_nonzeros(self, entries: Entries, p: Tensor, values: Tensor) -> None:
        """Add the product of a sparse P, at all k, with columns p [m] whose values are [m]."""
        first = int(self._ks[0])
        self._want += entries.sums(first, first + len(self._ks), p, values)


@dataclass(frozen=True)
class Comparison:
    """What the fast path gave for one row at some k, and what the definition of P gives; perhaps still under way.

    Attributes:
        row: of the split.
        i: of the batch.
        c: class.
        k: rows of P, ascending.
        want: ⟨P_k, g⟩ by the definition, float64.
        got: the same by the fast path, float32.
        sq_terms: Σ over blocks of ‖δ‖² ‖a‖², or of ‖g‖² where the values are given: float64 []. What is added up may be
            much larger than its sum, and rounding errors are relative to it.
        additions: how many terms a value is the sum of, at most.
        path: of the projection.
    """

    row: int
    i: int
    c: int
    k: np.ndarray
    want: Tensor
    got: Tensor
    sq_terms: Tensor
    additions: int
    path: str

    def tolerance(self, sq_norm: Tensor) -> float:
        """By how much a right value may differ, given ‖g‖² [n, c] of the batch."""
        sums = (_SUMS + _ADDITION * self.additions**0.5) * float(self.sq_terms) ** 0.5
        fast = self.path.endswith(" fast")
        gradients = (_GRADIENTS if fast else 0.0) * float(sq_norm[self.i, self.c]) ** 0.5
        return float(_DEVIATIONS * (sums + gradients) + _TINY)

    def require(self, sq_norm: Tensor, split: str) -> None:
        """Refuse a projection that is not the one by P.

        Raises:
            NonFiniteError: names the row, its class and the k that differs most.
        """
        want, got, tolerance = self.want.cpu(), self.got.cpu().double(), self.tolerance(sq_norm)
        wrong = ~((want - got).abs() <= tolerance)
        if not bool(wrong.any()):
            return
        worst = int((want - got).abs().nan_to_num(torch.inf).argmax())
        on_gpu = self.path.endswith((" fast", " exact"))
        doctor = "; and run `gradstore doctor --again`" if on_gpu else ""
        raise NonFiniteError(
            f"the projection of row {self.row}, class {self.c} is wrong at k = {self.k[worst]}",
            where=f"split {split!r}, {self.path} path",
            expected=f"P g = {float(want[worst]):.6g} ± {tolerance:.1g}",
            got=f"{float(got[worst]):.6g}; {int(wrong.sum())} of {len(want)} audited k are wrong",
            hint="This is a fault of the projection, not of the data: compare with backend='reference' and report it"
            + doctor,
        )


def _drawn_rows(draw: np.random.Generator, first_k: int, K: int, kind: Kind) -> np.ndarray:
    """Different k of [first_k, K), ascending: one from each of equal parts; of a sparse P all of a few blocks."""
    if kind.sparse is None:
        count = min(kind.audit.rows, K - first_k)
        edges = first_k + np.arange(count + 1) * (K - first_k) // count
        return draw.integers(edges[:-1], edges[1:])
    part = int(draw.integers(first_k // kind.audit.rows, -(-K // kind.audit.rows)))
    return np.arange(max(first_k, part * kind.audit.rows), min(K, (part + 1) * kind.audit.rows))


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    """On a device; a GPU copies it when it comes to it, which takes pinned memory."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _outer_sum(deltas: Tensor, activations: Tensor) -> Tensor:
    """Σ_t deltas[t] ⊗ activations[t] of [T, o] and [T, i], float64 [o · i]."""
    total = torch.zeros(deltas.shape[1], activations.shape[1], dtype=torch.float64, device=deltas.device)
    for some, read in _chunks(deltas, activations):
        total += some.double().T @ read.double()
    return total.flatten()


def _square(rows: Tensor) -> Tensor:
    """Σ of the squares of [T, i], float64 []."""
    norms = [torch.linalg.vector_norm(some, dtype=torch.float64) for (some,) in _chunks(rows)]
    return torch.stack(norms).square().sum()


def _chunks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The same rows of each tensor [T, …], as few at a time as may be held in float64."""
    step = max(1, _TERMS // max(tensor.shape[1] for tensor in tensors))
    return zip(*(tensor.split(step) for tensor in tensors), strict=True)
