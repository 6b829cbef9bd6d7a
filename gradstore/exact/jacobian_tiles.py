"""Tiles of exact Jacobian kernels: operands are the Jacobians of some examples, in factors where they have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gradstore.audit import require_finite_block
from gradstore.environment import choose_device
from gradstore.errors import NonFiniteError, UsageError
from gradstore.exact.contraction import contract, held, tensors_of
from gradstore.exact.selection import Selection
from gradstore.jacobians import JacobianBlock, JacobianEngine
from gradstore.kernels import Kernel
from gradstore.memory import format_bytes
from gradstore.parameters import parameter_blocks
from gradstore.plan import to_device
from gradstore.project import Project
from gradstore.tiles import Skip, Tile, nothing, plan_grid
from gradstore.weights import weights_digest

# Examples whose Jacobians are computed in one pass.
_BATCH = 128
_PROBE = 4
# Columns that pass by together. Few, where not all rows can stay, since what passes by is computed again for each
# group; many, where they can, since the dense rows formed for a product are shared by them all.
_FEW, _MANY = 64, 256


@dataclass(frozen=True)
class Jacobians:
    """Jacobians of some examples.

    Attributes:
        columns: for every block of parameters, the block of each batch.
        norms: float64 [n], by which a row of the kernel is divided.
    """

    columns: tuple[tuple[JacobianBlock, ...], ...]
    norms: Tensor


class JacobianTiles:
    """The tiles of one Jacobian kernel between two selections of examples.

    Attributes:
        shape: of the matrix.
        grid: how it is cut, in examples.
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
        self.factor = self.classes if kernel.pairs_classes else 1
        self.scratch = memory // 6
        self.batch = self._choose_batch(memory)
        held = self._bytes_held(probe)
        room = memory - self.scratch - int(self.engine.bytes_needed(self.batch))
        self.grid = plan_grid(
            len(a),
            len(b),
            symmetric=a is b,
            held=held,
            loading=0,
            value=24 * self.factor**2,
            memory=room,
            most=_MANY if (len(a) + _MANY) * held < room else _FEW,
            ahead=False,
        )
        self.shape = (len(a) * self.factor, len(b) * self.factor)

    def tiles(self, skip: Skip = nothing) -> Iterator[Tile]:
        """Compute the tiles that are not to be skipped; of a matrix with pairs of classes, in its own indices."""
        f = self.factor

        def known(rows: range, columns: range) -> bool:
            return skip(range(rows.start * f, rows.stop * f), range(columns.start * f, columns.stop * f))

        load_a, load_b = partial(self._load, self.a), partial(self._load, self.b)
        for tile in self.grid.tiles(load_a, load_b, self._multiply, known):
            yield Tile(tile.start_a * f, tile.start_b * f, tile.values)

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

    def _choose_batch(self, memory: int) -> int:
        batch = _BATCH
        while batch > 1 and self.engine.bytes_needed(batch) > memory // 4:
            batch //= 2
        need = 4 * int(self.engine.bytes_needed(batch))
        if need > memory:
            expected = f"at least {format_bytes(need)}"
            raise UsageError("too little memory", where="--memory", expected=expected, got=format_bytes(memory))
        return batch

    def _bytes_held(self, probe: Tensor | dict[str, Tensor]) -> int:
        """Bytes of one example's operand: every storage that its blocks keep, counted once."""
        storages: dict[int, int] = {}
        kept = [held(block) for block in self.engine(probe)]
        for tensor in (tensor for block in kept for tensor in tensors_of(block)):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        n = len(next(iter(probe.values()))) if isinstance(probe, dict) else len(probe)
        return -(-sum(storages.values()) // n)

    def _load(self, selection: Selection, rows: range) -> Jacobians:
        batches, squares = [], []
        for start in range(rows.start, rows.stop, self.batch):
            span = range(start, min(start + self.batch, rows.stop))
            blocks, square = self._blocks(selection, span)
            batches.append(blocks)
            squares.append(square)
        norms = self._norms(torch.cat(squares), selection.rows[rows.start : rows.stop], selection.split)
        return Jacobians(tuple(zip(*batches, strict=True)), norms)

    def _blocks(self, selection: Selection, span: range) -> tuple[list[JacobianBlock], Tensor]:
        """The blocks of one batch, and the squared norms float64 [n, c]."""
        rows = selection.rows[span.start : span.stop].tolist()
        blocks = []
        total: Tensor | None = None
        for block in self.engine(to_device(selection.read(span), self.device)):
            square = copy(block).sq_norm()  # a block keeps the values it has made; a copy keeps them for itself
            require_finite_block(square, rows, block.name, selection.split)
            total = square if total is None else total + square
            blocks.append(held(block))
        assert total is not None  # parameter_blocks refuses an empty selection
        return blocks, total

    def _norms(self, squares: Tensor, rows: np.ndarray, split: str) -> Tensor:
        if not self.kernel.normalised:
            return torch.ones(len(squares), dtype=torch.float64, device=self.device)
        norms = squares.sum(dim=1).sqrt()
        zero = torch.nonzero(norms == 0)
        if len(zero):
            raise NonFiniteError(
                f"the gradients of row {rows[int(zero[0])]} are zero, so {self.kernel.name} is undefined",
                where=f"split {split!r}",
                expected="a gradient, of which a cosine can be taken",
                hint="Widen `parameters=`, or use the kernel that is not normalised",
            )
        return norms

    def _multiply(self, a: Sequence[Jacobians], b: Jacobians) -> np.ndarray:
        n = sum(len(rows.norms) for rows in a)
        shape = (n * self.factor, len(b.norms) * self.factor)
        out = torch.zeros(shape, dtype=torch.float64, device=self.device)
        for j, right in enumerate(b.columns):
            left = [block for rows in a for block in rows.columns[j]]
            contract(left, right, out, pairs=self.kernel.pairs_classes, scratch=self.scratch)
        if self.kernel.normalised:
            out /= torch.cat([rows.norms for rows in a])[:, None]
            out /= b.norms
        if self.kernel.averages:
            out /= self.classes
        if b is a[-1]:
            own = out[-len(b.norms) * self.factor :]
            own.copy_(own.triu() + own.triu(1).T)  # symmetric to the last bit
            if self.kernel.normalised:
                own.fill_diagonal_(1.0)
        return out.cpu().numpy()
