"""A fault of torch that makes the gradient of an example alone another than its gradient in a batch.

On a CPU, the backward pass of a batch or instance norm in eval mode that is given one image takes an output gradient
that is not contiguous, such as one that was transposed, for one that is channels-last, and permutes it: the gradient of
its input is then off by more than its own norm (torch 2.13 and 2.14, in float32 and float64).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NORMS = {F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm}


class ContiguousGradients(TorchFunctionMode):
    """Within: batch and instance norms are given contiguous output gradients, which have the same values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _NORMS and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(Tensor.contiguous)
        return output
