"""Features of rows below a model's last call, multiplied by that call's weight when all of their blocks are in.

P is linear: where `g^c = Σ_m W_cm h_m` for d rows h_m, `P g^c = Σ_m W_cm P h_m`. So P multiplies d rows an example, and
their sums [d, K] are multiplied by W [c, d] once.

Rounding. The h_m of an example may be much alike, and a class may be a difference of them, g^c smaller than its terms
`s = sqrt(Σ_m W_cm² ‖h_m‖²)` by a factor of s / ‖g^c‖. What float32 rounds away of the terms (about 1e-6 of them) then
is more of the class; `added_up` keeps s² for the checks that have to allow for it. A GPU's fast products would round
away 2e-4 of the terms, so these rows always have its exact ones, which take twice the work of so many rows.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from gradstore.jacobians import LoweredBlock
from gradstore.jacobians.head_blocks import raise_rows
from gradstore.machine.cuda_streams import Beside
from gradstore.projection import Projection
from gradstore.projection.block_sums import BlockSums


class LoweredFeatures:
    """Sums P h, float32 [n, d, K'], of the examples of a batch that have rows below the last call.

    Args:
        projection: P, as the run has it.
        features: of the batch, float32 [n, c, K'], to which `raise_into` adds.
        first_k: the row of P that the first of the K' columns belongs to.
    """

    def __init__(self, projection: Projection, features: Tensor, first_k: int) -> None:
        self._projection, self._features = replace(projection, precision="exact"), features
        self._first_k = first_k
        self._sums: Tensor | None = None
        self._adding: BlockSums | None = None
        self._sizes: list[int] = []
        self._weight: Tensor | None = None

    def add(self, places: slice, block: LoweredBlock, beside: Beside) -> None:
        """Add the product of P with the base of a block, whose examples are these places of the batch."""
        if self._sums is None:
            n, _, columns = self._features.shape
            self._sums = self._features.new_zeros(n, block.weight.shape[1], columns)
            self._adding = BlockSums(self._projection, self._sums, self._first_k)
            for size in self._sizes:  # where blocks are joined does not depend on which group has the first such rows
                self._adding.expect(size)
        self._weight = block.weight
        if self._adding is not None:
            beside.run(partial(self._adding.add, places, block.base), reads=block)

    def expect(self, size: int) -> None:
        """The blocks that are added next have so many columns, whether or not they are of rows below the last call."""
        self._sizes.append(size)
        if self._adding is not None:
            self._adding.expect(size)

    def raise_into(self, beside: Beside) -> None:
        """Add W P h to the features, after all blocks; of an example without such rows, zeros, which change no bit."""
        if self._sums is not None and self._weight is not None and self._adding is not None:
            self._adding.finish()
            work = partial(raise_rows, self._features, self._weight, self._sums, beta=1)
            beside.run(work, reads=(self._weight, self._sums))
