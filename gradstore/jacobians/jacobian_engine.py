"""`JacobianEngine`: the per-example Jacobian of any classifier, streamed one block of parameters at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradstore.errors import UsageError
from gradstore.jacobians import through_head
from gradstore.jacobians.blocks import DenseBlock, JacobianBlock
from gradstore.jacobians.by_autograd import by_loop, dense
from gradstore.jacobians.footprint import max_columns
from gradstore.jacobians.forward_record import record
from gradstore.jacobians.probe import Exact, Plan, Prober
from gradstore.jacobians.pullback import Pulled, pull_back
from gradstore.jacobians.reused_memory import drop_spare
from gradstore.jacobians.side_by_side import MOST, SMALL, uncut_if_small
from gradstore.jacobians.steadiness import spread
from gradstore.jacobians.subject import Forward, Inputs, Subject, as_inputs, length
from gradstore.jacobians.terms import IndexTerm, Term, joined, sum_of
from gradstore.jacobians.through_head import Head
from gradstore.model.parameters import ParameterBlock

LAYOUTS = ("per-class", "sum")
# Classes that one backward pass differentiates together where launching operations takes longer than computing them,
# and the bytes of their deltas up to which that is so; half of all classes, as another thread has the rest.
_MOST_AT_ONCE, _DELTAS_AT_ONCE = 16, 8 << 20
# Bytes of all classes' deltas up to which starting a second thread takes longer than it saves.
_ALL_AT_ONCE = 2 << 20
_AUDIT = 5  # times all deltas of a class that the audit of a batch takes, as was measured


class JacobianStream:
    """The Jacobian of one batch: its logits at once, its blocks one at a time and once only.

    Attributes:
        logits: [n, classes] float32.
        trusted: the audit was passed, for all classes, so that others of this batch need none.
    """

    def __init__(self, logits: Tensor, blocks: Iterator[JacobianBlock], trusted: bool) -> None:
        self.logits, self._blocks, self.trusted = logits, blocks, trusted

    def __iter__(self) -> Iterator[JacobianBlock]:
        return self._blocks


class JacobianEngine:
    """Computes `g^c(x) = ∂ logits_c(x) / ∂θ` for every example and class of a batch.

    One forward pass notes the inputs and outputs of the calls that use parameters; one vector-Jacobian product per
    class gives the gradients at those outputs; per-example gradients follow from both (Goodfellow 2015, "Efficient
    per-example gradient computations"; Rochette et al. 2019 for convolutions). On construction every parameter's result
    is compared with looped autograd on three examples, and a parameter that disagrees takes a slower route, as
    `describe` says. On every batch one further product proves that no use of a parameter was missed and that each
    layer's rows are those of their example; a parameter that fails takes looped autograd for that batch.

    A batch holds: the activations that autograd saves; per class, the output gradients of linear layers, convolutions
    and embeddings and the finished gradients of small parameters; and while streaming one block [n, c, ≤ `max_columns`]
    and the unfolded input of one convolution. `bytes_needed` puts this in figures. Blocks are cut by shapes alone.

    Args:
        model: the classifier; used in eval mode and left as it was found. Any floating-point dtype.
        blocks: the parameters to differentiate, from `parameter_blocks`.
        forward: `(model, inputs) -> logits [n, classes]`; None calls `model(inputs)`.
        layout: "per-class" gives c = classes rows an example, "sum" gives their sum, c = 1.
        example: a batch of at least one example, on the model's device.
        alone: every batch will be of one example, so that a model whose examples look at one another is served too.
        proj_dim: K that rows will be projected to. Where it is given, and the last call is linear with so few inputs
            that it pays to differentiate these and not the classes (`through_head.pays`), blocks of all classes are
            `LoweredBlock`s, and those of the call's own parameters `OwnRowBlock`s.
        combinations: [r, classes]; of each row, these combinations of the classes take the place of the classes.

    Attributes:
        below: d, the inputs of the last call that are differentiated in place of the classes; 0 where classes are.
        own: the parameters of that call.

    Raises:
        UsageError: unknown layout.
        ProjectError: the model's output is not logits, or an example's logits depend on its neighbours in the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[ParameterBlock],
        *,
        forward: Forward | None = None,
        layout: str = "per-class",
        example: Any,
        alone: bool = False,
        proj_dim: int | None = None,
        combinations: Tensor | None = None,
    ) -> None:
        if layout not in LAYOUTS:
            raise UsageError("unknown layout", where="layout=", expected=f"one of {LAYOUTS}", got=repr(layout))
        self._blocks, self._layout = tuple(blocks), layout
        self._subject = Subject(model, forward, [block.name for block in self._blocks])
        weakref.finalize(self, drop_spare)
        with self._subject.ready():
            prober = Prober(self._subject, as_inputs(example), alone=alone)
            self._plan: Plan = prober.plan()
            self._combinations = combinations
            every = prober.classes if combinations is None else len(combinations)
            self._classes = every if layout == "per-class" else 1
            self.below = 0
            self.own: tuple[str, ...] = ()
            if proj_dim is not None and combinations is None and self._plan.structured:
                K = proj_dim
                self.below, self.own = prober.below_head(
                    self._plan, lambda rows: through_head.pays(self._classes, rows, K)
                )
        self._columns = max_columns(prober.device, self._classes)

    def describe(self) -> list[tuple[str, str]]:
        """How each parameter is differentiated: rows (parameter name, route), with the reason for a generic route."""
        return [(block.name, self._described(block.name)) for block in self._blocks]

    def _described(self, name: str) -> str:
        route = self._plan.routes[name]
        if not self.below or name in self._plan.exact:
            return route
        how = "own row a class" if name in self.own else f"{self.below} rows for {self._classes:,} classes"
        return f"{route}, {how}"

    def generic(self) -> list[tuple[str, str]]:
        """Those of `describe` that no rule covers: differentiated by `torch.func` or by looped autograd."""
        return [(name, route) for name, route in self.describe() if name in self._plan.exact]

    @property
    def copies(self) -> bool:
        """Whether some block's values are made elsewhere and copied, not formed in the memory that they are given."""
        wide = any(parameter.dtype == torch.float64 for parameter in self._subject.parameters.values())
        return wide or self._plan.footprint.lazy or bool(self._plan.exact or self._plan.functions)

    def bytes_needed(self, n: int, classes: int | None = None, *, factors: bool = False) -> int:
        """Estimate what a batch of n examples holds at its peak.

        Args:
            n: examples.
            classes: how many are differentiated at a time; default all.
            factors: no block that has structure is made dense, and all is done inside `uncut_if_small`.

        Returns:
            Bytes beside the model, one block included.
        """
        seen, all_classes = self._plan.footprint, classes or self._classes
        classes = classes or self.below or self._classes  # or the rows that stand for them
        at_once = min(classes, self._at_once(n))
        shares = 1 if factors and self.outputs(n) < SMALL else min(-(-classes // at_once), MOST)
        deltas = 1 + 2 * shares * at_once
        backward = seen.graph + classes * seen.kept + max(deltas, _AUDIT) * seen.deltas
        plan = self._plan
        if factors and not plan.exact and not plan.functions and not seen.lazy:
            return n * backward
        widest = max(_group_columns(group) for group in self._groups({})) if plan.exact else 0
        pulled_back = [block.size for block in self._blocks if block.name in plan.functions]
        widest = max(widest, 2 * max(pulled_back, default=0))  # of the function, and of the parameter
        largest = max((min(block.size, self._columns) for block in self._blocks), default=0)
        values = 4 * (classes * 2 * largest + all_classes * 2 * widest)
        streaming = seen.graph + classes * seen.kept + 2 * seen.activations + values
        return n * max(backward, streaming)

    def _at_once(self, n: int) -> int:
        """Classes that are differentiated in one pass: by sizes alone, since bits depend on it."""
        if not self._plan.vectorises:
            return 1
        outputs = max(1, self.outputs(n))
        if self._classes * outputs <= _ALL_AT_ONCE:
            return self._classes
        return max(1, min(_MOST_AT_ONCE, -(-self._classes // 2), _DELTAS_AT_ONCE // outputs))

    def outputs(self, n: int) -> int:
        """Bytes of what all layers with parameters give for n examples."""
        return n * self._plan.footprint.deltas

    def __call__(self, inputs: Any, classes: slice = slice(None), *, trusted: bool = False) -> JacobianStream:
        """Run the model on a batch.

        Args:
            inputs: Tensor [n, …] or dict of Tensors with first axis n, on the model's device.
            classes: those to differentiate, of the c that the layout has.
            trusted: some classes of this very batch were computed before, and their stream was `trusted`.

        Returns:
            A stream of blocks [n, c, size] in parameter order; only generic routes run the model again as it is read.
        """
        inputs, plan = as_inputs(inputs), self._plan
        with self._subject.ready():
            with uncut_if_small(self.outputs(length(inputs))):
                recording = record(self._subject, plan.structured, inputs, plan.calls)
            logits = recording.logits.detach()
            every = self._cotangents(logits)
            cotangents = every[classes]
            audited = None if trusted else cotangents if len(cotangents) == len(every) else every
            parameters = {name: self._subject.parameters[name] for name in plan.structured}
            head, at_once = None, self._at_once(len(logits))
            if not plan.matches(recording):
                pulled = Pulled(unsafe=dict.fromkeys(plan.structured, "other calls than in the probe"))
            elif len(cotangents) == len(every) and self.below and through_head.rows_below(recording) == self.below:
                pulled, head = through_head.pull_back_through(
                    recording, plan.arrangements, parameters, plan.tolerance, at_once
                )
            else:
                pulled = pull_back(
                    recording, plan.arrangements, parameters, cotangents, audited, plan.tolerance, at_once
                )
        del recording
        stream = self._stream(inputs, cotangents, pulled, head)
        return JacobianStream(logits.float(), stream, trusted=not pulled.unsafe)

    def logits(self, batches: Iterable[Any]) -> list[Tensor]:
        """Run the model without gradients, each batch by itself.

        Args:
            batches: of examples, as for a call.

        Returns:
            float32 [n, classes] of each.
        """
        with self._subject.ready(), torch.no_grad():
            return [self._subject.logits(as_inputs(batch)).float() for batch in batches]

    def rounding(self, logits: Tensor) -> float:
        """Relative difference that rounding may make between two passes that give these logits."""
        return self._subject.rounding(logits)

    def alone(self, example: Any, names: Sequence[str], factors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Differentiate one example by plain autograd, beside no other: what every row has to agree with.

        Args:
            example: a batch of one.
            names: parameters; the gradients of all of them are held.
            factors: u [c], of the c rows that the layout has.

        Returns:
            Logits float32 [classes], and Σ_c u_c g^c by name, [size].
        """
        with self._subject.ready():
            return self._combined(self._subject, as_inputs(example), names, factors)

    def looped(self, example: Any) -> dict[str, Tensor]:
        """Differentiate one example by the definition: plain autograd, one backward pass for each of the c rows.

        Args:
            example: a batch of one.

        Returns:
            By parameter, [c, size]. Holds all of them, and one example's graph.
        """
        inputs, names = as_inputs(example), [block.name for block in self._blocks]
        with self._subject.ready():
            with torch.no_grad():
                cotangents = self._cotangents(self._subject.logits(inputs))
            found = by_loop(self._subject, names, inputs, cotangents)
        return {name: values[0] for name, values in zip(names, found, strict=True)}

    def spread(
        self,
        example: Any,
        names: Sequence[str],
        factors: Tensor,
        tolerance: float,
        enough: Callable[[Mapping[str, float]], bool],
    ) -> dict[str, float]:
        """How far roundings alone move what `alone` returns; see `steadiness.spread`."""

        def gradients(subject: Subject, inputs: Inputs) -> dict[str, Tensor]:
            return self._combined(subject, inputs, names, factors)[1]

        with self._subject.ready():
            return spread(self._subject, as_inputs(example), gradients, tolerance, enough)

    def _combined(
        self, subject: Subject, inputs: Inputs, names: Sequence[str], factors: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits = subject.logits(inputs)[0]
        cotangent = factors.to(logits) @ self._cotangents(logits[None])
        parameters = [subject.parameters[name] for name in names]
        found = torch.autograd.grad(logits, parameters, cotangent, materialize_grads=True)
        return logits.detach().float(), {name: dense(g).reshape(-1) for name, g in zip(names, found, strict=True)}

    def _cotangents(self, logits: Tensor) -> Tensor:
        if self._layout == "sum":
            return torch.ones_like(logits[:1])
        if self._combinations is not None:
            return self._combinations.to(logits)
        return torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)

    def _stream(self, inputs: Inputs, cotangents: Tensor, pulled: Pulled, head: Head | None) -> Iterator[JacobianBlock]:
        groups = {group[0].name: group for group in self._groups(pulled.unsafe)}
        plan = self._plan
        routes = plan.exact | dict.fromkeys(pulled.unsafe, by_loop)
        ready: dict[str, Tensor] = {}
        n = length(inputs)
        for block in self._blocks:
            if block.name in groups:
                names = [member.name for member in groups[block.name]]
                # In one thread as above: on some processors the bits of small products depend on how they are cut.
                with self._subject.ready(), uncut_if_small(self.outputs(n)):
                    ready |= zip(names, routes[names[0]](self._subject, names, inputs, cotangents), strict=True)
            cuts = _cuts(block, self._columns, whole=self._plan.sparse(block.name))
            if block.name in ready:
                yield from _cut(block, ready.pop(block.name), cuts)
            elif head is not None and head.owns(block.name):
                yield from _own_rows(block, head, cuts)
            elif block.name in plan.functions and block.name in pulled.terms:
                terms = pulled.terms.pop(block.name)
                with self._subject.ready(), uncut_if_small(self.outputs(n)):
                    values = sum_of([term.values(0, term.rows) for term in terms])
                whole = _cut(block, values, cuts)
                yield from whole if head is None else map(head.lowered, whole)
            elif block.name in pulled.terms:
                found = _assembled(block, pulled.terms.pop(block.name), cuts)
                yield from found if head is None else map(head.lowered, found)
            else:
                rows = len(cotangents) if head is None else head.rows
                zeros = _cut(block, torch.zeros((), device=cotangents.device).expand(n, rows, block.size), cuts)
                yield from zeros if head is None else map(head.lowered, zeros)

    def _groups(self, unsafe: dict[str, str]) -> list[list[ParameterBlock]]:
        """Neighbours of one generic route, differentiated together while their columns fit in one block."""
        routes: dict[str, Exact] = self._plan.exact | dict.fromkeys(unsafe, by_loop)
        groups: list[list[ParameterBlock]] = []
        for block in self._blocks:
            if block.name not in routes:
                continue
            route: Callable[..., Any] = routes[block.name]
            fits = groups and _group_columns(groups[-1]) + block.size <= self._columns
            if fits and routes[groups[-1][0].name] is route:
                groups[-1].append(block)
            else:
                groups.append([block])
        return groups


def _group_columns(group: Sequence[ParameterBlock]) -> int:
    return sum(block.size for block in group)


def _cuts(block: ParameterBlock, columns: int, *, whole: bool) -> list[tuple[int, int]]:
    """Ranges of the parameter's first axis that make its blocks: the same whatever route a batch takes."""
    rows = block.shape[0] if block.shape else 1
    if not block.size:
        return []
    step = rows if whole else max(1, columns // (block.size // rows))
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def _assembled(block: ParameterBlock, terms: list[Term], cuts: list[tuple[int, int]]) -> Iterator[JacobianBlock]:
    """A parameter's terms as blocks."""
    if len(terms) == 1 and isinstance(terms[0], IndexTerm):
        yield terms[0].embedding_block(block.name, block.start)
        return
    for first, last in cuts:
        yield joined(terms, block.name, block.start + first * terms[0].width, first, last)


def _own_rows(block: ParameterBlock, head: Head, cuts: list[tuple[int, int]]) -> Iterator[JacobianBlock]:
    """A parameter of the last call as blocks."""
    width = block.size // block.shape[0]
    for first, last in cuts:
        yield head.own_rows(block.name, block.start + first * width, first, last)


def _cut(block: ParameterBlock, values: Tensor, cuts: list[tuple[int, int]]) -> Iterator[JacobianBlock]:
    """Finished values [n, c, size] as blocks."""
    for first, last in cuts:
        width = block.size // (block.shape[0] if block.shape else 1)
        yield DenseBlock(block.name, block.start + first * width, values[..., first * width : last * width])
