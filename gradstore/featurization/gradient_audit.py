"""One row of a batch differentiated again by itself, by plain autograd, and compared with what is about to be stored.

A model's backward pass can look at its batch where its logits do not: a gradient that is scaled by the batch's largest
value, say. So the combined gradient Σ_c u_c g^c of one row, drawn at random, is computed by the definition, with no
other row beside it, and subtracted block by block from what streams past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import ProjectError
from gradstore.jacobians import EmbeddingBlock, JacobianBlock
from gradstore.jacobians.footprint import max_columns
from gradstore.jacobians.row_owners import weights
from gradstore.jacobians.subject import take
from gradstore.machine.cuda_streams import to_host
from gradstore.model.examples import Inputs

if TYPE_CHECKING:
    from gradstore.featurization.plan import Plan

# Parameters of one audit have so many values, unless one alone has more: a gradient of all of a large model would take
# as much memory as the model.
_VALUES = 1 << 22
_FLOOR = 1e-2  # a parameter's share of the whole below which a difference cannot be told from cancellation


class GradientAudit:
    """The gradient of one row of a batch alone, from which the batch's blocks are subtracted.

    Holds twice the chosen parameters' gradient of one row, and one example's graph while it is made.

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
        self.logits, gradients = plan.engine.alone(example, list(self._starts), self._factors)
        self._norms = {name: _norm(g) for name, g in gradients.items()}
        self._left = {name: g.float().clone() for name, g in gradients.items()}  # autograd may give one memory twice
        for b in chosen:
            if (name := plan.blocks[b].name) not in self._left:
                self._left[name] = torch.zeros(plan.blocks[b].size, device=plan.device)
                self._norms[name] = _norm(self._left[name])
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
        """How much is left; queued, so for `require` to judge later."""
        errors = torch.stack([_norm(left) for left in self._left.values()])
        norms = torch.stack([self._norms[name] for name in self._left])
        return GradientComparison(self.row, tuple(self._left), errors, norms, self._tolerance)


@dataclass(frozen=True)
class GradientComparison:
    """How far a row's gradient in its batch is from its gradient alone; perhaps still under way.

    Attributes:
        row: of the split.
        names: the parameters.
        errors: norm of the difference for each, float64 [parameters].
        norms: of the gradient alone.
        tolerance: relative difference that rounding may make.
    """

    row: int
    names: tuple[str, ...]
    errors: Tensor
    norms: Tensor
    tolerance: float

    def require(self, split: str) -> None:
        """Refuse a gradient that depends on the batch.

        Raises:
            ProjectError: names the row and the parameter that differs most.
        """
        errors, norms = to_host(self.errors, self.norms)
        allowed = self.tolerance * (norms + _FLOOR * norms.square().sum().sqrt())
        excess = errors - allowed
        if bool((excess <= 0).all()):
            return
        worst = int(excess.nan_to_num(torch.inf).argmax())
        raise ProjectError(
            f"row {self.row} has another gradient alone than in its batch",
            where=f"split {split!r}, parameter {self.names[worst]}",
            expected=f"the same to {float(allowed[worst]):.2g} of {float(norms[worst]):.3g}",
            got=f"a difference of {float(errors[worst]):.2g}",
            hint="The backward pass looks at its batch; --alone, or alone=True, computes each example by itself",
        )


def _norm(values: Tensor) -> Tensor:
    """In float64, which gradients near float32's limit need."""
    return torch.linalg.vector_norm(values, dtype=torch.float64)


def bytes_needed(sizes: Sequence[int]) -> int:
    """What an audit holds beside one example's graph, for parameters of these sizes: the gradient twice and a block."""
    return 3 * 4 * min(sum(sizes), max(_VALUES, *sizes))


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
