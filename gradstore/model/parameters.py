"""The flat parameter index: where each differentiated parameter begins in the columns of the projection.

The order is that of `named_parameters()`, a tied parameter counts once, each tensor is flattened row-major, and each
starts at the next multiple of 128, so a layer always begins on a fresh counter of the random generator.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from gradstore.errors import ProjectError

ALIGNMENT = 128


@dataclass(frozen=True)
class ParameterBlock:
    """One parameter tensor and its place among the flat columns.

    Attributes:
        name: its first name in `model.named_parameters()`.
        shape: the tensor's shape; `()` for a scalar.
        start: flat index of its first element, a multiple of 128.
    """

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Number of elements, that is of columns."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """Flat index after the last element."""
        return self.start + self.size


def parameter_blocks(model: nn.Module, pattern: str = ".*") -> tuple[ParameterBlock, ...]:
    """Lay out the parameters whose whole name matches a regular expression.

    `requires_grad` is ignored: the pattern alone decides what is differentiated. Buffers are never included.

    Args:
        model: any module; only its parameters' names, shapes and dtypes are looked at.
        pattern: matched against the whole name (`re.fullmatch`).

    Returns:
        The blocks in order, their starts increasing.

    Raises:
        ProjectError: the pattern is not a regular expression or matches nothing, or a matching parameter is not a
            real floating-point tensor of known shape.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ProjectError(
            "not a regular expression", where="parameters=", got=repr(pattern), hint=str(error).capitalize()
        ) from error
    blocks: list[ParameterBlock] = []
    for name, parameter in model.named_parameters():
        if wanted.fullmatch(name):
            _require_differentiable(name, parameter)
            start = -(-blocks[-1].stop // ALIGNMENT) * ALIGNMENT if blocks else 0
            blocks.append(ParameterBlock(name, tuple(parameter.shape), start))
    if not blocks:
        names = [name for name, _ in model.named_parameters()]
        raise ProjectError(
            "no parameter of the model matches",
            where="parameters=",
            got=repr(pattern),
            hint=f"The model has {_some(names)}" if names else "The model has no parameters at all",
        )
    return tuple(blocks)


def _require_differentiable(name: str, parameter: nn.Parameter) -> None:
    if is_lazy(parameter):
        raise ProjectError(
            "the parameter has no shape yet", where=name, hint="Run the model once on an example to initialise it"
        )
    if not parameter.is_floating_point():
        raise ProjectError(
            "the parameter cannot be differentiated",
            where=name,
            expected="a real floating-point tensor",
            got=str(parameter.dtype).removeprefix("torch."),
            hint="Leave it out with parameters=",
        )


def _some(names: list[str], limit: int = 6) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
