"""Random networks of all layers that rules know: every value of the engine is that of looped autograd in float64.

A network that fails is named by its seed; `python tests/jacobians/test_random_networks.py SEED` shows it and tries it
again.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from random_networks import Drawn, cast, draw
from torch import Tensor

from gradstore.errors import ProjectError
from gradstore.jacobians import JacobianEngine
from gradstore.jacobians.footprint import MAX_COLUMNS
from gradstore.model.parameters import parameter_blocks

pytestmark = [
    pytest.mark.soak,
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

SHARES = 10
# Of a parameter's gradient for one example and class, and of the whole gradient: what cancels has no digits of its own.
# Values are stored in float32, so a float64 model is right to float32's last digit.
TOLERANCE = {torch.float64: (3e-7, 1e-11), torch.float32: (2e-4, 2e-5), torch.bfloat16: (0.1, 0.1)}
ALL_BY_RULES = 0.9  # share of the networks that rules are meant for: 0.98 of 5,000, which a few tens come near to


def differentiated(drawn: Drawn) -> list[str]:
    return [block.name for block in parameter_blocks(drawn.model, drawn.parameters)]


def looped(drawn: Drawn, *, exact: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [n, classes] and by name the Jacobian of the layout, [n, c, size]: one example and one class at a time.

    Computed in float64, or in the model's own dtypes.
    """
    model = drawn.exact if exact else copy.deepcopy(drawn.model).eval()
    names, batch = differentiated(drawn), cast(drawn.batch, torch.float64) if exact else drawn.batch
    parameters = dict(model.named_parameters())
    n = len(batch if isinstance(batch, Tensor) else batch[next(iter(batch))])
    jacobian = {name: torch.zeros(n, drawn.classes, parameters[name].numel(), dtype=torch.float64) for name in names}
    logits = []
    for i in range(n):
        one = batch[i : i + 1] if isinstance(batch, Tensor) else {key: value[i : i + 1] for key, value in batch.items()}
        output = model(one)[0]
        logits.append(output.detach())
        for c in range(drawn.classes):
            wanted = [parameters[name] for name in names]
            found = torch.autograd.grad(output[c], wanted, retain_graph=True, allow_unused=True)
            for name, gradient in zip(names, found, strict=True):
                if gradient is not None:
                    jacobian[name][i, c] = (gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)
    if drawn.layout == "sum":
        jacobian = {name: values.sum(1, keepdim=True) for name, values in jacobian.items()}
    return torch.stack(logits), jacobian


def gathered(stream: Any) -> dict[str, Tensor]:
    """The blocks of a stream put together, by name."""
    pieces: dict[str, list[Tensor]] = {}
    for block in stream:
        pieces.setdefault(block.name, []).append(block.dense())
    return {name: torch.cat(parts, -1) for name, parts in pieces.items()}


def streamed(engine: JacobianEngine, drawn: Drawn, rng: Random) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from the engine, all classes at once or some after others."""
    cut = rng.randint(0, drawn.classes) if drawn.layout == "per-class" else 0
    if rng.random() < 0.6 or cut in (0, drawn.classes):
        stream = engine(drawn.batch)
        return stream.logits, gathered(stream)
    first = engine(drawn.batch, slice(0, cut))
    head = gathered(first)
    rest = engine(drawn.batch, slice(cut, None), trusted=first.trusted)
    tail = gathered(rest)
    return rest.logits, {name: torch.cat([head[name], tail[name]], 1) for name in head}


def alone(engine: JacobianEngine, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from an engine that is given one example at a time."""
    inputs = drawn.batch
    n = len(inputs if isinstance(inputs, Tensor) else inputs[next(iter(inputs))])
    streams = []
    for i in range(n):
        one = inputs[i : i + 1] if isinstance(inputs, Tensor) else {k: v[i : i + 1] for k, v in inputs.items()}
        stream = engine(one)
        streams.append((stream.logits, gathered(stream)))
    logits, found = zip(*streams, strict=True)
    return torch.cat(logits), {name: torch.cat([one[name] for one in found]) for name in found[0]}


def wrong(seed: int) -> tuple[list[str], bool | None]:
    """What is wrong with the network of a seed, and whether rules serve it all (None: they are not meant to)."""
    rng = Random(~seed)
    with mock.patch.dict(MAX_COLUMNS, cpu=rng.choice([1 << 16, 1 << 16, 7])):
        return _wrong(draw(seed), rng)


def _wrong(drawn: Drawn, rng: Random) -> tuple[list[str], bool | None]:
    before = {name: value.clone() for name, value in drawn.model.state_dict().items()}
    by_itself = rng.random() < 0.15
    try:
        engine = JacobianEngine(
            drawn.model,
            parameter_blocks(drawn.model, drawn.parameters),
            example=drawn.probe,
            layout=drawn.layout,
            alone=by_itself,
        )
    except ProjectError as error:
        return [f"refused: {error}"], None
    needed = engine.bytes_needed(4)
    logits, ours = alone(engine, drawn) if by_itself else streamed(engine, drawn, rng)
    complaints = [] if engine.bytes_needed(4) == needed > 0 else ["bytes_needed changed"]
    now = drawn.model.state_dict()
    complaints += [f"{name} was changed" for name, value in before.items() if not torch.equal(value, now[name])]
    complaints += unequal(drawn, logits, ours)
    return complaints, not engine.generic() if drawn.served_by_rules else None


def unequal(drawn: Drawn, logits: Tensor, ours: dict[str, Tensor]) -> list[str]:
    """Where values are not those of looped autograd."""
    exact_logits, jacobian = looped(drawn)
    own, of_whole = TOLERANCE[drawn.dtype]
    whole = torch.stack([values.square().sum(-1) for values in jacobian.values()]).sum(0).sqrt()
    found = []
    if not float((logits - exact_logits).norm()) <= own * (1 + float(exact_logits.norm())):
        found.append("logits")
    for name, values in jacobian.items():
        error = (ours[name].double() - values).norm(dim=-1)
        if bool((error <= own * values.norm(dim=-1) + of_whole * whole).all()):
            continue
        if drawn.dtype is torch.float64 or not float(error.max()) <= 4 * rounded(drawn, name, values):
            found.append(f"{name}: error {float(error.max()):.2g} of {float(values.norm(dim=-1).max()):.2g}")
    return found


def rounded(drawn: Drawn, name: str, exact: Tensor) -> float:
    """How far autograd itself is off in the model's own dtypes: some of these networks magnify every rounding."""
    return float((looped(drawn, exact=False)[1][name] - exact).norm(dim=-1).max())


@pytest.mark.parametrize("share", range(SHARES))
def test_random_networks_are_differentiated_right(share: int, amount: Callable[[int, int], int]) -> None:
    served = []
    for seed in range(share, amount(300, 5000), SHARES):
        complaints, by_rules = wrong(seed)
        assert not complaints, f"the network of seed {seed}: {'; '.join(complaints)}"
        served += [] if by_rules is None else [by_rules]
    assert sum(served) >= ALL_BY_RULES * len(served)


@pytest.mark.parametrize("seed", [3, 19])
def test_a_network_is_a_function_of_its_seed(seed: int) -> None:
    one, other = draw(seed), draw(seed)
    assert str(one.model) == str(other.model)
    assert (one.parameters, one.layout, one.dtype) == (other.parameters, other.layout, other.dtype)
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_value_that_is_wrong_by_little_is_seen() -> None:
    drawn = next(drawn for drawn in map(draw, range(100)) if drawn.dtype is torch.float64)
    logits, jacobian = looped(drawn)
    assert not unequal(drawn, logits, jacobian)
    name = max(jacobian, key=lambda name: float(jacobian[name].norm()))
    jacobian[name][-1, -1] *= 1.0001
    assert len(unequal(drawn, logits, jacobian)) == 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    seed = int(sys.argv[1])
    shown = draw(seed)
    print(shown.model, shown.parameters, shown.layout, shown.dtype, sep="\n")
    engine = JacobianEngine(shown.model, parameter_blocks(shown.model, shown.parameters), example=shown.probe)
    print(*engine.describe(), *wrong(seed), sep="\n")
