"""Whether logits are just what one call of `F.linear` gave: then all that is below it goes through its inputs.

Noted while the model runs, since afterwards a graph does not tell a weight from what is made of other parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LastCall:
    """A call ``output = inputs weightᵀ + bias``, whose weight and bias no graph leads to.

    Attributes:
        inputs: z [n, d], in the graph.
        weight: W [c, d], detached.
        output: [n, c].
        tap: the number of the call among the noted ones; None where it has no differentiated parameter.
        versions: version counters of inputs, weight and output, once the call was made.
    """

    inputs: Tensor
    weight: Tensor
    output: Tensor
    tap: int | None
    versions: tuple[int, ...]

    def gave(self, logits: Tensor) -> bool:
        """Whether these logits are its output, and nothing of the three was changed in place since."""
        return logits is self.output and self.versions == _versions(self.inputs, self.weight, self.output)


def last_call(
    args: Sequence[Any], kwargs: Mapping[str, Any], output: Any, tap: int | None, detached: Callable[[Tensor], bool]
) -> LastCall | None:
    """Note a call of `F.linear`.

    Args:
        args: of the call.
        kwargs: of the call.
        output: what it gave, in the graph.
        tap: its number among the noted calls, if it is one.
        detached: whether a parameter was kept out of the graph in this call.

    Returns:
        None where the graph leads to the weight or bias, where the inputs are not rows, or where dtypes differ.
    """
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
    z, weight, bias = named["input"], named["weight"], named.get("bias")
    if any(tensor.ndim != 2 for tensor in (z, weight, output)):
        return None
    if not z.dtype == weight.dtype == output.dtype:  # under autocast the weight is another than the parameter
        return None
    if any(isinstance(p, Tensor) and p.requires_grad and not detached(p) for p in (weight, bias)):
        return None
    return LastCall(z, weight.detach(), output, tap, _versions(z, weight, output))


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors if not torch.is_inference(tensor))
