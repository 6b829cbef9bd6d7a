"""The flat parameter layout: order, alignment, ties, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import CASES, HARD_CASES, Case, TiedAutoencoder, mlp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradstore.errors import ProjectError
from gradstore.model.parameters import ALIGNMENT, ParameterBlock, parameter_blocks

SHAPES = st.lists(st.lists(st.integers(0, 20), max_size=3).map(tuple), min_size=1, max_size=8)


@pytest.mark.parametrize("case", CASES + HARD_CASES, ids=lambda case: case.name)
def test_blocks_follow_named_parameters_and_do_not_overlap(case: Case):
    model = case.model()
    blocks = parameter_blocks(model)
    assert [(b.name, b.shape) for b in blocks] == [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert blocks[0].start == 0
    for before, after in itertools.pairwise(blocks):
        assert after.start % ALIGNMENT == 0
        assert 0 <= after.start - before.stop < ALIGNMENT


@given(SHAPES)
def test_sizes_and_starts_for_any_shapes(shapes: list[tuple[int, ...]]):
    model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
    blocks = parameter_blocks(model)
    assert [b.size for b in blocks] == [math.prod(shape) for shape in shapes]
    expected = 0
    for block in blocks:
        assert block.start == expected
        expected += 128 * math.ceil(block.size / 128)


def test_a_tied_parameter_counts_once_under_its_first_name():
    names = [block.name for block in parameter_blocks(TiedAutoencoder())]
    assert "embed.weight" in names
    assert "decode.weight" not in names


def test_the_pattern_matches_whole_names_and_ignores_requires_grad():
    model = mlp().requires_grad_(False)
    assert parameter_blocks(model, r"4\..*") == (
        ParameterBlock("4.weight", (3, 7), 0),
        ParameterBlock("4.bias", (3,), 128),
    )
    with pytest.raises(
        ProjectError, match=r"no parameter of the model matches \(got 'weight'\)\. The model has 0\.weight"
    ):
        parameter_blocks(model, "weight")


@pytest.mark.parametrize(
    ("model", "pattern", "message"),
    [
        (nn.ReLU(), ".*", "The model has no parameters at all"),
        (mlp(), "(", "parameters=: not a regular expression"),
        (nn.LazyLinear(3), ".*", "weight: the parameter has no shape yet"),
        (
            nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)]),
            ".*",
            r"0: the parameter cannot be differentiated \(expected a real floating-point tensor, got int8\)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_laid_out_is_refused(model: nn.Module, pattern: str, message: str):
    with pytest.raises(ProjectError, match=message):
        parameter_blocks(model, pattern)
