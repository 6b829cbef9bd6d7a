"""Whether the engine's gradients of a model are right: against looped autograd of the same weights in float64."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradstore.errors import ProjectError
from gradstore.jacobians import JacobianEngine
from gradstore.model.parameters import parameter_blocks

from .entry import CLASSES, Entry

RIGHT = 1e-5  # relative error of a float32 row
KINKS = 3.0  # times the error of autograd itself in the model's dtype that is no fault
SHARE = 1e-2  # of a row's norm, below which a parameter's error is not relative to its own
VALUES = 3e8  # of one Jacobian that are held
GENERIC = {"torch.func": "func", "autograd loop": "loop"}


@dataclass(frozen=True)
class Errors:
    """The largest relative errors over rows (example, class) against float64.

    Attributes:
        sq_norm: of ‖g‖².
        gradient: ‖g - g64‖ / ‖g64‖, which bounds what is typical of features, for these are linear in g.
        parameter: the same of one parameter, whose norm counts as at least a hundredth of the row's.
        worst: the parameter that `parameter` is of.
    """

    sq_norm: float
    gradient: float
    parameter: float
    worst: str


def rightness(entry: Entry, seed: int = 0, most: int = 6) -> dict[str, Any]:
    """Differentiate a few examples by the engine and by looped autograd in float64.

    Returns:
        A row: outcome ("right", "right at a kink", "wrong", "refused", "crash"), why, errors, and shares of the
        parameters by route.
    """
    model = entry.model(seed)
    size = sum(p.numel() for p in model.parameters())
    n = int(max(2, min(most, VALUES / (CLASSES * size))))
    row: dict[str, Any] = {"parameters": size, "rows_checked": n}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = entry.batch(n)
    try:
        engine = JacobianEngine(model, parameter_blocks(model), forward=entry.forward, example=inputs)
        stream = engine(inputs)
        row |= routes(model, engine) | {"batch_audit": "passed" if stream.trusted else "failed: loops"}
        truth = reference(entry, seed, n)
        errors = compared(truth, ((b.name, b.dense(), b.sq_norm()) for b in stream))
    except ProjectError as error:
        return row | {"outcome": "refused", "why": " ".join(str(error).split())}
    except Exception as error:
        return row | {"outcome": "crash", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    itself = compared(truth, autograds_own(entry, seed, n))
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    row |= {f"error_{key}": value for key, value in asdict(errors).items()}
    row |= {f"autograd_error_{key}": value for key, value in asdict(itself).items() if key != "worst"}
    return row | judged(entry, errors, itself, changed)


def judged(entry: Entry, ours: Errors, itself: Errors, changed: list[str]) -> dict[str, str]:
    """The outcome, and why where it is not plain."""
    if changed:
        return {"outcome": "wrong", "why": f"the model is left altered: {', '.join(changed[:3])}"}
    whole = max(ours.gradient, ours.sq_norm / 2)
    limit = KINKS * max(itself.gradient, itself.sq_norm / 2)
    part = ours.parameter <= max(10 * RIGHT, KINKS * itself.parameter)
    if part and whole <= RIGHT:
        return {"outcome": "right", "why": ""}
    if part and whole <= limit:
        word = "within the rounding of its dtype" if entry.dtype != torch.float32 else "at a kink"
        return {"outcome": "right", "why": f"{word}: autograd's own error is {itself.gradient:.1g}"}
    return {"outcome": "wrong", "why": f"{ours.worst}: {ours.parameter:.1g}, autograd's own {itself.parameter:.1g}"}


def routes(model: nn.Module, engine: JacobianEngine) -> dict[str, Any]:
    """Shares of the parameters by route, and the reasons of generic routes by kind of parameter."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    shares: dict[str, int] = dict.fromkeys(("structured", "func", "loop"), 0)
    reasons: dict[tuple[str, str], int] = defaultdict(int)
    for name, route in engine.describe():
        way = next((short for words, short in GENERIC.items() if route.startswith(words)), "structured")
        shares[way] += sizes[name]
        if way != "structured":
            reasons[route, kind(model, name)] += sizes[name]
    total = sum(sizes.values())
    listed = sorted(reasons.items(), key=lambda item: -item[1])
    return {
        **{f"share_{way}": round(size / total, 4) for way, size in shares.items()},
        "reasons": "; ".join(f"{what} {100 * size / total:.2g} %: {why}" for (why, what), size in listed),
    }


def kind(model: nn.Module, name: str) -> str:
    """The class of the module that has a parameter, and the parameter's name there."""
    path, _, leaf = name.rpartition(".")
    owner = dict(model.named_modules())[path]  # of a script too, which has no `get_submodule`
    return f"{getattr(owner, 'original_name', type(owner).__name__)}.{leaf}"


def looped(entry: Entry, seed: int, n: int, wide: bool) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """(example, class, gradient of every parameter), one example and one class at a time."""
    model, inputs = entry.model(seed, wide), entry.batch(n, wide=wide)
    parameters = {name: p.requires_grad_() for name, p in model.named_parameters()}
    for i in range(n):
        one = inputs[i : i + 1] if isinstance(inputs, Tensor) else {key: v[i : i + 1] for key, v in inputs.items()}
        with _PlainGradients():
            logits = (model(one) if entry.forward is None else entry.forward(model, one))[0]
        for c, logit in enumerate(logits):
            # kept for the next example too: some models keep a piece of it, such as LeViT's biases
            found = torch.autograd.grad(logit, list(parameters.values()), retain_graph=True, allow_unused=True)
            yield i, c, {name: _dense(g, p) for (name, p), g in zip(parameters.items(), found, strict=True)}


class _PlainGradients(TorchFunctionMode):
    """Batch norms are given gradients that are contiguous.

    Of a batch of one whose gradient is transposed (`norm(x).flatten(2).transpose(1, 2)`, as in LeViT), PyTorch's CPU
    code gives another input gradient in eval mode than finite differences do (seen in 2.13 and 2.14).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (F.batch_norm, torch.batch_norm) and out.requires_grad:
            out.register_hook(Tensor.contiguous)
        return out


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros(parameter.numel())
    return (gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)


def reference(entry: Entry, seed: int, n: int) -> tuple[dict[str, Tensor], Tensor]:
    """float64 autograd: per parameter [n, c, size], kept in float32; and ‖g‖² [n, c] in float64."""
    kept: dict[str, Tensor] = {}
    norms = torch.zeros(n, CLASSES, dtype=torch.float64)
    for i, c, gradients in looped(entry, seed, n, wide=True):
        for name, gradient in gradients.items():
            kept.setdefault(name, torch.empty(n, CLASSES, gradient.numel()))[i, c] = gradient.float()
            norms[i, c] += gradient.double().square().sum()
    return kept, norms


def compared(reference: tuple[dict[str, Tensor], Tensor], blocks: Iterable[tuple[str, Tensor, Tensor]]) -> Errors:
    """Compare blocks (name, values [n, c, size], ‖values‖² [n, c]), a parameter's in order, with the reference."""
    truth, norms = reference
    whole, sq_norm = torch.zeros_like(norms), torch.zeros_like(norms)
    each: dict[str, Tensor] = defaultdict(lambda: torch.zeros_like(norms))
    done: dict[str, int] = defaultdict(int)
    for name, values, squares in blocks:
        first = done[name]
        done[name] += values.shape[-1]
        difference = _squares(values - truth[name][..., first : done[name]])
        each[name] += difference
        whole += difference
        sq_norm += squares
    if {name: t.shape[-1] for name, t in truth.items() if t.shape[-1]} != dict(done):
        raise AssertionError("blocks are missing")
    floor = SHARE * norms.sqrt()
    parts = {n_: float(_ratio(error.sqrt(), _squares(truth[n_]).sqrt() + floor)) for n_, error in each.items()}
    worst = max(parts, key=lambda name: parts[name] if parts[name] == parts[name] else float("inf"))
    return Errors(
        float(_ratio((sq_norm - norms).abs(), norms)), float(_ratio(whole.sqrt(), norms.sqrt())), parts[worst], worst
    )


def autograds_own(entry: Entry, seed: int, n: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What looped autograd gives in the model's own dtype, as blocks."""
    found: dict[str, Tensor] = {}
    for i, c, gradients in looped(entry, seed, n, wide=False):
        for name, gradient in gradients.items():
            found.setdefault(name, torch.empty(n, CLASSES, gradient.numel()))[i, c] = gradient.float()
    return ((name, values, _squares(values)) for name, values in found.items())


def _squares(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64).square()


def _ratio(error: Tensor, size: Tensor) -> Tensor:
    """The largest error over size; a row of zeros that is right has none."""
    return torch.where((error == 0) & (size == 0), 0.0, error / size).max()
