"""Functions of parameters: a weight norm, a spectral norm, standardised weights, a table of biases that is gathered.

The per-example gradient of the function's value comes from the rule of the layer that uses the value. One
vector-Jacobian product of the function for each row then gives that of the parameters: `∂L/∂θ = (∂w/∂θ)ᵀ ∂L/∂w`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradstore.jacobians.by_autograd import vectorised_grad
from gradstore.jacobians.reused_memory import reused
from gradstore.jacobians.terms import Term, sum_of
from gradstore.machine.out_of_memory import is_out_of_memory

_AT_ONCE = 1 << 20  # values that are pulled back together, unless one row has more; a processor's cache holds them


@dataclass(frozen=True)
class WeightFunction:
    """A tensor that was made of parameters alone.

    Attributes:
        value: it, with its graph.
        roots: the parameters that its gradient reaches.
    """

    value: Tensor
    roots: tuple[str, ...]

    def pull_back(self, rows: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the function's transposed Jacobian times each row.

        Args:
            rows: [r, size of the value].
            parameters: the roots, by name.

        Returns:
            [r, size] for each root. Holds those, and for some rows at a time a few times as much.
        """
        roots = [parameters[name] for name in self.roots]
        largest = max(self.value.numel(), *(root.numel() for root in roots))
        out = [reused((len(rows), root.numel()), self.value) for root in roots]
        step = max(1, _AT_ONCE // max(1, largest))
        for first in range(0, len(rows), step):
            for whole, part in zip(out, self._some(rows[first : first + step], roots), strict=True):
                whole[first : first + step] = part
        return dict(zip(self.roots, out, strict=True))

    def _some(self, rows: Tensor, roots: list[Tensor]) -> list[Tensor]:
        cotangents = rows.to(self.value.dtype).view(-1, *self.value.shape)
        try:
            found = vectorised_grad(self.value, roots, cotangents)
        except Exception as error:  # a backward pass of the user's own may refuse vmap in any way
            if is_out_of_memory(error):
                raise
            found = self._each(roots, cotangents)
        zeros = [rows.new_zeros(()).expand(len(rows), root.numel()) for root in roots]
        return [
            zero if gradient is None else gradient.reshape(len(rows), -1)
            for gradient, zero in zip(found, zeros, strict=True)
        ]

    def _each(self, roots: list[Tensor], cotangents: Tensor) -> list[Tensor | None]:
        options = {"retain_graph": True, "materialize_grads": True}
        each = [torch.autograd.grad(self.value, roots, row, **options) for row in cotangents]
        return [torch.stack(several) for several in zip(*each, strict=True)]


class PulledBack:
    """The gradients of all roots of one function, made together when the first is asked for.

    Args:
        function: of the parameters.
        terms: of its value, one a use.
        parameters: the roots, by name.
    """

    def __init__(self, function: WeightFunction, terms: list[Term], parameters: Mapping[str, Tensor]) -> None:
        self._function, self._terms, self._parameters = function, terms, parameters
        self._ready: dict[str, Tensor] = {}

    @property
    def held(self) -> int:
        """Bytes of the terms."""
        return sum(term.held for term in self._terms)

    def take(self, name: str) -> Tensor:
        """The gradient of a root, [n, c, size], which is given away."""
        if name not in self._ready:
            values = sum_of([term.values(0, term.rows) for term in self._terms])
            found = self._function.pull_back(values.flatten(0, 1), self._parameters)
            self._ready = {root: gradient.view(*values.shape[:2], -1) for root, gradient in found.items()}
        return self._ready.pop(name)


class RootTerm(Term):
    """A parameter that was used through a function of it.

    Args:
        pulled: the gradients of all parameters of the function.
        name: which one this is.
        shape: of it.
    """

    def __init__(self, pulled: PulledBack, name: str, shape: torch.Size) -> None:
        self._pulled, self._name = pulled, name
        self.rows = shape[0] if shape else 1
        self.width = shape.numel() // self.rows

    @property
    def held(self) -> int:
        """See `Term.held`; all roots of a function hold the same."""
        return self._pulled.held

    def values(self, first: int, last: int) -> Tensor:
        """Gradient of these rows; all rows are made, so ask for all at once."""
        return self._pulled.take(self._name)[..., first * self.width : last * self.width]
