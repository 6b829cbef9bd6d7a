"""Kernels of hidden representations: the conjugate kernel, and the embedding kernel over many layers.

Engel et al. (ICLR 2024) define them in App. B and compare them with the tangent kernels. h^l(x) is the output of module
l, flattened; layers are put side by side, so that a sum of their Gram matrices is the Gram matrix of one feature map.

The embedding kernel comes with two normalisations. "embedding" divides the summed Gram matrix by its diagonal, as the
scripts published with the paper do, which gives a unit diagonal. "embedding-layerwise" is the formula of App. B, see
`layerwise`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from gradstore.arithmetic.float32 import Float32Operand
from gradstore.arithmetic.product import Operand, multiply
from gradstore.errors import NonFiniteError, ProjectError, UsageError
from gradstore.featurization.plan import to_device
from gradstore.jacobians.subject import length, take
from gradstore.kernels.definitions import Kernel
from gradstore.kernels.exact.example_selection import Selection
from gradstore.kernels.exact.layerwise import Layered, multiply_layered
from gradstore.kernels.gram_tiles import Skip, Tile, nothing, plan_grid
from gradstore.machine.devices import choose_device
from gradstore.model.examples import Inputs
from gradstore.model.project import Project
from gradstore.model.weights import weights_digest


class RepresentationTiles:
    """The tiles of one representation kernel between two selections of examples.

    Attributes:
        shape: of the matrix.
        grid: how it is cut.
        layers: the modules whose inputs ("ck") or outputs are compared.
    """

    def __init__(
        self, project: Project, a: Selection, b: Selection, kernel: Kernel, memory: int, device: str, layers: str | None
    ) -> None:
        self.project, self.a, self.b, self.kernel = project, a, b, kernel
        self.device = choose_device(device)
        project.prepare(self.device)
        probe = to_device(a.read(range(min(2, len(a)))), self.device)
        choose = final_linear if kernel.name == "ck" else modules_matching
        self.layers = choose(project, probe, layers)
        widths = [part.shape[1] for part in self._representations(probe)]
        held = 4 * sum(widths) + (8 * len(widths) if self._layerwise else 0)
        self.grid = plan_grid(
            len(a),
            len(b),
            symmetric=a is b,
            held=held,
            loading=12 * sum(widths),
            value=20 if self._layerwise else 12,
            memory=memory,
            ahead=False,
        )
        self.shape = (len(a), len(b))

    def tiles(self, skip: Skip = nothing) -> Iterator[Tile]:
        """Compute the tiles that are not to be skipped."""
        if self._layerwise:
            load = partial(self._load_layered, self.a), partial(self._load_layered, self.b)
            return self.grid.tiles(*load, multiply_layered, skip)
        return self.grid.tiles(partial(self._load, self.a), partial(self._load, self.b), multiply, skip)

    def attributes(self) -> dict[str, str | int]:
        """What the matrix is, for its file."""
        return {
            "kernel": self.kernel.name,
            "formula": self.kernel.formula,
            "symmetric": int(self.a is self.b),
            "weights": weights_digest(self.project.model),
            "layers": ", ".join(self.layers),
            "split_a": self.a.split,
            "split_b": self.b.split,
            "data_a": self.a.digest,
            "data_b": self.b.digest,
        }

    @property
    def _layerwise(self) -> bool:
        return self.kernel.name == "embedding-layerwise"

    def _load(self, selection: Selection, rows: range) -> Operand:
        return self._operand(torch.cat(self._parts(selection, rows), dim=1), selection, rows)

    def _load_layered(self, selection: Selection, rows: range) -> Layered:
        parts = self._parts(selection, rows)
        norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts]
        own = selection.rows[rows.start : rows.stop]
        return Layered(self._operand(torch.cat(parts, dim=1), selection, rows), torch.stack(norms, dim=1).square(), own)

    def _parts(self, selection: Selection, rows: range) -> list[Tensor]:
        return self._representations(to_device(selection.read(rows), self.device))

    def _operand(self, phi: Tensor, selection: Selection, rows: range) -> Operand:
        norms = _norms(phi, selection.rows[rows.start : rows.stop], selection.split, "all chosen layers")
        if not self.kernel.normalised:
            norms = torch.ones(len(phi), dtype=torch.float64)
        made = Float32Operand.empty(len(phi), 1, phi.shape[1], normalised=self.kernel.normalised)
        made.fill(0, phi[:, None], 1 / norms[:, None], rows)
        return made

    def _representations(self, inputs: Inputs) -> list[Tensor]:
        """[n, width] float32 on the CPU for each layer."""
        taken = capture(self.project, inputs, self.layers, of_inputs=self.kernel.name == "ck")
        return [taken[name].float().cpu() for name in self.layers]


def capture(project: Project, inputs: Inputs, layers: Sequence[str], *, of_inputs: bool) -> dict[str, Tensor]:
    """What goes into or comes out of some modules in one forward pass, [n, width] each.

    Modules that are called several times give their calls side by side.

    Returns:
        Name -> [n, width].

    Raises:
        ProjectError: a module is not called, or what it is given or gives is not one tensor with a row an example.
    """
    n = length(inputs)
    calls: dict[str, list[Tensor]] = {name: [] for name in layers}

    def hook(name: str) -> Callable[..., None]:
        def take(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            calls[name].append(_by_example(args[0] if of_inputs and args else output, n, name))

        return take

    with ExitStack() as stack:
        for name in layers:
            handle = project.model.get_submodule(name).register_forward_hook(hook(name))
            stack.callback(handle.remove)
        project.logits(inputs)
    for name, found in calls.items():
        if not found:
            raise ProjectError("the module is not called in the forward pass", where=f"model.{name}")
    return {name: torch.cat(found, dim=1) for name, found in calls.items()}


def final_linear(project: Project, inputs: Inputs, name: str | None) -> list[str]:
    """The linear layer whose output is the logits.

    Returns:
        Its name, or the one that was given.

    Raises:
        UsageError: the model has no module of that name.
        ProjectError: no linear layer gives the logits.
    """
    modules = dict(project.model.named_modules())
    if name is not None:
        if name not in modules:
            raise UsageError(
                "the model has no such module", where="--layers", got=repr(name), hint=_linear_names(modules)
            )
        return [name]
    outputs: list[tuple[str, Tensor]] = []
    with ExitStack() as stack:
        for path, module in modules.items():
            if isinstance(module, nn.Linear):
                note = lambda _module, _args, output, path=path: outputs.append((path, output))  # noqa: E731
                stack.callback(module.register_forward_hook(note).remove)
        logits = project.logits(inputs)
    for path, output in reversed(outputs):
        if output.shape == logits.shape and torch.equal(output, logits):
            return [path]
    raise ProjectError(
        "no linear layer gives the logits, so its input is not known",
        where="model",
        hint=f"Name the final layer with --layers. {_linear_names(modules)}",
    )


def modules_matching(project: Project, inputs: Inputs, pattern: str | None) -> list[str]:
    """Modules by name, in the order of the model.

    By default those without submodules that give a tensor with a row an example: embeddings of positions, which are the
    same for all examples, are left out.

    Returns:
        Their names.

    Raises:
        UsageError: the pattern is no regular expression, or matches no module; or no module gives such a tensor.
    """
    modules = {name: module for name, module in project.model.named_modules() if name}
    if not modules:
        raise UsageError("the model has no submodules", where="model", hint="Wrap it in a torch.nn.Sequential")
    if pattern is None:
        leaves = [name for name, module in modules.items() if not any(module.children())]
        return _with_a_row_an_example(project, inputs, leaves)
    try:
        chosen = [name for name in modules if re.fullmatch(pattern, name)]
    except re.error as error:
        raise UsageError("not a regular expression", where="--layers", got=f"{pattern!r}: {error}") from error
    if not chosen:
        raise UsageError("no module has such a name", where="--layers", expected=", ".join(modules), got=repr(pattern))
    return chosen


def _with_a_row_an_example(project: Project, inputs: Inputs, names: list[str]) -> list[str]:
    """Those that the forward pass calls and that give, for one example and for two, a tensor with as many rows.

    Others are left out: what is unused, tuples, batches on another axis, and what is the same for all examples, such as
    the embeddings of positions.

    Returns:
        Their names.

    Raises:
        UsageError: there is none.
    """
    pair = take(inputs, torch.arange(2) % length(inputs))
    found = set(names)
    for n in (1, 2):
        rows: dict[str, list[bool]] = {name: [] for name in names}
        with ExitStack() as stack:
            for name in names:
                note = partial(_note_rows, rows[name], n)
                stack.callback(project.model.get_submodule(name).register_forward_hook(note).remove)
            project.logits(take(pair, slice(0, n)))
        found &= {name for name, calls in rows.items() if calls and all(calls)}
    if not found:
        raise UsageError(
            "no module gives a tensor with a row an example", where="model", hint="Choose modules with --layers"
        )
    return [name for name in names if name in found]


def _note_rows(calls: list[bool], n: int, module: nn.Module, args: tuple[object, ...], output: object) -> None:
    calls.append(_has_rows(output, n))


def _has_rows(value: object, n: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == n


def _by_example(value: object, n: int, name: str) -> Tensor:
    if isinstance(value, Tensor) and _has_rows(value, n):
        return value.detach().reshape(n, -1).clone()  # a layer that works in place may be about to overwrite it
    got = f"{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ProjectError(
        "the module's representation is not one row an example",
        where=f"model.{name}",
        expected=f"a tensor [{n}, …]",
        got=got,
        hint="Choose other modules with --layers",
    )


def _norms(values: Tensor, rows: np.ndarray, split: str, name: str) -> Tensor:
    norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
    bad = torch.nonzero(~(torch.isfinite(norms) & (norms > 0)))
    if len(bad):
        i = int(bad[0])
        raise NonFiniteError(
            f"the representation of row {rows[i]} has no direction, so its cosine is undefined",
            where=f"split {split!r}, {name}",
            expected="a finite norm above zero",
            got=f"norm {norms[i].item()}",
        )
    return norms


def _linear_names(modules: dict[str, nn.Module]) -> str:
    return "Linear layers are " + (", ".join(n for n, m in modules.items() if isinstance(m, nn.Linear)) or "none")
