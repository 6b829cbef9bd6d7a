"""Blocks of a model whose last call is linear: logits = z Wᵀ + b, with fewer inputs z [n, d] than classes.

Every parameter below that call has gradients in the span of only d rows: `g^c = Σ_m W_cm h_m` with `h_m = ∂z_m/∂θ`. A
`LoweredBlock` holds the h_m and W, so that d rows are differentiated and projected instead of c. The call's own weight
is in no need of either: class c's gradient is z in row c and zero elsewhere, an `OwnRowBlock`; and so is its bias,
with 1 for z.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from gradstore.jacobians.blocks import DenseBlock, JacobianBlock, LinearBlock
from gradstore.jacobians.reused_memory import reused
from gradstore.jacobians.side_by_side import side_by_side, uncut_if_small


def raise_rows(out: Tensor, weight: Tensor, below: Tensor, *, beta: int) -> None:
    """Set ``out[i] = beta · out[i] + weight @ below[i]``, an example a thread, so that no bit depends on the others.

    Args:
        out: [n, c, columns], changed in place.
        weight: [c, d].
        below: [n, d, columns].
        beta: 0 or 1; of 0, what `out` holds is not read.
    """

    def some(examples: range) -> None:
        with uncut_if_small(0):
            for i in examples:
                out[i].addmm_(weight, below[i], beta=beta)

    side_by_side(some, len(out), out.device)


class LoweredBlock(JacobianBlock):
    """Rows [n, c, size] that are combinations of fewer rows: weight · base.

    Attributes:
        base: the block [n, d, size] of the rows h_m.
        weight: W [c, d], float32; the same for all examples.

    Args:
        weight: the same in float32 or wider.
    """

    def __init__(self, base: JacobianBlock, weight: Tensor) -> None:
        super().__init__(base.name, base.start, base.size)
        self.base, self.weight, self._given = base, weight.float(), weight

    @property
    def structure(self) -> tuple[object, ...]:
        """See `JacobianBlock.structure`."""
        return ("lowered", *self.weight.shape, type(self.base), *self.base.structure)

    def forget(self) -> None:
        """Keep the values no longer, nor those of the base."""
        super().forget()
        self.base.forget()

    def picked(self, i: int, c: int, *, formed: bool) -> JacobianBlock:
        """See `JacobianBlock.picked`."""
        if formed and self._dense is not None:
            return super().picked(i, c, formed=formed)
        return self.base.combined(i, self.weight[c], formed=formed)

    def combined(self, i: int, factors: Tensor, *, formed: bool) -> JacobianBlock:
        """See `JacobianBlock.combined`: Σ_c u_c Σ_m W_cm h_m by one combination of the h_m."""
        if formed and self._dense is not None:
            return super().combined(i, factors, formed=formed)
        return self.base.combined(i, factors.to(self.weight) @ self.weight, formed=formed)

    def sq_norm(self) -> Tensor:
        """Σ of the squared values, [n, c] float64: diag(W G Wᵀ) of the inner products G of the h_m."""
        # The h_m may cancel in a class: hence float64 throughout, and rounding errors below zero are zero.
        wide = self._given.double()
        return ((wide @ self._inner_products) * wide).sum(2).clamp_(min=0.0)

    def added_up(self) -> Tensor:
        """Σ_m W_cm² ‖h_m‖², [n, c] float64: what a row would have if no two h_m were alike or opposite."""
        return self._inner_products.diagonal(dim1=1, dim2=2) @ self._given.double().square().T

    def inner_products(self) -> Tensor:
        """See `JacobianBlock.inner_products`."""
        wide = self._given.double()
        return wide @ self._inner_products @ wide.T

    def sq_terms(self, i: int, factors: Tensor) -> Tensor:
        """See `JacobianBlock.sq_terms`: of all classes, each the sum of what the h_m are the sums of."""
        return self.base.sq_terms(i, (factors.double().square() @ self._given.double().square()).sqrt())

    def joined(self, others: Sequence[JacobianBlock]) -> JacobianBlock:
        """See `JacobianBlock.joined`."""
        return LoweredBlock(self.base.joined([other.base for other in others]), self._given)  # type: ignore[attr-defined]

    @cached_property
    def _inner_products(self) -> Tensor:
        return self.base.inner_products()

    def _values(self) -> Tensor:
        base = self.base.dense()
        out = reused((len(base), len(self.weight), self.size), base)
        raise_rows(out, self.weight, base, beta=0)
        return out


class OwnRowBlock(JacobianBlock):
    """Rows [first, last) of a parameter [classes, width], where class c's gradient is the input in row c, else zero.

    Attributes:
        inputs: z [n, width], float32 or wider; ones [n, 1] of a bias.
        classes: c.
        first: the parameter's first row that the block has; class `first` has its values there.
        last: the row after its last.
    """

    def __init__(self, name: str, start: int, inputs: Tensor, classes: int, first: int, last: int) -> None:
        self.inputs, self.classes, self.first, self.last = inputs, classes, first, last
        super().__init__(name, start, (last - first) * self.width)

    @property
    def width(self) -> int:
        """Columns of a row of the parameter."""
        return self.inputs.shape[1]

    @property
    def structure(self) -> tuple[object, ...]:
        """See `JacobianBlock.structure`."""
        return ("own rows", self.classes, self.first, self.last, self.width)

    def own_start(self, c: int) -> int:
        """The flat index at which the values of class c begin."""
        return self.start + (c - self.first) * self.width

    def picked(self, i: int, c: int, *, formed: bool) -> JacobianBlock:
        """See `JacobianBlock.picked`: of the columns, those that may hold something."""
        own = self.inputs[i : i + 1, None]
        if self.first <= c < self.last:
            return DenseBlock(self.name, self.own_start(c), own)
        return DenseBlock(self.name, self.start, torch.zeros_like(own))

    def combined(self, i: int, factors: Tensor, *, formed: bool) -> JacobianBlock:
        """See `JacobianBlock.combined`: the outer product of the factors and the input."""
        own = self.inputs[i : i + 1, None]
        return LinearBlock(self.name, self.start, own, factors[self.first : self.last].to(own)[None, None, None])

    def sq_norm(self) -> Tensor:
        """Σ of the squared values, [n, c] float64: ‖z‖² where the block has the class's own row."""
        norms = self.inputs.new_zeros(len(self.inputs), self.classes, dtype=torch.float64)
        norms[:, self.first : self.last] = self.inputs.double().square().sum(1, keepdim=True)
        return norms

    def sq_terms(self, i: int, factors: Tensor) -> Tensor:
        """See `JacobianBlock.sq_terms`."""
        return factors.double().square() @ self.sq_norm()[i]

    def joined(self, others: Sequence[JacobianBlock]) -> JacobianBlock:
        """See `JacobianBlock.joined`."""
        inputs = torch.cat([self.inputs, *(other.inputs for other in others)])  # type: ignore[attr-defined]
        return OwnRowBlock(self.name, self.start, inputs, self.classes, self.first, self.last)

    def _values(self) -> Tensor:
        out = self.inputs.new_zeros(len(self.inputs), self.classes, self.last - self.first, self.width)
        own = torch.arange(self.last - self.first, device=self.inputs.device)
        out[:, own + self.first, own] = self.inputs[:, None]
        return out.flatten(2)
