"""How an exact kernel is cut: within its memory, by classes where that saves work, and never with another result."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import SmallCNN
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import UsageError
from gradstore.jacobians import JacobianEngine
from gradstore.kernels.definitions import exact_kernel
from gradstore.kernels.exact.contraction import contract
from gradstore.kernels.exact.example_selection import Selection
from gradstore.kernels.exact.factors import held, joined_batches, joined_rows, rows_and_classes
from gradstore.kernels.exact.jacobian_plan import JacobianPlan, plan_jacobians
from gradstore.kernels.exact.jacobian_tiles import JacobianTiles
from gradstore.machine.byte_counts import parse_bytes
from gradstore.model.parameters import parameter_blocks

pytestmark = pytest.mark.numerical


@given(
    n=st.integers(1, 10**5),
    m=st.integers(1, 10**5),
    symmetric=st.booleans(),
    classes=st.integers(1, 40),
    divisible=st.booleans(),
    shared=st.integers(0, 10**6),
    each=st.integers(1, 10**6),
    memory=st.integers(10**5, 10**11),
)
def test_a_plan_keeps_its_budget(
    n: int, m: int, symmetric: bool, classes: int, divisible: bool, shared: int, each: int, memory: int
) -> None:
    m = n if symmetric else m

    def held(c: int) -> int:
        return shared + c * each

    def computing(examples: int, c: int) -> int:
        return examples * (2 * shared + 3 * c * each)

    try:
        plan = plan_jacobians(
            n,
            m,
            symmetric=symmetric,
            classes=classes,
            divisible=divisible,
            value=12,
            held=held,
            computing=computing,
            memory=memory,
        )
    except UsageError:
        least = 1 if divisible else classes
        assert memory < 7 * (computing(1, least) + 32 * held(least) + 16 * 16**2)
        return
    passing = plan.block if plan.group < max(n, m) else 0
    taken = (plan.group + passing) * held(plan.classes) + 12 * plan.group * plan.span
    assert taken + max(plan.scratch, computing(plan.batch, plan.classes)) <= memory
    assert plan.group % 16 == plan.span % 16 == plan.block % 16 == 0
    assert divisible or plan.classes == classes


@pytest.mark.parametrize("plan", [JacobianPlan(1, 32, 48, 16, 8, 10**5), JacobianPlan(4, 16, 16, 16, 16, 10**6)])
@pytest.mark.parametrize("b", [None, "test"])
def test_classes_that_come_in_parts_give_the_same_matrix(plan: JacobianPlan, b: str | None) -> None:
    torch.manual_seed(0)
    sizes = {"train": 70, "test": 25}
    splits = {name: TensorDataset(torch.randn(n, 1, 8, 8), torch.zeros(n).long()) for name, n in sizes.items()}
    project = gs.Project(model=SmallCNN(10), splits=splits)
    left = Selection.of(project, "train", None, "rows_a")
    right = left if b is None else Selection.of(project, b, None, "rows_b")
    tiles = JacobianTiles(project, left, right, exact_kernel("trntk"), 10**9, "cpu")
    assert (tiles.plan.classes, tiles.plan.group) == (10, 80), "all at once, where memory allows"
    tiles.plan = plan
    found = np.full(tiles.shape, np.nan)
    for tile in tiles.tiles():
        found[tile.start_a : tile.rows.stop, tile.start_b : tile.columns.stop] = tile.values
    expected = gs.exact_gram(project, "train", b)
    wanted = np.triu(np.ones(found.shape, bool)) if b is None else np.ones(found.shape, bool)
    np.testing.assert_allclose(found[wanted], expected[wanted], atol=1e-6)


def test_little_memory_takes_few_classes_at_a_time() -> None:
    def plan(memory: int) -> JacobianPlan:
        return plan_jacobians(
            10**4,
            10**4,
            symmetric=True,
            classes=10,
            divisible=True,
            value=12,
            held=lambda classes: 10**5 * (1 + classes),
            computing=lambda examples, classes: 10**5 * examples * (1 + classes),
            memory=memory,
        )

    assert plan(10**10).classes == 10
    assert plan(10**8).classes == 1


@pytest.mark.parametrize("n", [5, 100, 5000])
@pytest.mark.parametrize(("held", "computing"), [(10**3, 10**3), (10**3, 10**6), (10**5, 10**3), (10**5, 10**6)])
def test_the_memory_that_is_asked_for_is_enough(n: int, held: int, computing: int) -> None:
    def plan(memory: int) -> JacobianPlan:
        return plan_jacobians(
            n,
            n,
            symmetric=True,
            classes=10,
            divisible=True,
            value=12,
            held=lambda classes: held * (1 + classes),
            computing=lambda examples, classes: computing * examples * (1 + classes),
            memory=memory,
        )

    with pytest.raises(UsageError) as refused:
        plan(1)
    found = re.search(r"at least ([\d.]+ \w+)", str(refused.value))
    assert found is not None
    asked = parse_bytes(found.group(1))
    assert plan(asked).batch >= 1
    with pytest.raises(UsageError):
        plan(asked // 3)


def test_a_weight_that_comes_in_parts_is_joined_where_there_is_room() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 96, 3), nn.ReLU(), nn.Conv2d(96, 128, 3, stride=3), nn.Flatten(), nn.Linear(512, 5))
    model, images = nn.Sequential(*layers), torch.randn(6, 3, 8, 8)
    engine = JacobianEngine(model, parameter_blocks(model), example=images)
    results = []
    for room, count in ((10**9, 6), (1, 7)):
        blocks = joined_rows(map(held, engine(images)), room)
        assert len(blocks) == count
        out, squares = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
        sides = [[block] for block in blocks]
        for square in contract(list(zip(sides, sides, strict=True)), out, pairs=False, scratch=10**7):
            squares += square.sum(1)
        np.testing.assert_allclose(squares, out.diag(), rtol=1e-6)
        results.append(out.triu())
    np.testing.assert_allclose(results[0], results[1], atol=1e-6 * results[1].max())


class _SequenceFirst(nn.Module):
    """A linear layer whose input has the examples on its second axis, so that batches of it cannot be joined."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(inputs.transpose(0, 1)).relu().mean(0))


def _convolutional() -> nn.Module:
    layers = (nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 40, 3, stride=2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(160, 4))


def _embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.Flatten(), nn.Linear(20, 3))


@pytest.mark.parametrize(
    ("make", "inputs", "count"),
    [
        (_convolutional, torch.randn(7, 2, 6, 6), 1),
        (_embedding, torch.randint(0, 9, (7, 4)), 1),
        (_SequenceFirst, torch.randn(7, 4, 6), 3),
    ],
)
def test_joined_batches_give_the_same_products(make: Callable[[], nn.Module], inputs: torch.Tensor, count: int) -> None:
    torch.manual_seed(1)
    model = make().eval()
    engine = JacobianEngine(model, parameter_blocks(model), example=inputs)
    parts = [slice(0, 3), slice(3, 6), slice(6, 7)]
    apart = [[held(block) for block in engine(inputs[part])] for part in parts]
    results = []
    for batches in (apart, joined_batches([list(batch) for batch in apart])):
        columns = [list(same) for same in zip(*batches, strict=True)]
        assert [rows_and_classes(block)[0] for block in columns[0]] == ([7] if len(batches) == 1 else [3, 3, 1])
        out = torch.zeros(7, 7, dtype=torch.float64)
        contract([(same, same) for same in columns], out, pairs=False, scratch=10**7)
        results.append(out.triu())
    assert len(batches) == count
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6 * float(results[0].abs().max()))
