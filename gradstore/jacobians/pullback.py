"""From a recorded forward pass to the terms of each parameter's Jacobian: one vector-Jacobian product per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradstore.jacobians.forward_record import Recording, Tap
from gradstore.jacobians.row_owners import candidates, fits, owned, weights
from gradstore.jacobians.rules import Batch
from gradstore.jacobians.side_by_side import side_by_side, uncut_if_small
from gradstore.jacobians.terms import Term


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
        self.unsafe.update(dict.fromkeys(tap.names.values(), reason))


def pull_back(
    recording: Recording,
    arrangements: Sequence[str],
    parameters: Mapping[str, Tensor],
    cotangents: Tensor,
    audited: Tensor | None,
) -> Pulled:
    """Differentiate the logits class by class with respect to the noted outputs, never to parameters, and audit.

    Args:
        recording: the forward pass; its graph is freed.
        arrangements: how each tap's rows are assigned to examples.
        parameters: the noted parameters.
        cotangents: [c, classes]; row k makes column k of the Jacobian.
        audited: those that the audit combines: these, or all where the others will be asked for without one; None for
            a batch whose audit was passed.

    Returns:
        The terms of each parameter. Holds every tap's input, its delta or small gradient for all c, and for each of at
        most `side_by_side.MOST` threads the deltas of one class two to three times over.
    """
    summed = audited is cotangents
    factors = weights(len(cotangents), cotangents.new_empty(0, device="cpu")).tolist()
    pulled, totals = absorb(recording, arrangements, cotangents, factors if summed else None)
    if audited is None:
        return pulled
    combined = weights(len(audited), audited) @ audited
    if not summed:
        totals = _deltas(recording, combined.expand_as(recording.logits))
    with uncut_if_small(sum(total.nbytes for total in totals)):
        audit(recording, arrangements, parameters, totals, combined, pulled)
    return pulled


def absorb(
    recording: Recording, arrangements: Sequence[str], cotangents: Tensor, factors: Sequence[float | Tensor] | None
) -> tuple[Pulled, list[Tensor]]:
    """Differentiate class by class and let the terms take the deltas.

    Args:
        recording: a forward pass, or what led to the inputs of its last call in place of the logits; its graph is kept.
        arrangements: how each tap's rows are assigned to examples.
        cotangents: [c, classes].
        factors: of a sum of all classes' deltas, for an audit; numbers, or scalars on the device. None: no sum.

    Returns:
        The terms, and the sum by tap.
    """
    pulled, n = Pulled(), len(recording.logits)
    makers = [
        _terms(tap, how, n, len(cotangents), pulled) for tap, how in zip(recording.taps, arrangements, strict=True)
    ]

    def pull(classes: range) -> list[Tensor]:
        """Absorb some classes; their deltas' weighted sum where it is audited."""
        totals: list[Tensor] = []
        for c in classes:
            deltas = _deltas(recording, cotangents[c].expand_as(recording.logits))
            for tap, how, terms, delta in zip(recording.taps, arrangements, makers, deltas, strict=True):
                view = tap.use.view(delta, n, how) if terms else delta
                for term in terms:
                    term.absorb(c, view)
            if factors is not None:
                totals = _added(totals, deltas, factors[c])
        return totals

    totals: list[Tensor] = []
    for part in side_by_side(pull, len(cotangents), cotangents.device):
        totals = [total.add_(more) for total, more in zip(totals, part, strict=True)] if totals else part
    return pulled, totals


def arrange(recording: Recording, cotangent: Tensor) -> list[str | None]:
    """Find how each tap's rows belong to examples.

    Args:
        recording: a forward pass on n ≥ 2 examples; its graph is kept.
        cotangent: [classes], any combination of the logits.

    Returns:
        An arrangement for each tap; None where none passes the audit.
    """
    n = len(recording.logits)
    totals = _deltas(recording, cotangent.expand_as(recording.logits))
    weighted = _deltas(recording, weights(n, cotangent)[:, None] * cotangent)
    return [
        next((how for how in _candidates(tap, n) if owned(weighed, total, n, how)), None)
        for tap, total, weighed in zip(recording.taps, totals, weighted, strict=True)
    ]


def _added(totals: list[Tensor], deltas: list[Tensor], factor: float | Tensor) -> list[Tensor]:
    """Totals with factor · deltas added in place; empty totals begin."""
    if not totals:
        return [delta * factor for delta in deltas]
    if isinstance(factor, Tensor):  # on a GPU, which would have to be waited for to have it as a number
        return [total.addcmul_(delta, factor) for total, delta in zip(totals, deltas, strict=True)]
    return [total.add_(delta, alpha=factor) for total, delta in zip(totals, deltas, strict=True)]


def _candidates(tap: Tap, n: int) -> list[str]:
    return candidates(tap.shape, n, tap.use.arrangements)


def _terms(tap: Tap, arrangement: str, n: int, classes: int, pulled: Pulled) -> list[Term]:
    """Empty terms for a tap's parameters; none where its input changed or its rows no longer fit."""
    if tap.stale:
        pulled.distrust(tap, "input changed in place")
        return []
    if not fits(tap.shape, n, arrangement):
        pulled.distrust(tap, "rows not by example")
        return []
    batch = Batch(n, classes, arrangement, tap.shape.numel())
    made = {name: tap.use.terms[role](batch) for role, name in tap.names.items()}
    for name, term in made.items():
        pulled.terms.setdefault(name, []).append(term)
    return list(made.values())


def audit(
    recording: Recording,
    arrangements: Sequence[str],
    parameters: Mapping[str, Tensor],
    totals: list[Tensor],
    cotangent: Tensor,
    pulled: Pulled,
) -> None:
    """Prove, with one more product, that each row belongs to its example and that no use of a parameter was missed.

    Args:
        recording: the forward pass; its graph is freed.
        arrangements: how each tap's rows are assigned to examples.
        parameters: the noted parameters.
        totals: by tap, the gradient of `Σ_i Σ_c u_c logits[i, c]` with respect to its output.
        cotangent: u [classes].
        pulled: is told of what must not be used.
    """
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
        (tap, owned(weighted, total, n, how))
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
