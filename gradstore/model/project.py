"""`Project`: the user's model, weights, splits and classes, and the file that makes one."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradstore.errors import GradstoreError, ProjectError, UsageError
from gradstore.indices import row_mask
from gradstore.machine.devices import full_float32
from gradstore.model.examples import Examples, Inputs
from gradstore.model.image_and_text import Show
from gradstore.model.model_state import unchanged
from gradstore.model.own_modules import OwnModules
from gradstore.model.project_file import project_file
from gradstore.model.weights import load_weights

Forward = Callable[[nn.Module, Any], Tensor]

_folder: ContextVar[Path] = ContextVar("_folder", default=Path())


@dataclass
class Project:
    """Everything gradstore needs to know about a classifier; a project file returns one.

    Args:
        model: any module whose output is logits [n, c].
        weights: a safetensors file, a state_dict or a training run's file that holds one (loaded with
            `weights_only=True`), an index of shards, or a folder with one of these under Hugging Face's names; relative
            to the project file. None keeps the model as built.
        splits: name -> map-style dataset, `ds[i] -> (x, label)`; x is a tensor or a dict of tensors.
        classes: names of the classes, for reports; default "0", "1", ….
        show: how to show an example: `gs.image(...)`, `gs.text(...)` or None.
        poisoned: split -> bool mask or row indices of poisoned examples, where that is known.
        forward: (model, x) -> logits; default `model(x)`, also where x is a dict.
        parameters: regular expression that the name of a differentiated parameter must match in full.
        root: folder in which `weights` is looked for; `load_project` sets it to that of the project file.

    Attributes:
        notes: lines that a user should know of how the weights were read, once they are.

    Example:
        >>> project = gs.Project(model=torch.nn.Linear(2, 3), splits={"train": [(torch.ones(2), 1)]})
        >>> project.examples("train").labels
        array([1])
    """

    model: nn.Module
    splits: Mapping[str, Any]
    weights: str | Path | None = None
    classes: Sequence[str] | None = None
    show: Show | None = None
    poisoned: Mapping[str, Any] | None = None
    forward: Forward | None = None
    parameters: str = ".*"
    root: Path = field(default_factory=Path, repr=False)
    notes: tuple[str, ...] = field(default=(), init=False, repr=False)
    _loaded: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ProjectError(
                "model is not a torch module",
                where="Project(model=…)",
                expected="nn.Module",
                got=type(self.model).__name__,
            )
        if not isinstance(self.splits, Mapping) or not self.splits:
            raise ProjectError(
                "there are no splits", where="Project(splits=…)", expected='a dict such as {"train": dataset}'
            )
        unknown = set(self.poisoned or {}) - set(self.splits)
        if unknown:
            raise ProjectError(
                "poisoned names unknown splits",
                where="Project(poisoned=…)",
                expected=sorted(self.splits),
                got=sorted(unknown),
            )

    def prepare(self, device: str | torch.device = "cpu") -> Project:
        """Load the weights once, switch to eval mode, move to `device`."""
        if self.weights is not None and not self._loaded:
            self.notes += load_weights(self.model, self.root / self.weights)
            self._loaded = True
        self.model.eval().to(device)
        return self

    def examples(self, split: str, *, skipping: bool = False) -> Examples:
        """Find the examples of one split.

        Args:
            split: its name.
            skipping: rows that cannot be read do not end a run; see `Examples`.

        Returns:
            The examples, none of them read yet.

        Raises:
            UsageError: there is no such split; lists those that exist.
        """
        if split not in self.splits:
            raise UsageError(
                "unknown split", where="--split", expected=f"one of {', '.join(map(str, self.splits))}", got=repr(split)
            )
        return Examples(self.splits[split], split, skipping=skipping)

    def poisoned_mask(self, split: str) -> np.ndarray | None:
        """Which rows of a split are poisoned, bool [n], or None where the project does not say."""
        if not self.poisoned or self.poisoned.get(split) is None:
            return None
        n, where = len(self.examples(split)), f"Project(poisoned[{split!r}])"
        return row_mask(self.poisoned[split], n, where=where, error=ProjectError)

    def logits(self, inputs: Inputs) -> Tensor:
        """Run the model on stacked inputs, without gradients, in full float32 whatever the user has allowed.

        Returns:
            Its outputs [n, classes].

        Raises:
            ProjectError: the forward pass fails, leaves a module in train mode, or returns no [n, classes] tensor.
            GradstoreError: as `forward` raised it.
        """
        first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
        n = len(first)
        with torch.no_grad(), full_float32(first.device), unchanged(self.model):
            try:
                logits = call_model(self.model, inputs, self.forward)
            except GradstoreError:
                raise
            except Exception as error:
                raise ProjectError(
                    "the forward pass fails",
                    where="model",
                    got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                    hint="Run the model on ds[0] by hand; set `forward=` where it needs another call",
                ) from error
        _require_logits(logits, n)
        require_eval(self.model)
        return logits

    def class_names(self, count: int) -> tuple[str, ...]:
        """Name some number of classes; a single logit has one name.

        Returns:
            The names that the project gives, or "0", "1", ….

        Raises:
            ProjectError: the project names another number of classes.
        """
        names = tuple(map(str, self.classes)) if self.classes is not None else tuple(map(str, range(count)))
        if len(names) != count:
            hint = "A model with one logit takes one name" if count == 1 else None
            raise ProjectError(
                "class names do not match the logits",
                where="Project(classes=…)",
                expected=f"{count} names",
                got=len(names),
                hint=hint,
            )
        return names


def call_model(model: nn.Module, inputs: Any, forward: Forward | None) -> Tensor:
    """Logits by the project's own call, or by `model(x)`."""
    return model(inputs) if forward is None else forward(model, inputs)


def require_eval(model: nn.Module) -> None:
    """Refuse a model that is not in eval mode, in which examples would depend on one another or on chance.

    Raises:
        ProjectError: names the first module in train mode.
    """
    for name, module in model.named_modules():
        if module.training:
            raise ProjectError(
                "a module is in train mode although eval() was called",
                where=f"model.{name}" if name else "model",
                expected="eval mode",
                got=type(module).__name__,
                hint="Remove the call of .train() in the model's forward or train method",
            )


def require_deterministic(first: Tensor, second: Tensor) -> None:
    """Refuse a model that computes other logits [n, c] for the same inputs the second time.

    Raises:
        ProjectError: names the first row that differs.
    """
    differ = torch.nonzero(~torch.isclose(first, second, rtol=1e-3, atol=1e-5, equal_nan=True))
    if len(differ):
        i, c = differ[0].tolist()
        raise ProjectError(
            f"the model computes other logits for row {i} the second time",
            where="model",
            expected=f"{first[i, c].item():.6g} again",
            got=f"{second[i, c].item():.6g}",
            hint="Remove the randomness, or the state that a forward pass changes",
        )


def load_project(path: str | Path, options: Mapping[str, Any] | None = None, function: str = "project") -> Project:
    """Run a project file and return its `Project`. It is the only code of the user's that gradstore ever runs.

    The file is run anew every time, and so are the modules that it imports from its own folder, which are this
    project's own: another project may have others of the same names in this process.

    Args:
        path: a Python file with a function `project(...) -> gs.Project`.
        options: keyword arguments of that function; strings are converted to the type of the argument's default.
        function: name of the function.

    Returns:
        The project; paths in it start from the file's folder.

    Raises:
        ProjectError: no such file or function, unknown options, or an exception in the file, whose own line is named.

    Example:
        >>> project = gs.load_project("project.py", {"seed": "1"})
        >>> list(project.splits)
        ['train', 'test']
    """
    file = project_file(path)
    with OwnModules(file.parent).visible() as own, _in_folder(file.parent):
        make = getattr(_run(file, own), function, None)
        if not callable(make):
            raise ProjectError(
                f"the project file has no function {function}()",
                where=path,
                hint="`gradstore init` writes one to start from",
            )
        arguments = _convert_options(make, options or {}, path)
        project = _guarded(lambda: make(**arguments), file)
    if not isinstance(project, Project):
        raise ProjectError(
            f"{function}() returns no Project", where=path, expected="gs.Project(...)", got=type(project).__name__
        )
    project.root = file.parent
    return project


def project_folder() -> Path:
    """Where a path in a project starts from: the folder of the file that is being loaded, or the working directory."""
    return _folder.get()


@contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def _run(file: Path, own: OwnModules) -> ModuleType:
    """Execute the file as a module that classes defined in it can be pickled from; its folder is importable."""
    module = ModuleType("gradstore_project")
    module.__file__ = str(file)
    module.__dict__["__builtins__"] = own.builtins
    sys.modules[module.__name__] = module
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    try:
        code = compile(file.read_bytes(), str(file), "exec")
    except OSError as error:
        raise ProjectError("the project file cannot be read", where=file, got=error.strerror) from error
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise ProjectError(
            f"the project file is not valid Python: {error}", where=f"{file}:{line}" if line else file
        ) from error
    _guarded(lambda: exec(code, module.__dict__), file)
    return module


def _guarded(call: Callable[[], Any], file: Path) -> Any:
    """Run the user's code; an exception becomes one line that names the line of the project file."""
    try:
        return call()
    except GradstoreError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == file]
        line = f":{frames[-1].lineno}" if frames else ""
        source = f"`{frames[-1].line}`" if frames and frames[-1].line else None
        raise ProjectError(
            f"the project file fails with {type(error).__name__}: {error}",
            where=f"{file}{line}",
            got=source,
            hint="--traceback shows the whole of it",
        ) from error


def _convert_options(make: Callable[..., Any], options: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    known = inspect.signature(make).parameters
    converted = {}
    for name, value in options.items():
        if name not in known:
            raise ProjectError(
                "unknown project option", where=f"-o {name}", expected=", ".join(known) or "none", got=name
            )
        default = known[name].default
        try:
            converted[name] = _convert(value, default)
        except ValueError:
            raise ProjectError(
                "the project option has another type",
                where=f"{path} -o {name}",
                expected=type(default).__name__,
                got=repr(value),
            ) from None
    return converted


def _convert(value: Any, default: Any) -> Any:
    if not isinstance(value, str) or default is None or default is inspect.Parameter.empty or isinstance(default, str):
        return value
    if isinstance(default, bool):
        if value.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(value)
        return value.lower() in ("true", "1", "yes")
    return type(default)(value)


def _require_logits(logits: Any, n: int) -> None:
    if not isinstance(logits, Tensor):
        raise ProjectError(
            "the model returns no tensor",
            where="model",
            expected="logits [n, c]",
            got=type(logits).__name__,
            hint="Set `forward=`, for example lambda m, x: m(**x).logits",
        )
    if logits.ndim != 2 or logits.shape[0] != n or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ProjectError(
            "the logits have the wrong shape",
            where="model",
            expected=f"[{n}, c] floating point",
            got=f"{list(logits.shape)} {logits.dtype}".replace("torch.", ""),
            hint="A binary model returns [n, 1]; set `forward=` to pick or reshape the output",
        )
