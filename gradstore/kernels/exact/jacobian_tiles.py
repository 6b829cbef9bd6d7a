"""Tiles of exact Jacobian kernels: operands are the Jacobians of some examples, in factors where they have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import NonFiniteError
from gradstore.featurization.plan import to_device
from gradstore.featurization.row_audit import require_finite_block
from gradstore.jacobians import JacobianEngine
from gradstore.jacobians.reused_memory import drop_spare
from gradstore.jacobians.side_by_side import uncut_if_small
from gradstore.kernels.definitions import Kernel
from gradstore.kernels.exact.contraction import contract, squared_norms
from gradstore.kernels.exact.example_selection import Selection
from gradstore.kernels.exact.factors import Held, bytes_each, held, joined_batches, joined_rows, patch_bytes, tensors_of
from gradstore.kernels.exact.jacobian_plan import plan_jacobians
from gradstore.kernels.gram_tiles import Skip, Tile, nothing
from gradstore.machine.devices import choose_device
from gradstore.machine.threads import worker_count
from gradstore.model.parameters import parameter_blocks
from gradstore.model.project import Project
from gradstore.model.weights import weights_digest

_PROBE = 4
_JOINED = 256  # examples whose blocks are joined at most, since operations on few take longer to begin than to do
_MIRRORED = 128  # rows copied together


@dataclass
class Jacobians:
    """Jacobians of some examples, for some classes.

    Attributes:
        columns: for every block of parameters, its name and the block of each batch.
        rows: the examples' indices in their split.
        squares: their squared norms, float64 [n], once they are known.
    """

    columns: tuple[tuple[str, list[Held]], ...]
    rows: np.ndarray
    squares: Tensor | None = None


class JacobianTiles:
    """The tiles of one Jacobian kernel between two selections of examples.

    Attributes:
        shape: of the matrix.
        plan: how it is cut, in examples.
    """

    def __init__(self, project: Project, a: Selection, b: Selection, kernel: Kernel, memory: int, device: str) -> None:
        self.project, self.a, self.b, self.kernel = project, a, b, kernel
        self.device = choose_device(device)
        project.prepare(self.device)
        blocks = parameter_blocks(project.model, project.parameters)
        probe = to_device(a.read(range(min(_PROBE, len(a)))), self.device)
        self.classes = int(project.logits(probe).shape[1])
        layout = "sum" if kernel.sums_classes else "per-class"
        self.engine = JacobianEngine(project.model, blocks, forward=project.forward, layout=layout, example=probe)
        self._trusted: set[tuple[str, range]] = set()  # batches whose audit was passed
        self.factor = self.classes if kernel.pairs_classes else 1
        rows = 1 if kernel.sums_classes else self.classes
        one, several = self._bytes_held(probe, 1), self._bytes_held(probe, min(2, rows))
        self.plan = plan_jacobians(
            len(a),
            len(b),
            symmetric=a is b,
            classes=rows,
            divisible=not kernel.pairs_classes,
            value=12 * self.factor**2,
            held=lambda classes: one + (classes - 1) * (several - one),
            # Of a quarter more: two threads' passes free pieces of up to 32 MB that the C library keeps.
            computing=lambda n, classes: self.engine.bytes_needed(n, classes, factors=True) * 5 // 4,
            memory=memory,
        )
        self.shape = (len(a) * self.factor, len(b) * self.factor)

    def tiles(self, skip: Skip = nothing) -> Iterator[Tile]:
        """Compute the tiles that are not to be skipped; of a matrix with pairs of classes, in its own indices."""
        for start in range(0, len(self.a), self.plan.group):
            group = range(start, min(start + self.plan.group, len(self.a)))
            wanted = [span for span in self._spans(group) if not skip(self._places(group), self._places(span))]
            whole = len(self._parts()) == 1 and bool(wanted)
            resident = None  # before the next group is held
            resident = self._load(self.a, group, self._parts()[0]) if whole else None
            for span in wanted:
                values = self._tile(group, span, resident)
                yield Tile(group.start * self.factor, span.start * self.factor, values)
                del values  # before the next tile is made

    def attributes(self) -> dict[str, str | int]:
        """What the matrix is, for its file."""
        return {
            "kernel": self.kernel.name,
            "formula": self.kernel.formula,
            "symmetric": int(self.a is self.b),
            "weights": weights_digest(self.project.model),
            "parameters": self.project.parameters,
            "split_a": self.a.split,
            "split_b": self.b.split,
            "data_a": self.a.digest,
            "data_b": self.b.digest,
        }

    def _places(self, rows: range) -> range:
        return range(rows.start * self.factor, rows.stop * self.factor)

    def _spans(self, group: range) -> list[range]:
        """The columns of the group's tiles; of a symmetric matrix its own first, then all later ones."""
        symmetric, m = self.a is self.b, len(self.b)
        starts = range(group.stop if symmetric else 0, m, self.plan.span)
        own = [group] if symmetric else []
        return own + [range(start, min(start + self.plan.span, m)) for start in starts]

    def _parts(self) -> list[slice]:
        """The classes that are differentiated together."""
        rows = 1 if self.kernel.sums_classes else self.classes
        return [slice(start, start + self.plan.classes) for start in range(0, rows, self.plan.classes)]

    def _bytes_held(self, probe: Tensor | dict[str, Tensor], classes: int) -> int:
        """Bytes of one example's operand: every storage that its blocks keep, counted once."""
        storages: dict[int, int] = {}
        kept = [held(block) for block in self.engine(probe, slice(0, classes))]
        for tensor in (tensor for block in kept for tensor in tensors_of(block)):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        n = len(next(iter(probe.values()))) if isinstance(probe, dict) else len(probe)
        return -(-sum(storages.values()) // n)

    def _load(self, selection: Selection, rows: range, classes: slice) -> Jacobians:
        drop_spare()  # what products used
        # Threads that wait for the next small layer would take the cores from those that multiply.
        with uncut_if_small(self.engine.outputs(self.plan.batch)):
            jacobians = self._computed(selection, rows, classes)
        drop_spare()  # what passes used
        return jacobians

    def _computed(self, selection: Selection, rows: range, classes: slice) -> Jacobians:
        batches, apart = list[list[Held]](), list[list[Held]]()
        room = self.plan.scratch // (32 * self.plan.group * self.plan.classes)
        for start in range(rows.start, rows.stop, self.plan.batch):
            span = range(start, min(start + self.plan.batch, rows.stop))
            trusted = (selection.split, span) in self._trusted
            stream = self.engine(to_device(selection.read(span), self.device), classes, trusted=trusted)
            if stream.trusted:
                self._trusted.add((selection.split, span))
            apart.append(joined_rows(map(held, stream), room))
            full = (len(apart) + 1) * self.plan.batch > self._joined(apart[0]) or span.stop == rows.stop
            if full:
                batches += joined_batches(apart)
                apart = []
        columns = tuple((same[0].name, list(same)) for same in zip(*batches, strict=True))
        return Jacobians(columns, selection.rows[rows.start : rows.stop])

    def _joined(self, blocks: Sequence[Held]) -> int:
        """Examples that are joined.

        Patches of a slice, of theirs for every worker, may take a sixth of the scratch; their blocks, which in small
        pieces are held twice meanwhile, three quarters.

        Returns:
            Their number.
        """
        scratch = self.plan.scratch
        columns = scratch // (6 * self.plan.group * self.plan.classes)
        patches = 6 * worker_count() * patch_bytes(blocks, columns)
        twice = sum(map(bytes_each, blocks)) * 4 // 3
        return min(_JOINED, scratch // max(patches, twice))

    def _tile(self, group: range, span: range, resident: Jacobians | None) -> np.ndarray:
        """The kernel between the group and some columns; `resident` is the group with all of its classes."""
        own = self.a is self.b and group == span
        shape = (len(group) * self.factor, len(span) * self.factor)
        out = torch.zeros(shape, dtype=torch.float64, device=self.device)
        squares = [torch.zeros(len(rows), dtype=torch.float64, device=self.device) for rows in (group, span)]
        for classes in self._parts():
            rows = resident or self._load(self.a, group, classes)
            if own:
                squares[1] += self._add(rows, rows, out)
                del rows  # before the next classes are computed
                continue
            squares[0] += self._squares(rows)
            for start in range(span.start, span.stop, self.plan.block):
                block = range(start, min(start + self.plan.block, span.stop))
                at = slice(start - span.start, block.stop - span.start)
                places = slice(at.start * self.factor, at.stop * self.factor)
                squares[1][at] += self._add(rows, self._load(self.b, block, classes), out[:, places])
            del rows
        return self._finished(out, (squares[1] if own else squares[0], squares[1]), (group, span), own)

    def _add(self, a: Jacobians, b: Jacobians, out: Tensor) -> Tensor:
        """Add the products over all blocks of parameters; the squared norms of b's rows, float64 [m]."""
        total = torch.zeros(len(b.rows), dtype=torch.float64, device=self.device)
        blocks = [(left, left if a is b else right) for (_, left), (_, right) in zip(a.columns, b.columns, strict=True)]
        squares = contract(blocks, out, pairs=self.kernel.pairs_classes, scratch=self.plan.scratch)
        for (name, _), square in zip(b.columns, squares, strict=True):
            require_finite_block(square, b.rows.tolist(), name, self.b.split)
            total += square.sum(dim=1)
        b.squares = total
        return total

    def _squares(self, a: Jacobians) -> Tensor:
        """The squared norms of rows, float64 [n]; computed once."""
        if a.squares is None:
            a.squares = torch.zeros(len(a.rows), dtype=torch.float64, device=self.device)
            for name, blocks in a.columns:
                square = squared_norms(blocks, self.plan.scratch)
                require_finite_block(square, a.rows.tolist(), name, self.a.split)
                a.squares += square.sum(dim=1)
        return a.squares

    def _finished(
        self, out: Tensor, squares: tuple[Tensor, Tensor], sides: tuple[range, range], own: bool
    ) -> np.ndarray:
        if self.kernel.normalised:
            norms = [
                self._norms(square, selection.rows[rows.start : rows.stop], selection.split)
                for square, selection, rows in zip(squares, (self.a, self.b), sides, strict=True)
            ]
            out /= norms[0][:, None]
            out /= norms[1]
        if self.kernel.averages:
            out /= self.classes
        if own:
            _mirror(out)
            if self.kernel.normalised:
                out.fill_diagonal_(1.0)
        return out.cpu().numpy()

    def _norms(self, squares: Tensor, rows: np.ndarray, split: str) -> Tensor:
        norms = squares.sqrt()
        zero = torch.nonzero(norms == 0)
        if len(zero):
            raise NonFiniteError(
                f"the gradients of row {rows[int(zero[0])]} are zero, so {self.kernel.name} is undefined",
                where=f"split {split!r}",
                expected="a gradient, of which a cosine can be taken",
                hint="Widen `parameters=`, or use the kernel that is not normalised",
            )
        return norms


def _mirror(out: Tensor) -> None:
    """What is right of the diagonal is copied to its left, so that `out` is symmetric to the last bit; holds little."""
    for low in range(0, len(out), _MIRRORED):
        high = low + _MIRRORED
        square = out[low:high, low:high]
        square.copy_(square.triu() + square.triu(1).T)
        out[high:, low:high] = out[low:high, high:].T
