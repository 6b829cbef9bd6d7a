"""`JacobianEngine`: the per-example Jacobian of any classifier, streamed one block of parameters at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradstore.errors import UsageError
from gradstore.jacobians.blocks import DenseBlock, JacobianBlock
from gradstore.jacobians.exact import by_loop, by_torch_func
from gradstore.jacobians.subject import Forward, Inputs, Subject, as_inputs
from gradstore.parameters import ParameterBlock

LAYOUTS = ("per-class", "sum")


class JacobianStream:
    """The Jacobian of one batch: its logits at once, its blocks one at a time and once only.

    Attributes:
        logits: [n, classes] float32.
    """

    def __init__(self, logits: Tensor, blocks: Iterator[JacobianBlock]) -> None:
        self.logits, self._blocks = logits, blocks

    def __iter__(self) -> Iterator[JacobianBlock]:
        return self._blocks


class JacobianEngine:
    """Computes `g^c(x) = ∂ logits_c(x) / ∂θ` for every example and class of a batch.

    Args:
        model: the classifier; used in eval mode and left as it was found.
        blocks: the parameters to differentiate, from `parameter_blocks`.
        forward: `(model, inputs) -> logits [n, classes]`; None calls `model(inputs)`.
        layout: "per-class" gives c = classes rows an example, "sum" gives their sum, c = 1.
        example: a batch of at least one example, on the model's device.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[ParameterBlock],
        *,
        forward: Forward | None = None,
        layout: str = "per-class",
        example: Any,
    ) -> None:
        if layout not in LAYOUTS:
            raise UsageError("unknown layout", where="layout=", expected=f"one of {LAYOUTS}", got=repr(layout))
        self._blocks, self._layout = tuple(blocks), layout
        self._subject = Subject(model, forward, [block.name for block in self._blocks])
        with self._subject.ready():
            self._route = self._choose(as_inputs(example))

    def _choose(self, example: Inputs) -> Callable[..., list[Tensor]]:
        logits = self._subject.logits(example)
        try:
            by_torch_func(self._subject, [self._blocks[-1].name], example, torch.ones_like(logits[:1]))
        except RuntimeError:
            return by_loop
        return by_torch_func

    def describe(self) -> list[tuple[str, str]]:
        """How each parameter is differentiated: rows (parameter name, route)."""
        return [(block.name, self._route.__name__) for block in self._blocks]

    def __call__(self, inputs: Any) -> JacobianStream:
        """Run the model on a batch.

        Args:
            inputs: Tensor [n, …] or dict of Tensors with first axis n, on the model's device.

        Returns:
            A stream of blocks [n, c, size] in parameter order.
        """
        inputs = as_inputs(inputs)
        with self._subject.ready(), torch.no_grad():
            logits = self._subject.logits(inputs)
        if self._layout == "sum":
            cotangents = torch.ones_like(logits[:1])
        else:
            cotangents = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        return JacobianStream(logits.float(), self._stream(inputs, cotangents))

    def _stream(self, inputs: Any, cotangents: Tensor) -> Iterator[JacobianBlock]:
        for block in self._blocks:
            with self._subject.ready():
                (values,) = self._route(self._subject, [block.name], inputs, cotangents)
            yield DenseBlock(block.name, block.start, values)
