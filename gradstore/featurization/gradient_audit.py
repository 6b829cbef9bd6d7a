"""One row of a batch differentiated again by itself, by plain autograd, and compared with what is about to be stored.

A model's backward pass can look at its batch where its logits do not: a gradient that is scaled by the batch's largest
value, say. So the combined gradient Σ_c u_c g^c of one row, drawn at random, is computed by the definition, with no
other row beside it, and subtracted block by block from what streams past. What is left may be as large as rounding
makes it, and as roundings move that gradient (`jacobians.steadiness`), which is found out where it matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import ProjectError
from gradstore.jacobians import EmbeddingBlock, JacobianBlock
from gradstore.jacobians.footprint import max_columns
from gradstore.jacobians.row_owners import weights
from gradstore.jacobians.steadiness import VALUES, allowed
from gradstore.jacobians.subject import take
from gradstore.machine.cuda_streams import to_host
from gradstore.model.examples import Inputs

if TYPE_CHECKING:
    from gradstore.featurization.plan import Plan

# Parameters of one audit have so many values, unless one alone has more: a gradient of all of a large model would take
# as much memory as the model.
_VALUES = 1 << 22


class GradientAudit:
    """The gradient of one row of a batch alone, from which the batch's blocks are subtracted.

    Holds twice the chosen parameters' gradient of one row, and one example's graph while it is made; a third time, and
    some weights, where a difference has to be accounted for.

    Args:
        plan: the model and its engine.
        groups: inputs of the batch by groups, on the device.
        spans: which rows they are.
        draw: chooses the row and, of a large model, the parameters.
        classes: c of the blocks.

    Attributes:
        row: of the split.
        logits: of that row alone, where gradients are on, float32 [classes].
    """

    def __init__(
        self, plan: Plan, groups: Sequence[Inputs], spans: Sequence[range], draw: np.random.Generator, classes: int
    ) -> None:
        self.row = int(draw.integers(spans[0].start, spans[-1].stop))
        self._group = next(number for number, rows in enumerate(spans) if self.row in rows)
        self._i = self.row - spans[self._group].start
        chosen = _some([block.size for block in plan.blocks], draw)
        self._starts = {plan.blocks[b].name: plan.blocks[b].start for b in chosen}
        example = take(groups[self._group], slice(self._i, self._i + 1))
        self._factors = weights(classes, torch.empty(0, device=plan.device))
        self._engine, self._example = plan.engine, example
        self.logits, gradients = plan.engine.alone(example, list(self._starts), self._factors)
        self._norms = {name: _norm(g) for name, g in gradients.items()}
        self._left = {name: g.float().clone() for name, g in gradients.items()}  # autograd may give one memory twice
        self._tolerance = plan.engine.rounding(self.logits)

    def look(self, group: int, block: JacobianBlock, *, formed: bool) -> None:
        """Subtract a block of a group; see `ProjectionAudit.look`."""
        if group != self._group or block.name not in self._left:
            return
        combined = block.combined(self._i, self._factors, formed=formed)
        wide = isinstance(combined, EmbeddingBlock)
        parts = combined.parts(max_columns(self.logits.device, 1)) if wide else [combined]  # type: ignore[attr-defined]
        for part in parts:
            at = part.start - self._starts[block.name]
            self._left[block.name][at : at + part.size] -= part.dense()[0, 0]

    def compare(self) -> GradientComparison:
        """How much is left, and where that is more than rounding makes, how much roundings may; waits for a GPU."""
        names = tuple(self._left)
        left = torch.stack([_norm(values) for values in self._left.values()])
        errors, norms = to_host(left, torch.stack([*self._norms.values()]))
        self._left.clear()
        found = GradientComparison(self.row, names, errors, norms, self._tolerance)
        if not bool(errors.isfinite().all()) or found.agrees:
            return found

        def excused(moved: Mapping[str, float]) -> bool:
            return replace(found, moved=moved).agrees

        moved = self._engine.spread(self._example, names, self._factors, self._tolerance, excused)
        return replace(found, moved=moved)


@dataclass(frozen=True)
class GradientComparison:
    """How far a row's gradient in its batch is from its gradient alone.

    Attributes:
        row: of the split.
        names: the parameters.
        errors: norm of the difference for each, float64 [parameters].
        norms: of the gradient alone.
        tolerance: relative difference that rounding may make.
        moved: by name, how far roundings were seen to move the gradient.
    """

    row: int
    names: tuple[str, ...]
    errors: Tensor
    norms: Tensor
    tolerance: float
    moved: Mapping[str, float] = field(default_factory=dict)

    @property
    def allowed(self) -> Tensor:
        """The largest error of each parameter that is no fault, float64 [parameters]."""
        moved = torch.tensor([self.moved.get(name, 0.0) for name in self.names], dtype=torch.float64)
        return allowed(self.norms, self.norms.square().sum().sqrt(), self.tolerance, moved)

    @property
    def agrees(self) -> bool:
        """Whether no error is larger."""
        return bool((self.errors <= self.allowed).all())

    def require(self, split: str) -> None:
        """Refuse a gradient that depends on the batch.

        Raises:
            ProjectError: names the row and the parameter that differs most.
        """
        if self.agrees:
            return
        allowed = self.allowed
        worst = int((self.errors - allowed).nan_to_num(torch.inf).argmax())
        raise ProjectError(
            f"row {self.row} has another gradient alone than in its batch",
            where=f"split {split!r}, parameter {self.names[worst]}",
            expected=f"the same to {float(allowed[worst]):.2g} of {float(self.norms[worst]):.3g}",
            got=f"a difference of {float(self.errors[worst]):.2g}",
            hint="The backward pass looks at its batch; --alone, or alone=True, computes each example by itself",
        )


def _norm(values: Tensor) -> Tensor:
    """In float64, which gradients near float32's limit need."""
    return torch.linalg.vector_norm(values, dtype=torch.float64)


def bytes_needed(sizes: Sequence[int]) -> int:
    """What an audit holds beside one example's graph, for parameters of these sizes: gradients three times, weights."""
    moved = min(sum(sizes), max(VALUES, min(sizes)))
    return 3 * 4 * min(sum(sizes), max(_VALUES, *sizes)) + 2 * 4 * moved


def _some(sizes: Sequence[int], draw: np.random.Generator) -> list[int]:
    """Neighbours of all parameters, beginning anywhere and going round, that have no more than `_VALUES` together."""
    first, total = int(draw.integers(len(sizes))), 0
    chosen: list[int] = []
    for number in (*range(first, len(sizes)), *range(first)):
        total += sizes[number]
        if chosen and total > _VALUES:
            break
        chosen.append(number)
    return chosen
