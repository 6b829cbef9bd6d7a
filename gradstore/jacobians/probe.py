"""How each parameter of a model is differentiated, decided once on a few probe examples and checked against autograd.

A structured route is taken only where all of this holds: every use of the parameter is a call that a rule covers, its
rows are proved to stay with their examples, the resulting gradient equals autograd's of the same batch, and that equals
looped autograd's, one example at a time, but for what roundings alone move it by (`steadiness`). Anything else takes
`torch.func`, and where that too fails or differs, looped autograd itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradstore.errors import ProjectError
from gradstore.jacobians.by_autograd import by_loop, dense, one_by_one
from gradstore.jacobians.footprint import Footprint, max_columns, measured, saved_bytes
from gradstore.jacobians.forward_record import Calls, Recording, Tap, record
from gradstore.jacobians.generic_routes import WORDS, Exact, generic_routes
from gradstore.jacobians.layer_rules import EMBEDDING
from gradstore.jacobians.pullback import arrange, pull_back, vectorises
from gradstore.jacobians.row_owners import weights
from gradstore.jacobians.steadiness import allowed, spread
from gradstore.jacobians.subject import Inputs, Subject, length, take
from gradstore.jacobians.terms import Term, sum_of
from gradstore.jacobians.through_head import pull_back_through, rows_below
from gradstore.jacobians.weight_functions import RootTerm
from gradstore.machine.out_of_memory import is_out_of_memory

PROBES = 3


@dataclass(frozen=True)
class Plan:
    """The decision.

    Attributes:
        structured: parameters whose uses are noted.
        arrangements: per noted call, how its rows are assigned to examples.
        calls: the noted calls; a forward pass with other calls leaves the plan.
        functions: those of the parameters that are used through a function of them.
        exact: the generic route of each remaining parameter.
        routes: per parameter, its route in words.
        footprint: memory that a batch needs.
        tolerance: relative difference that rounding may make.
        vectorises: whether the backward passes of several classes can be one.
    """

    structured: tuple[str, ...]
    arrangements: tuple[str, ...]
    calls: Calls
    functions: frozenset[str]
    exact: dict[str, Exact]
    routes: dict[str, str]
    footprint: Footprint
    tolerance: float
    vectorises: bool

    def matches(self, recording: Recording) -> bool:
        """Whether a forward pass made the calls that the plan was checked on."""
        return self.calls == recording.calls

    def sparse(self, name: str) -> bool:
        """Whether a parameter is an embedding matrix and nothing else."""
        return self.routes[name] == EMBEDDING


@dataclass
class _Attempt:
    """A structured pass over the probe and the parameters that it got wrong, with reasons."""

    structured: list[str]
    recording: Recording
    arrangements: list[str]
    footprint: Footprint
    failed: dict[str, str]


class Prober:
    """Works a plan out; use inside `subject.ready()`.

    Args:
        subject: the model.
        example: at least one example; three different ones make the best probe.
        alone: examples are never computed together, so one is the probe.

    Holds three examples' graph, and beside it one model's worth of gradients, for a moment two; four while it finds out
    why some differ, and one more from the moment that it tries a generic route.

    Raises:
        ProjectError: the model's output is not logits, or an example's logits depend on its neighbours in the batch.
    """

    def __init__(self, subject: Subject, example: Inputs, *, alone: bool = False) -> None:
        self._subject = subject
        self._count = 1 if alone else PROBES
        self._probe = take(example, torch.arange(self._count) % min(length(example), PROBES))
        with torch.no_grad():
            self._logits = subject.logits(self._probe)
        self._looks_at_one_alone()
        self._tolerance = subject.rounding(self._logits)
        self._require_independent_examples()
        self._cotangent = weights(self._logits.shape[1], self._logits)
        looped = self._differentiated()
        self._other: dict[str, Tensor] = {}  # the same of the classes in reverse, where a generic route is tried
        self._scale = float(torch.stack([g.norm().double() for g in looped.values()]).norm())
        try:
            self._reference = self._batched()
        except Exception:  # a backward pass that fails in a batch may do so in any way; the loop serves it
            self._reference, self._apart = looped, set(looped)
        else:
            self._apart = self._differing(looped)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._logits.device

    @property
    def classes(self) -> int:
        """Number of logits."""
        return self._logits.shape[1]

    def plan(self) -> Plan:
        """Drop parameters from the structured route until what remains agrees with autograd."""
        reasons: dict[str, str] = {}
        for repeating in (True, False):
            structured = [name for name in self._subject.parameters if name not in self._apart]
            reasons.update(dict.fromkeys(self._apart, "its gradient differs alone and in a batch"))
            while structured:
                try:
                    attempt = self._attempt(structured, repeating)
                except Exception as error:  # the model's own code may fail in any way when its calls are noted
                    reasons.update(dict.fromkeys(structured, f"{type(error).__name__} while noting its calls"))
                    break
                if not attempt.failed:
                    return self._decided(attempt, reasons)
                reasons.update(attempt.failed)
                structured = [name for name in structured if name not in attempt.failed]
        nothing = Recording(self._logits, [], {})
        return self._decided(_Attempt([], nothing, [], measured([], {}, 0, 1), {}), reasons)

    def below_head(self, plan: Plan, pays: Callable[[int], bool]) -> tuple[int, tuple[str, ...]]:
        """Try the inputs of the last call in place of the logits; see `through_head`.

        Args:
            plan: for the logits.
            pays: whether so many inputs are worth it.

        Returns:
            How many inputs there are, 0 where they do not serve; and the call's own parameters.
        """
        recording = record(self._subject, plan.structured, self._probe, plan.calls)
        rows = rows_below(recording)
        if not plan.matches(recording) or not pays(rows):
            return 0, ()
        parameters = {name: self._subject.parameters[name] for name in plan.structured}
        pulled, head = pull_back_through(recording, plan.arrangements, parameters, self._tolerance, combined=True)
        own = tuple(head.names.values())
        rest = [name for name in plan.structured if name not in own]
        agrees = not any(self._disagreement(name, pulled.terms.pop(name, [])) for name in rest)
        factors = weights(self._count, head.inputs)
        for name in own:
            agrees &= self._near(head.combined(name, factors, self._cotangent), self._reference[name], self._scale)
        return (rows, own) if agrees and not pulled.unsafe else (0, ())

    def _attempt(self, structured: list[str], repeating: bool) -> _Attempt:
        parameters = {name: self._subject.parameters[name] for name in structured}
        with saved_bytes(self._subject.model) as saved:
            recording = record(self._subject, structured, self._probe, None, spread=repeating)
        if not self._near(recording.logits.detach(), self._logits, 0.0):
            raise ArithmeticError("the noted pass changed the logits")
        found = arrange(recording, self._cotangent, self._tolerance)
        arrangements = [how for how in found if how is not None]
        if len(arrangements) < len(found):
            lost = [tap for tap, how in zip(recording.taps, found, strict=True) if how is None]
            failed = {name: "rows not by example" for tap in lost for name in tap.roots}
            return _Attempt(structured, recording, [], measured([], {}, 0, 1), failed)
        cotangents = self._cotangent[None]
        pulled = pull_back(recording, arrangements, parameters, cotangents, cotangents, self._tolerance)
        whole = {name: terms for name, terms in pulled.terms.items() if name not in pulled.unsafe}
        footprint = measured(recording.taps, whole, saved.total, self._count)
        failed = dict(pulled.unsafe)
        for name in structured:
            terms = pulled.terms.pop(name, [])
            if name not in failed:
                failed |= self._disagreement(name, terms)
        return _Attempt(structured, recording, arrangements, footprint, failed)

    def _decided(self, attempt: _Attempt, reasons: dict[str, str]) -> Plan:
        rest = [name for name in self._subject.parameters if name not in attempt.structured]
        exact = generic_routes([name for name in rest if name not in self._apart], self._try_generic)
        exact |= {name: by_loop for name in rest if name in self._apart}
        routes = {name: _structured_route(name, attempt.recording.taps) for name in attempt.structured}
        routes |= {name: f"{WORDS[exact[name]]} ({reasons[name]})" for name in rest}
        return Plan(
            structured=tuple(attempt.structured),
            arrangements=tuple(attempt.arrangements),
            calls=attempt.recording.calls,
            functions=frozenset(root for made in attempt.recording.functions.values() for root in made.roots),
            exact=exact,
            routes=routes,
            footprint=attempt.footprint,
            tolerance=self._tolerance,
            vectorises=self._vectorises(attempt),
        )

    def _vectorises(self, attempt: _Attempt) -> bool:
        """Whether several classes can be differentiated in one pass; of one class, there is nothing to ask."""
        if self.classes == 1 or not attempt.structured:
            return False
        recording = record(self._subject, attempt.structured, self._probe, attempt.recording.calls)
        first, second = self._cotangent, self._cotangent.flip(0)
        return vectorises(recording, torch.stack([first, second]), self._tolerance)

    def _try_generic(self, route: Exact, names: list[str]) -> dict[str, bool]:
        """Run a route on the probe, and say by name whether it gave the right gradient; it may raise anything."""
        if self.classes == 1:
            found = route(self._subject, names, self._probe, self._cotangent[None])
        else:  # some functions of torch are right for one cotangent only: `torch.cdist` under `torch.func`, say
            found = route(self._subject, names, self._probe, torch.stack([self._cotangent, self._cotangent.flip(0)]))
            self._other = self._other or self._looped(self._subject, self._probe, self._cotangent.flip(0))
        wrong: set[str] = set()
        for place, reference in enumerate((self._reference, self._other)[: min(2, self.classes)]):
            each = zip(names, found, strict=True)
            mixed = {name: self._mixed(values[:, place : place + 1]) for name, values in each}
            wrong |= self._differing(mixed, reference)
        return {name: name not in wrong for name in names}

    def _differentiated(self) -> dict[str, Tensor]:
        """The reference, or why there is none."""
        logits = self._subject.logits(take(self._probe, slice(0, 1)))
        self._require_same_without_gradients(logits.detach()[0])
        if not logits.requires_grad:
            raise ProjectError(
                "the logits do not depend on any differentiated parameter",
                where="model",
                hint="A .detach(), torch.no_grad() or conversion to NumPy in the forward pass would do this",
            )
        try:
            return self._looped(self._subject, self._probe)
        except Exception as error:  # a backward pass of the user's own may fail in any way
            if is_out_of_memory(error):
                raise
            raise ProjectError(
                "autograd cannot differentiate the model",
                where="model",
                got=_first_line(error),
                hint="Call loss.backward() on one example by hand, with retain_graph=True, to find the operation",
            ) from error

    def _looped(self, subject: Subject, probe: Inputs, cotangent: Tensor | None = None) -> dict[str, Tensor]:
        """Autograd's gradient of `Σ_i w_i Σ_c u_c logits[i, c]`, one example at a time; per parameter, [size]."""
        cotangent = self._cotangent if cotangent is None else cotangent
        names = list(subject.parameters)
        wide = {name: _wide(p.dtype) for name, p in subject.parameters.items()}
        total = {name: p.new_zeros(p.numel(), dtype=wide[name]) for name, p in subject.parameters.items()}
        factors = weights(self._count, self._logits).tolist()
        for i, _, gradients in one_by_one(subject, names, probe, cotangent[None]):
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    total[name].add_(gradient.reshape(-1), alpha=factors[i])
            del gradients  # before those of the next example are made
        return total

    def _batched(self) -> dict[str, Tensor]:
        """The same of all examples at once."""
        parameters = self._subject.parameters
        cotangents = weights(self._count, self._logits)[:, None] * self._cotangent
        logits = self._subject.logits(self._probe)
        found = torch.autograd.grad(logits, list(parameters.values()), cotangents, materialize_grads=True)
        return {name: dense(g).reshape(-1).to(_wide(g.dtype)) for name, g in zip(parameters, found, strict=True)}

    def _differing(self, ours: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None = None) -> set[str]:
        """Parameters whose gradient is another than autograd's of the batch, by more than roundings move that."""
        reference = self._reference if reference is None else reference
        left = {name: float((values - reference[name]).norm()) for name, values in ours.items()}

        def unexplained(moved: Mapping[str, float]) -> set[str]:
            return {
                name
                for name, error in left.items()
                if not self._small(error, reference[name], self._scale, moved.get(name, 0.0))
            }

        if not unexplained({}):
            return set()
        return unexplained(
            spread(self._subject, self._probe, self._looped, self._tolerance, lambda moved: not unexplained(moved))
        )

    def _mixed(self, values: Tensor) -> Tensor:
        """[examples, 1, size] to the same weighted sum, [size]."""
        wide = values[:, 0].to(_wide(self._logits.dtype))
        return weights(self._count, wide) @ wide

    def _disagreement(self, name: str, terms: list[Term]) -> dict[str, str]:
        """The parameter's name and a reason, where its terms do not add up to the reference."""
        try:
            return {} if self._agree(terms, self._reference[name]) else {name: "differs from autograd"}
        except Exception as error:  # in a rule's own arithmetic; it costs this parameter its rule
            if is_out_of_memory(error):
                raise
            return {name: f"{type(error).__name__} in its rule"}

    def _agree(self, terms: list[Term], reference: Tensor) -> bool:
        """Whether the terms add up to the reference; a block's columns at a time, of which all examples' are held."""
        if not terms:
            return self._near(torch.zeros_like(reference), reference, self._scale)
        rows, width = terms[0].rows, terms[0].width
        step, error = max(1, max_columns(reference.device, 1) // max(1, width)), 0.0
        if any(isinstance(term, RootTerm) for term in terms):
            step = rows  # all of them are made at once
        for first in range(0, rows, step):
            last = min(first + step, rows)
            ours = sum_of([self._mixed(term.values(first, last)) for term in terms])
            error = math.hypot(error, float((ours - reference[first * width : last * width]).norm()))
        return self._small(error, reference, self._scale)

    def _near(self, ours: Tensor, reference: Tensor, scale: float) -> bool:
        return self._small(float((ours - reference).norm()), reference, scale)

    def _small(self, error: float, reference: Tensor, scale: float, moved: float = 0.0) -> bool:
        return error <= allowed(float(reference.norm()), scale, self._tolerance, moved)

    def _require_same_without_gradients(self, logits: Tensor) -> None:
        error = float((logits - self._logits[0]).norm())
        if not error <= self._tolerance * (1e-3 + float(logits.norm())) and bool(logits.isfinite().all()):
            raise ProjectError(
                "the model computes other logits where gradients are on",
                where="model",
                expected="the same logits with and without torch.no_grad()",
                got=f"a difference of {error:.2g}",
                hint="Look for torch.is_grad_enabled(), or for layers that take a faster way without gradients",
            )

    def _looks_at_one_alone(self) -> None:
        """Run one example by itself, as everything is compared with, and learn in which dtypes the model computes.

        Raises:
            ProjectError: the model takes several examples at once only.
        """
        try:
            self._subject.look_at_dtypes(take(self._probe, slice(0, 1)))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ProjectError(
                "the model fails on a batch of one example",
                where="model",
                expected="logits for one example as for several",
                got=f"{error.what}: {error.got}" if isinstance(error, ProjectError) else _first_line(error),
                hint="Give squeeze() the axis to remove, and use no statistics of the batch; or call the model "
                "otherwise with forward=",
            ) from error

    def _require_independent_examples(self) -> None:
        for i in range(self._count):
            with torch.no_grad():
                alone = self._subject.logits(take(self._probe, slice(i, i + 1)))[0]
            error = float((alone - self._logits[i]).norm())
            if not error <= self._tolerance * (1e-3 + float(alone.norm())) and bool(alone.isfinite().all()):
                raise ProjectError(
                    "an example's logits depend on the other examples of its batch",
                    where="model",
                    expected="the same logits alone and in a batch",
                    got=f"a difference of {error:.2g}",
                    hint="Use running statistics in batch norms, and no randomness in eval mode; --alone (alone=True) "
                    "computes each example by itself",
                )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _structured_route(name: str, taps: Sequence[Tap]) -> str:
    routes = dict.fromkeys(
        tap.use.route if name in tap.names.values() else f"{tap.use.route} of a function"
        for tap in taps
        if name in tap.roots
    )
    return " + ".join(routes) or "unused"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
