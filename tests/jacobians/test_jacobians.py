"""The streamed Jacobian equals looped autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, HARD_CASES, Case, rows
from torch import Tensor, nn

from gradstore.jacobians import JacobianEngine
from gradstore.model.parameters import parameter_blocks

pytestmark = [pytest.mark.numerical, pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")]
ALL = pytest.mark.parametrize("case", CASES + HARD_CASES, ids=lambda case: case.name)


def looped(case: Case, model: nn.Module, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [n, c] and, per parameter, the Jacobian [n, c, size], one example and one class at a time."""
    names = [block.name for block in parameter_blocks(model, case.parameters)]
    named = dict(model.named_parameters())
    n = len(inputs if isinstance(inputs, Tensor) else next(iter(inputs.values())))
    jacobian = {name: torch.zeros(n, case.classes, named[name].numel(), dtype=torch.float64) for name in names}
    logits = []
    for i in range(n):
        output = case.logits(model, rows(inputs, i, i + 1))[0]
        logits.append(output.detach())
        for c in range(case.classes):
            gradients = torch.autograd.grad(output[c], [named[k] for k in names], retain_graph=True, allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    jacobian[name][i, c] = gradient.reshape(-1)
    return torch.stack(logits), jacobian


def streamed(case: Case, model: nn.Module, inputs: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from the engine, its blocks put together."""
    blocks = parameter_blocks(model, case.parameters)
    stream = JacobianEngine(model, blocks, forward=case.forward, example=inputs, **options)(inputs)
    pieces: dict[str, list[Tensor]] = {block.name: [] for block in blocks}
    place = {block.name: block.start for block in blocks}
    for block in stream:
        values = block.dense()
        assert (values.dtype, values.is_contiguous()) == (torch.float32, True)
        assert block.start == place[block.name]
        assert values.shape[-1] == block.size
        place[block.name] += block.size
        pieces[block.name].append(values)
    return stream.logits, {name: torch.cat(parts, -1) for name, parts in pieces.items()}


def relative(ours: Tensor, reference: Tensor) -> float:
    """Largest error of a row over that row's norm."""
    error = (ours.double() - reference).norm(dim=-1)
    return (error / reference.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)).max().item()


def whole(jacobian: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(jacobian.values()), -1)


@ALL
def test_float32_jacobian_equals_looped_float64(case: Case):
    logits, reference = looped(case, case.model(dtype=torch.float64), case.batch(dtype=torch.float64))
    ours, jacobian = streamed(case, case.model(), case.batch())
    torch.testing.assert_close(ours, logits.float(), rtol=1e-5, atol=1e-5)
    assert relative(whole(jacobian), whole(reference)) < 1e-5


@ALL
def test_each_parameter_of_a_float64_model(case: Case):
    model, inputs = case.model(dtype=torch.float64), case.batch(dtype=torch.float64)
    _, reference = looped(case, model, inputs)
    _, jacobian = streamed(case, model, inputs)
    scale = whole(reference).norm(dim=-1)
    for name, values in reference.items():
        error = (jacobian[name].double() - values).norm(dim=-1)
        assert (error <= 1e-6 * values.norm(dim=-1) + 1e-10 * scale).all(), name


@ALL
def test_layout_sum_is_the_sum_over_classes(case: Case):
    _, reference = looped(case, case.model(dtype=torch.float64), case.batch(dtype=torch.float64))
    _, jacobian = streamed(case, case.model(), case.batch(), layout="sum")
    assert relative(whole(jacobian), whole(reference).sum(1, keepdim=True)) < 1e-5
