"""The model under study: called in eval mode, differentiated, and left exactly as it was found."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from gradstore.errors import ProjectError
from gradstore.jacobians.contiguous_gradients import ContiguousGradients
from gradstore.jacobians.row_owners import ROUNDING, rounding_of
from gradstore.machine.devices import cudnn_as, full_float32, without_fused_encoders
from gradstore.model.model_state import WrittenBuffers, attributes_kept, unchanged

Inputs = Tensor | dict[str, Tensor]
Forward = Callable[[nn.Module, Any], Tensor]
Result = TypeVar("Result")


class Subject:
    """A model, how it is called, and which of its parameters are differentiated.

    Args:
        model: the user's module.
        forward: `(model, inputs) -> logits [n, classes]`; None calls `model(inputs)`.
        names: the differentiated parameters, by their first name.
    """

    def __init__(self, model: nn.Module, forward: Forward | None, names: Sequence[str]) -> None:
        self.model, self.forward = model, forward
        everything = dict(model.named_parameters())
        self.parameters: dict[str, Tensor] = {name: everything[name] for name in names}
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._rounding = 0.0
        self._written = WrittenBuffers(model)
        _require_trainable(everything)

    def logits(self, inputs: Inputs) -> Tensor:
        """Run the model once.

        Returns:
            [n, classes] in the model's dtype, part of the autograd graph where gradients are enabled.

        Raises:
            ProjectError: the output is not one row of floating-point logits per example.
        """
        with attributes_kept(self.model), self._written.fresh(), ContiguousGradients():
            output = self.model(inputs) if self.forward is None else self.forward(self.model, inputs)
        n = length(inputs)
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != n or not output.is_floating_point():
            got = f"{list(output.shape)} {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
            raise ProjectError(
                "the model's output is not logits",
                where="model",
                expected=f"a floating-point tensor [{n}, classes]",
                got=got.replace("torch.", ""),
                hint="Pass forward=lambda model, x: … to pick or reshape the logits",
            )
        return output

    def with_parameters(self, values: Mapping[str, Tensor], work: Callable[[Subject], Result]) -> Result:
        """Do something while the model has other values of some parameters.

        Args:
            values: by name, of the parameters' shapes.
            work: is given the subject that has them; the model is called, and its parameters differentiated, as ever.

        Returns:
            What `work` does.

        Raises:
            Exception: what `functional_call` or `work` raises; a scripted module's parameters cannot be exchanged.
        """
        other = copy.copy(self)
        other.parameters = {**self.parameters, **values}
        named = {f"model.{name}": value for name, value in values.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # cuDNN's, of recurrent layers whose weights lie apart
            return functional_call(_Around(self.model), named, (partial(work, other),))

    def rounding(self, logits: Tensor) -> float:
        """Relative difference that rounding may make between two passes that give these logits."""
        return max(self._rounding, rounding_of(self.model, logits))

    def look_at_dtypes(self, inputs: Inputs) -> None:
        """Learn in which dtypes the model computes, autocast or cast by itself, which `rounding` goes by from then on.

        Raises:
            ProjectError: as `logits`.
        """
        with _DtypesSeen() as seen:
            self.logits(inputs)
        self._rounding = max((ROUNDING.get(dtype, 0.0) for dtype in seen.dtypes), default=0.0)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside: eval mode, gradients on for the differentiated parameters only, full float32 precision.

        Encoders take the same way whether gradients are on or off.

        On leaving, training flags, `requires_grad`, buffers, random state and library settings are as before.
        """
        devices = {tensor.device for tensor in self.model.parameters()}
        gpus = sorted((device for device in devices if device.type == "cuda"), key=str)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=gpus))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            # cuDNN cannot differentiate a recurrent layer in eval mode
            stack.enter_context(cudnn_as(enabled=not self._recurrent, benchmark=False, deterministic=True))
            for kind in {device.type for device in devices}:
                stack.enter_context(full_float32(torch.device(kind)))
            stack.enter_context(without_fused_encoders())
            stack.enter_context(unchanged(self.model))
            stack.enter_context(_eval_mode(self.model))
            stack.enter_context(_gradients_only_for(self.model, {id(p) for p in self.parameters.values()}))
            yield


class _DtypesSeen(TorchFunctionMode):
    """Collects the dtypes of everything that carries a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.requires_grad:
            self.dtypes.add(output.dtype)
        return output


class _Around(nn.Module):
    """Calls anything at all while `functional_call` has the model's parameters exchanged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Result]) -> Result:
        return work()


def length(inputs: Inputs) -> int:
    """Number of examples in a batch."""
    return len(inputs) if isinstance(inputs, Tensor) else len(next(iter(inputs.values())))


def take(inputs: Inputs, index: slice | Tensor) -> Inputs:
    """Some examples of a batch."""
    if isinstance(inputs, Tensor):
        return _taken(inputs, index)
    return {key: _taken(value, index) for key, value in inputs.items()}


def _taken(tensor: Tensor, index: slice | Tensor) -> Tensor:
    if not tensor.is_sparse:
        return tensor[index]
    if isinstance(index, slice):
        index = torch.arange(len(tensor), device=tensor.device)[index]
    return tensor.index_select(0, index)


def as_inputs(inputs: Any) -> Inputs:
    """Check a batch: a Tensor, or a mapping of Tensors with one first axis.

    Returns:
        The batch, a mapping as a plain dict.

    Raises:
        ProjectError: it is something else, is empty, or its tensors disagree on the number of examples.
    """
    if isinstance(inputs, Tensor) and inputs.ndim and len(inputs):
        return inputs.clone() if inputs.is_inference() else inputs
    if isinstance(inputs, Mapping) and inputs and all(isinstance(v, Tensor) and v.ndim for v in inputs.values()):
        if len({len(value) for value in inputs.values()}) == 1 and length(dict(inputs)):
            return {key: value.clone() if value.is_inference() else value for key, value in inputs.items()}
        got = ", ".join(f"{key} {list(value.shape)}" for key, value in inputs.items())
        raise ProjectError("a batch's tensors differ in their number of examples", where="inputs", got=got)
    got = str(list(inputs.shape)) if isinstance(inputs, Tensor) else type(inputs).__name__
    raise ProjectError(
        "not a batch of examples", where="inputs", expected="a Tensor [n, …] or a dict of them, n ≥ 1", got=got
    )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def _gradients_only_for(model: nn.Module, wanted: set[int]) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _require_trainable(parameters: Mapping[str, Tensor]) -> None:
    made = next((name for name, parameter in parameters.items() if parameter.is_inference()), None)
    if made is not None:
        raise ProjectError(
            "the model was made in inference mode, so autograd cannot differentiate it",
            where=f"model, parameter {made}",
            expected="a parameter made outside torch.inference_mode()",
            hint="Build the model and load its weights outside of torch.inference_mode()",
        )
