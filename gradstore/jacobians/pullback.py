"""From a recorded forward pass to the terms of each parameter's Jacobian: one vector-Jacobian product per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor

from gradstore.jacobians.by_autograd import vectorised_grad
from gradstore.jacobians.forward_record import Recording, Tap
from gradstore.jacobians.row_owners import candidates, fits, owned, row_errors, weights
from gradstore.jacobians.side_by_side import side_by_side, uncut_if_small
from gradstore.jacobians.terms import Term, ViewedTerm
from gradstore.jacobians.uses import Batch, wide
from gradstore.jacobians.weight_functions import PulledBack, RootTerm
from gradstore.machine.out_of_memory import is_out_of_memory


@dataclass
class Pulled:
    """The outcome for one batch.

    Attributes:
        terms: per parameter, one term per use; absent where the logits do not depend on the parameter.
        unsafe: parameters whose terms must not be used for this batch, with the reason.
    """

    terms: dict[str, list[Term]] = field(default_factory=dict)
    unsafe: dict[str, str] = field(default_factory=dict)

    def distrust(self, tap: Tap, reason: str) -> None:
        """Mark every parameter of a call."""
        self.unsafe.update(dict.fromkeys(tap.roots, reason))


def pull_back(
    recording: Recording,
    arrangements: Sequence[str],
    parameters: Mapping[str, Tensor],
    cotangents: Tensor,
    audited: Tensor | None,
    tolerance: float,
    at_once: int = 1,
) -> Pulled:
    """Differentiate the logits class by class with respect to the noted outputs, never to parameters, and audit.

    Args:
        recording: the forward pass; its graph is freed.
        arrangements: how each tap's rows are assigned to examples.
        parameters: the noted parameters.
        cotangents: [c, classes]; row k makes column k of the Jacobian.
        audited: those that the audit combines: these, or all where the others will be asked for without one; None for
            a batch whose audit was passed.
        tolerance: relative difference that rounding may make.
        at_once: classes whose backward passes are vectorised into one.

    Returns:
        The terms of each parameter. Holds every tap's input, its delta or small gradient for all c, and for each of at
        most `side_by_side.MOST` threads the deltas of `at_once` classes two to three times over.
    """
    summed = audited is cotangents
    factors = weights(len(cotangents), cotangents.new_empty(0, device="cpu")) if summed else None
    pulled, totals = absorb(recording, arrangements, parameters, cotangents, factors, at_once)
    if audited is None:
        return pulled
    combined = weights(len(audited), audited) @ audited
    if not summed:
        totals = [delta[0] for delta in _deltas(recording, combined[None])]
    with uncut_if_small(sum(total.nbytes for total in totals)):
        audit(recording, arrangements, parameters, totals, combined, tolerance, pulled)
    return pulled


def absorb(
    recording: Recording,
    arrangements: Sequence[str],
    parameters: Mapping[str, Tensor],
    cotangents: Tensor,
    factors: Tensor | None,
    at_once: int,
) -> tuple[Pulled, list[Tensor]]:
    """Differentiate class by class and let the terms take the deltas.

    Args:
        recording: a forward pass, or what led to the inputs of its last call in place of the logits; its graph is kept.
        arrangements: how each tap's rows are assigned to examples.
        parameters: the noted parameters.
        cotangents: [c, classes].
        factors: of a sum of all classes' deltas, for an audit, [c]; None for no sum.
        at_once: classes whose backward passes are vectorised into one.

    Returns:
        The terms, and the sum by tap.
    """
    pulled, n = Pulled(), len(recording.logits)
    makers = [
        _terms(tap, how, n, len(cotangents), parameters, pulled)
        for tap, how in zip(recording.taps, arrangements, strict=True)
    ]
    parts = class_parts(len(cotangents), at_once)

    def pull_part(part: range, totals: list[Tensor]) -> list[Tensor]:
        """Absorb some classes, whose deltas are gone when the next ones' are made, and add to their weighted sum."""
        deltas = _deltas(recording, cotangents[part.start : part.stop])
        for tap, how, terms, delta in zip(recording.taps, arrangements, makers, deltas, strict=True):
            _absorb(tap, terms, part.start, delta, n, how, pulled)
        return totals if factors is None else _added(totals, deltas, factors[part.start : part.stop])

    def pull(numbers: range) -> list[Tensor]:
        """Absorb some parts of the classes; their deltas' weighted sum where it is audited."""
        totals: list[Tensor] = []
        for number in numbers:
            totals = pull_part(parts[number], totals)
        return totals

    totals: list[Tensor] = []
    for part in side_by_side(pull, len(parts), cotangents.device, uncut=at_once > 1):
        totals = [total.add_(more) for total, more in zip(totals, part, strict=True)] if totals else part
    _pull_to_roots(recording, parameters, pulled)
    return pulled, totals


def class_parts(classes: int, at_once: int) -> list[range]:
    """Cut the classes into parts of at most so many, of which every other one makes a half of the work, for a thread.

    Returns:
        The parts, which depend on no number of threads, since bits depend on them.
    """
    if at_once >= classes:
        return [range(classes)]
    middle = -(-classes // 2)
    halves = []
    for first, last in ((0, middle), (middle, classes)):
        count = -(-(last - first) // at_once)
        cuts = [first + (last - first) * k // count for k in range(count + 1)]
        halves.append([range(*pair) for pair in pairwise(cuts)])
    return [part for pair in zip_longest(*halves) for part in pair if part is not None]


def arrange(recording: Recording, cotangent: Tensor, tolerance: float) -> list[str | None]:
    """Find how each tap's rows belong to examples.

    Args:
        recording: a forward pass on n ≥ 2 examples; its graph is kept.
        cotangent: [classes], any combination of the logits.
        tolerance: relative difference that rounding may make.

    Returns:
        An arrangement for each tap; None where none passes the audit.
    """
    n, factors = len(recording.logits), weights(len(recording.logits), cotangent)
    totals = [delta[0] for delta in _deltas(recording, cotangent[None])]
    weighted = _of_examples(recording, factors[:, None] * cotangent)
    wholes, possible = _wholes(recording.taps, totals), [_candidates(tap, n) for tap in recording.taps]
    found: list[str | None] = [None] * len(totals)
    for turn in range(max(map(len, possible), default=0)):
        left = [place for place, how in enumerate(found) if how is None and turn < len(possible[place])]
        tried = [(totals[place], weighted[place], possible[place][turn]) for place in left]
        for place, (*_, how), right in zip(left, tried, _proved(tried, factors, tolerance, wholes[left]), strict=True):
            found[place] = how if right else None
    return found


def _added(totals: list[Tensor], deltas: list[Tensor], factors: Tensor) -> list[Tensor]:
    """Totals with Σ_f factor_f · delta_f added in place; empty totals begin."""
    several = len(factors) > 1 or factors.device.type != "cpu"  # a GPU would have to be waited for to have a number
    for place, delta in enumerate(deltas):
        more = (factors.to(delta) @ delta.flatten(1)).view(delta.shape[1:]) if several else delta[0]
        factor = 1 if several else float(factors)
        if place < len(totals):
            totals[place].add_(more, alpha=factor)
        else:
            totals.append(more if several else more * factor)
    return totals


def _wholes(taps: Sequence[Tap], totals: Sequence[Tensor]) -> Tensor:
    """For each tap, the norm of a delta that would make its parameters' gradient that of the model's largest.

    A weight's gradient is a product of deltas and activations, so deltas count by the size of the activations, which is
    1 where a parameter is added or what it multiplies is normal: one layer's may be a million times another's where its
    inputs are a millionth.

    Returns:
        float64 [taps], on the device.
    """
    if not taps:
        return torch.zeros(0, dtype=torch.float64)
    read = [tap.use.saved[0] if tap.use.multiplies else None for tap in taps]
    norms = _finite_norms([*totals, *(x for x in read if x is not None)])
    activations = iter(norms[len(totals) :])
    one = norms.new_ones(())
    sizes = torch.stack([one if x is None else next(activations) / max(1, x.numel()) ** 0.5 for x in read])
    sizes.clamp_(min=1e-100)
    return (norms[: len(totals)] * sizes).max() / sizes


def _finite_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Norms of what is finite, float64: an example that is not must not change how its neighbours are computed."""
    norms = torch.stack([torch.linalg.vector_norm(wide(one)).double() for one in tensors])
    for place in (~norms.isfinite()).nonzero().flatten().tolist():  # or larger than a float32
        norms[place] = torch.linalg.vector_norm(tensors[place].nan_to_num(0, 0, 0), dtype=torch.float64)
    return norms


def _candidates(tap: Tap, n: int) -> list[str]:
    return candidates(tap.shape, n, tap.use.arrangements)


def _terms(
    tap: Tap, arrangement: str, n: int, classes: int, parameters: Mapping[str, Tensor], pulled: Pulled
) -> list[Term]:
    """Empty terms for a tap's parameters; none where its input changed or its rows no longer fit."""
    if tap.stale:
        pulled.distrust(tap, "input changed in place")
        return []
    if not fits(tap.shape, n, arrangement):
        pulled.distrust(tap, "rows not by example")
        return []
    batch = Batch(n, classes, arrangement, tap.shape.numel())
    try:
        made = {name: tap.use.terms[role](batch) for role, name in tap.names.items()}
    except Exception as error:
        _costs_its_rule(tap, error, pulled)
        return []
    for name, term in made.items():
        shape = parameters[name].shape if name in parameters else None
        rows = term.rows if shape is None else shape[0] if shape else 1
        pulled.terms.setdefault(name, []).append(term if rows == term.rows else ViewedTerm(term, rows))
    return list(made.values())


def _absorb(tap: Tap, terms: list[Term], first: int, deltas: Tensor, n: int, arrangement: str, pulled: Pulled) -> None:
    """Hand the deltas of some classes, from `first` on, to a tap's terms."""
    if not terms:
        return
    try:
        view = tap.use.view(deltas, n, arrangement)
        for term in terms:
            term.absorb(first, view)
    except Exception as error:
        _costs_its_rule(tap, error, pulled)


def _costs_its_rule(tap: Tap, error: Exception, pulled: Pulled) -> None:
    """An exception in a rule's own arithmetic costs the call's parameters that rule, and no more."""
    if is_out_of_memory(error):
        raise error
    pulled.distrust(tap, f"{type(error).__name__} in the rule of {tap.use.route}")


def _pull_to_roots(recording: Recording, parameters: Mapping[str, Tensor], pulled: Pulled) -> None:
    """Replace the terms of functions of parameters by those of the parameters."""
    for key, function in recording.functions.items():
        terms = pulled.terms.pop(key, [])
        if not terms or any(root in pulled.unsafe for root in function.roots):
            continue
        gradients = PulledBack(function, terms, {name: parameters[name] for name in function.roots})
        for name in function.roots:
            pulled.terms.setdefault(name, []).append(RootTerm(gradients, name, parameters[name].shape))


def audit(
    recording: Recording,
    arrangements: Sequence[str],
    parameters: Mapping[str, Tensor],
    totals: list[Tensor],
    cotangent: Tensor,
    tolerance: float,
    pulled: Pulled,
) -> None:
    """Prove, with one more product, that each row belongs to its example and that no use of a parameter was missed.

    Args:
        recording: the forward pass; its graph is freed.
        arrangements: how each tap's rows are assigned to examples.
        parameters: the noted parameters.
        totals: by tap, the gradient of `Σ_i Σ_c u_c logits[i, c]` with respect to its output.
        cotangent: u [classes].
        tolerance: relative difference that rounding may make.
        pulled: is told of what must not be used.
    """
    n, names = len(recording.logits), list(parameters)
    factors = weights(n, cotangent)
    if not parameters:
        return
    asked: list[Any] = [*(tap.edge for tap in recording.taps), *parameters.values()]
    found = torch.autograd.grad(
        recording.logits,
        asked,
        factors[:, None] * cotangent,
        allow_unused=True,
    )
    count = len(recording.taps)
    for name, gradient in zip(names, found[count:], strict=True):
        if gradient is not None:
            pulled.unsafe[name] = "used outside a known layer"
    asked_of = [
        place
        for place, (tap, how) in enumerate(zip(recording.taps, arrangements, strict=True))
        if found[place] is not None and fits(tap.shape, n, how)
    ]
    tried = [(totals[place], found[place], arrangements[place]) for place in asked_of]
    wholes = _wholes(recording.taps, totals)
    for place, right in zip(asked_of, _proved(tried, factors, tolerance, wholes[asked_of]), strict=True):
        if not right:
            pulled.distrust(recording.taps[place], "rows not by example")


def _proved(
    tried: Sequence[tuple[Tensor, Tensor, str]], factors: Tensor, tolerance: float, wholes: Tensor
) -> list[bool]:
    """Whether the rows of taps belong to examples as is guessed; see `row_owners`.

    Args:
        tried: of each, its total and its weighted gradient, and the arrangement.
        factors: the examples' weights, [n].
        tolerance: relative difference that rounding may make.
        wholes: see `owned`.

    Returns:
        The verdicts, after one look at all of them, since a GPU has to be waited for each time.
    """
    if not tried:
        return []
    pairs = [row_errors(weighted, total, factors.to(total), how) for total, weighted, how in tried]
    scales, errors = (torch.stack(several).double() for several in zip(*pairs, strict=True))
    right: list[bool] = owned(scales, errors, tolerance, wholes).tolist()
    return right


def _deltas(recording: Recording, cotangents: Tensor) -> list[Tensor]:
    """Gradients [f, …] of each tap's output, of f combinations [f, classes] of the logits, all examples' added up."""
    f, logits = len(cotangents), recording.logits
    if f == 1:
        return [delta[None] for delta in _of_examples(recording, cotangents[0].expand_as(logits))]
    if not recording.taps:
        return []
    edges, rows = [tap.edge for tap in recording.taps], cotangents[:, None].expand(f, *logits.shape)
    found = vectorised_grad(logits, edges, rows)
    return [
        cotangents.new_zeros(f, *tap.shape) if delta is None else delta
        for tap, delta in zip(recording.taps, found, strict=True)
    ]


def _of_examples(recording: Recording, cotangent: Tensor) -> list[Tensor]:
    """Gradient of `Σ cotangent · logits` [n, classes] with respect to each tap's output, zero where there is none."""
    if not recording.taps:
        return []
    found = torch.autograd.grad(
        recording.logits, [tap.edge for tap in recording.taps], cotangent, retain_graph=True, allow_unused=True
    )
    return [
        cotangent.new_zeros(tap.shape) if delta is None else delta
        for tap, delta in zip(recording.taps, found, strict=True)
    ]


def vectorises(recording: Recording, cotangents: Tensor, tolerance: float) -> bool:
    """Whether the backward passes of several classes can be one.

    Args:
        recording: a forward pass; its graph is kept.
        cotangents: [2, classes], two combinations of the logits.
        tolerance: relative difference that rounding may make.

    Returns:
        Whether vectorised passes run, and give what one pass for each does.
    """
    each = [_deltas(recording, cotangent[None]) for cotangent in cotangents]
    try:
        together = _deltas(recording, cotangents)
    except Exception as error:  # a backward pass of the user's own may refuse vmap in any way
        if is_out_of_memory(error):
            raise
        return False
    return all(
        bool(torch.linalg.vector_norm(both[f] - one[0]) <= tolerance * torch.linalg.vector_norm(one[0]))
        for f, alone in enumerate(each)
        for both, one in zip(together, alone, strict=True)
    )
