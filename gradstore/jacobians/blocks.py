"""Blocks of the per-example Jacobian: some consecutive columns for all examples and classes of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


class JacobianBlock:
    """Columns `[start, start + size)` of the per-example Jacobian of one parameter.

    Attributes:
        name: the parameter's name.
        start: flat index of the first column; a parameter's first block starts at a multiple of 128.
        size: number of columns.
    """

    def __init__(self, name: str, start: int, size: int) -> None:
        self.name, self.start, self.size = name, start, size

    def dense(self) -> Tensor:
        """The values, [n, c, size] float32 contiguous. The block keeps them, so asking twice costs once."""
        raise NotImplementedError

    def sq_norm(self) -> Tensor:
        """Σ of the squared values of each row over these columns, [n, c] float64, summed in float64."""
        return torch.linalg.vector_norm(self.dense(), dim=-1, dtype=torch.float64).square()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, start={self.start}, size={self.size})"


class DenseBlock(JacobianBlock):
    """A block that is nothing but its values."""

    def __init__(self, name: str, start: int, values: Tensor) -> None:
        super().__init__(name, start, values.shape[-1])
        self._values = values

    def dense(self) -> Tensor:
        """The values, [n, c, size] float32 contiguous."""
        return self._values.float().contiguous()
