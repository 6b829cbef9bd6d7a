"""What each torch function does with a parameter: its gradient from the function's input and output gradient.

A rule has the signature of the function it stands for and returns a `Use`, or None where the call is not of a kind that
it covers; the parameter is then left to a generic route. Rules look at functions, not at modules, so a weight used
through `torch.nn.functional`, by two modules, or inside multi-head attention is seen like any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from gradstore.jacobians.arithmetic_rules import ARITHMETIC
from gradstore.jacobians.contraction_rules import CONTRACTIONS
from gradstore.jacobians.layer_rules import LAYERS
from gradstore.jacobians.recurrent import hidden_part, hidden_rule
from gradstore.jacobians.uses import Use

RULES: dict[Any, Callable[..., Use | None]] = {
    **LAYERS,
    **CONTRACTIONS,
    **ARITHMETIC,
    hidden_part: hidden_rule,
}
"""The rule of each function that may take a parameter."""

ARGUMENTS = {rule: list(inspect.signature(rule).parameters) for rule in RULES.values()}
"""The names of each rule's arguments, by which its terms are known."""
