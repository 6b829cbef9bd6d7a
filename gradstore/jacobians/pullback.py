"""From a recorded forward pass to the terms of each parameter's Jacobian: one vector-Jacobian product per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradstore.jacobians.forward_record import Recording, Tap
from gradstore.jacobians.row_owners import candidates, fits, owned, weights
from gradstore.jacobians.side_by_side import side_by_side, uncut_if_small
from gradstore.jacobians.terms import Term, ViewedTerm
from gradstore.jacobians.uses import Batch
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

    Returns:
        The terms of each parameter. Holds every tap's input, its delta or small gradient for all c, and for each of at
        most `side_by_side.MOST` threads the deltas of one class two to three times over.
    """
    pulled, n = Pulled(), len(recording.logits)
    makers = [
        _terms(tap, how, n, len(cotangents), parameters, pulled)
        for tap, how in zip(recording.taps, arrangements, strict=True)
    ]
    summed = audited is cotangents
    factors = weights(len(cotangents), cotangents.new_empty(0, device="cpu")).tolist()

    def pull(classes: range) -> list[Tensor]:
        """Absorb some classes; their deltas' weighted sum where it is audited."""
        totals: list[Tensor] = []
        for c in classes:
            deltas = _deltas(recording, cotangents[c].expand_as(recording.logits))
            for tap, how, terms, delta in zip(recording.taps, arrangements, makers, deltas, strict=True):
                _absorb(tap, terms, c, delta, n, how, pulled)
            if summed:
                totals = _added(totals, deltas, factors[c])
        return totals

    totals: list[Tensor] = []
    for part in side_by_side(pull, len(cotangents), cotangents.device):
        totals = [total.add_(more) for total, more in zip(totals, part, strict=True)] if totals else part
    _pull_to_roots(recording, parameters, pulled)
    if audited is None:
        return pulled
    combined = weights(len(audited), audited) @ audited
    if not summed:
        totals = _deltas(recording, combined.expand_as(recording.logits))
    with uncut_if_small(sum(total.nbytes for total in totals)):
        _audit(recording, arrangements, parameters, totals, combined, tolerance, pulled)
    return pulled


def arrange(recording: Recording, cotangent: Tensor, tolerance: float) -> list[str | None]:
    """Find how each tap's rows belong to examples.

    Args:
        recording: a forward pass on n ≥ 2 examples; its graph is kept.
        cotangent: [classes], any combination of the logits.
        tolerance: relative difference that rounding may make.

    Returns:
        An arrangement for each tap; None where none passes the audit.
    """
    n = len(recording.logits)
    totals = _deltas(recording, cotangent.expand_as(recording.logits))
    weighted = _deltas(recording, weights(n, cotangent)[:, None] * cotangent)
    return [
        next((how for how in _candidates(tap, n) if owned(weighed, total, n, how, tolerance)), None)
        for tap, total, weighed in zip(recording.taps, totals, weighted, strict=True)
    ]


def _added(totals: list[Tensor], deltas: list[Tensor], factor: float) -> list[Tensor]:
    """Totals with factor · deltas added in place; empty totals begin."""
    if not totals:
        return [delta * factor for delta in deltas]
    return [total.add_(delta, alpha=factor) for total, delta in zip(totals, deltas, strict=True)]


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


def _absorb(tap: Tap, terms: list[Term], c: int, delta: Tensor, n: int, arrangement: str, pulled: Pulled) -> None:
    """Hand class c's delta to a tap's terms."""
    if not terms:
        return
    try:
        view = tap.use.view(delta, n, arrangement)
        for term in terms:
            term.absorb(c, view)
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


def _audit(
    recording: Recording,
    arrangements: Sequence[str],
    parameters: Mapping[str, Tensor],
    totals: list[Tensor],
    cotangent: Tensor,
    tolerance: float,
    pulled: Pulled,
) -> None:
    """Prove, with one more product, that each row belongs to its example and that no use of a parameter was missed."""
    n, names = len(recording.logits), list(parameters)
    if not parameters:
        return
    asked: list[Any] = [*(tap.edge for tap in recording.taps), *parameters.values()]
    found = torch.autograd.grad(
        recording.logits,
        asked,
        weights(n, cotangent)[:, None] * cotangent,
        allow_unused=True,
    )
    count = len(recording.taps)
    for name, gradient in zip(names, found[count:], strict=True):
        if gradient is not None:
            pulled.unsafe[name] = "used outside a known layer"
    verdicts = [
        (tap, owned(weighted, total, n, how, tolerance))
        for tap, how, total, weighted in zip(recording.taps, arrangements, totals, found[:count], strict=True)
        if weighted is not None and fits(tap.shape, n, how)
    ]
    # One look at all of them, since a GPU has to be waited for each time.
    right = torch.stack([verdict for _, verdict in verdicts]).tolist() if verdicts else []
    for (tap, _), passed in zip(verdicts, right, strict=True):
        if not passed:
            pulled.distrust(tap, "rows not by example")


def _deltas(recording: Recording, cotangent: Tensor) -> list[Tensor]:
    """Gradient of `Σ cotangent · logits` with respect to each tap's output, zero where there is none."""
    if not recording.taps:
        return []
    found = torch.autograd.grad(
        recording.logits, [tap.edge for tap in recording.taps], cotangent, retain_graph=True, allow_unused=True
    )
    return [
        cotangent.new_zeros(tap.shape) if delta is None else delta
        for tap, delta in zip(recording.taps, found, strict=True)
    ]
