"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from gradstore.arithmetic.names import Choice
from gradstore.errors import shown
from gradstore.kernels.definitions import PROJECTED, projected_kernel
from gradstore.machine.byte_counts import AUTO, PROMISED, format_bytes, parse_bytes
from gradstore.projection.kinds import BY_DEVICE, DEFAULT, KINDS
from gradstore.store.files.lock import LOCKS

from .output import say

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T", str, tuple[str, ...])
# Options that are settings of a store, see `gradstore.featurization.settings`.
_SETTINGS = ("precision", "dtype", "layout", "class_draws", "seed", "projection", "proj_dim")

MOST = 10**6
"""Repetitions that an option may ask for: with more, a command would end in no time that a person waits."""

_MOST_ROWS = 10**8  # that a list of spans may name


class PathType(click.Path):
    """A path, which need not be there. What no system could open is refused, and pipes and devices, which never end.

    Args:
        file: whether it is a file, and may be no directory.
        streams: whether it may be a pipe or a device.
    """

    def __init__(self, *, file: bool = False, streams: bool = False) -> None:
        super().__init__(path_type=Path)
        self._file, self._streams = file, streams

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.Path`."""
        problem = _problem_of(os.fspath(value), file=self._file, streams=self._streams)
        if problem:
            self.fail(f"{shown(os.fspath(value))}: {problem}", param, ctx)
        return super().convert(value, param, ctx)


def _problem_of(path: str, *, file: bool, streams: bool) -> str:
    """Why nothing can be done with a path; empty where something could be."""
    if not path:
        return "the path is empty"
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # as of a zero byte
        return str(error)
    except OSError as error:
        return (error.strerror or "unusable") if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else ""
    if not streams and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return "a pipe or a device, not a file"
    return "a directory, not a file" if file and stat.S_ISDIR(mode) else ""


PATH, FILE = PathType(), PathType(file=True)


def as_json(function: F) -> F:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON value instead of text.")(function)


def project_options(function: F) -> F:
    """The project file and `-o`."""
    function = assignments_option()(function)
    return click.argument("project_file", metavar="PROJECT.PY", type=PATH)(function)


def assignments_option(when: str = "") -> Callable[[F], F]:
    """`-o NAME=VALUE`, for the project; `when` it is heeded, a few words that begin its help."""
    what = "keyword argument of project(); may be repeated."
    return click.option(
        "-o",
        "--option",
        "options",
        multiple=True,
        metavar="NAME=VALUE",
        callback=_parse_assignments,
        help=f"{when}: {what}" if when else what[0].upper() + what[1:],
    )


def settings_options(function: F) -> F:
    """How to featurize: the options that belong to a store's identity, and the device."""
    for option in (
        click.option(
            "--precision",
            default="fast",
            show_default=True,
            type=click.Choice(["fast", "exact"]),
            help="Of products on a GPU: relative error about 2e-4, or 1e-6. A CPU is always exact.",
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:<index>."),
        click.option(
            "--dtype",
            default="float16",
            show_default=True,
            type=click.Choice(["float16", "float32", "int8"]),
            help="Dtype of the stored features.",
        ),
        click.option(
            "--layout",
            default="per-class",
            show_default=True,
            type=click.Choice(["per-class", "sum", "mixed", "sketched"]),
            help="Store every class [n, c, K]; P Σ_c g^c [n, 1, K]; Σ_c P_c g^c [n, 1, K]; or random combinations of "
            "classes, which many classes are differentiated faster by [n, 1, K].",
        ),
        click.option(
            "--class-draws",
            default=32,
            show_default=True,
            type=click.IntRange(2),
            help="Combinations of classes in the layout sketched; K is a multiple.",
        ),
        click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the projection."),
        click.option(
            "--projection",
            default=DEFAULT,
            show_default=True,
            type=click.Choice([*KINDS, BY_DEVICE]),
            help=f"Entries of P: {', '.join(f'{name} ({entries})' for name, entries in KINDS.items())}, "
            f"or {BY_DEVICE}, the faster one here.",
        ),
        click.option(
            "--proj-dim", default=10240, show_default=True, type=click.IntRange(1), help="Projected dimension K."
        ),
        click.option("--split", default="train", show_default=True, help="Split of the project."),
        click.option(
            "--like", type=PATH, help="A store whose settings are taken, as queries need their training rows'."
        ),
    ):
        function = option(function)
    return _without_defaults(function)


def _without_defaults(function: F) -> F:
    """With `--like`, settings that were not typed are the store's, and not the defaults."""

    @wraps(function)
    def call(*arguments: Any, like: Path | None, **options: Any) -> Any:
        context = click.get_current_context()
        if like is not None:
            default = click.core.ParameterSource.DEFAULT
            options = {
                name: value
                for name, value in options.items()
                if name not in _SETTINGS or context.get_parameter_source(name) != default
            }
        return function(*arguments, like=like, **options)

    return cast(F, call)


def alone_option(function: F) -> F:
    """`--alone`."""
    text = "Compute each example by itself, for a model that looks at its batch; slower, as `check --alone` measures."
    return click.option("--alone", is_flag=True, help=text)(function)


def bad_row_option(function: F) -> F:
    """`--on-bad-row`."""
    return click.option(
        "--on-bad-row",
        default="stop",
        show_default=True,
        type=click.Choice(["stop", "skip"]),
        help="A row that cannot be read, is not finite or has no gradient: stop, or leave it out and keep its place.",
    )(function)


def lock_option(when: str = "") -> Callable[[F], F]:
    """`--lock`; `when` it is heeded, a few words that begin its help."""
    ways = "; ".join(f"{name}: {meaning}" for name, meaning in LOCKS.items())
    text = f"{when}: how other writers are kept out" if when else "How other writers are kept out"
    return click.option(
        "--lock", default="auto", show_default=True, type=click.Choice(list(LOCKS)), help=f"{text}. {ways}."
    )


def memory_option(default: str, counts: str = "beside the model and the result") -> Callable[[F], F]:
    """`--memory`; "auto" where it depends on the device; `counts` says what it covers."""
    auto = "; auto is 2GB on a CPU and three quarters of a GPU's memory" if default == AUTO else ""
    return click.option(
        "--memory",
        default=default,
        callback=partial(_promised, or_auto=default == AUTO),
        show_default=True,
        metavar="BYTES",
        help=f"Memory to use, {counts}, e.g. 2GB{auto}.",
    )


def choice_option(name: str, choices: Sequence[Choice], what: str) -> Callable[[F], F]:
    """An option that takes one of some names, the first by default; `what` begins its help, which lists them."""
    names = [choice.name for choice in choices]
    text = f"{what} {'; '.join(map(str, choices))}."
    kind = click.Choice(names)
    return click.option(name, default=names[0], show_default=True, type=kind, metavar="NAME", help=text)


def kernel_option(function: F) -> F:
    """`--kernel`, of those on stored features; the first by default."""
    default = next(iter(PROJECTED))
    option = click.option("--kernel", default=default, callback=known_kernels, show_default=True, help=kernel_help())
    return option(function)


def known_kernels(context: click.Context, parameter: click.Parameter, value: T) -> T:
    """One kernel on stored features or several; a name that is none is refused at once."""
    for name in (value,) if isinstance(value, str) else value:
        projected_kernel(name)
    return value


def kernel_help() -> str:
    """The kernels on stored features."""
    *others, last = (f"{name} ({kernel.note})" if kernel.note else name for name, kernel in PROJECTED.items())
    return f"{', '.join(others)} or {last}."


def parse_rows(context: click.Context, parameter: click.Parameter, value: str | None) -> Sequence[int] | None:
    """Rows written as "0:100", "3,5,8" or a mixture; None for all. One span stays a range, however long it is."""
    if value is None:
        return None
    spans = []
    for part in value.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?::\s*(\d{1,18})\s*)?", part, re.ASCII)
        if match is None:
            raise click.BadParameter(f"expected rows such as 0:100 or 3,5,8, got {shown(value)}", context, parameter)
        start = int(match.group(1))
        spans.append(range(start, int(match.group(2)) if match.group(2) else start + 1))
        if not spans[-1]:
            raise click.BadParameter(f"there are no rows in {shown(part.strip())}", context, parameter)
    if sum(map(len, spans)) > _MOST_ROWS and len(spans) > 1:
        raise click.BadParameter(f"more rows than any split has: {shown(value)}", context, parameter)
    return spans[0] if len(spans) == 1 else [row for span in spans for row in span]


def parse_rows_or_file(context: click.Context, parameter: click.Parameter, value: str) -> Sequence[int] | Path:
    """Rows as `parse_rows` takes them, or the path of a file that lists them."""
    if re.fullmatch(r"[\d\s,:]+", value, re.ASCII):
        return parse_rows(context, parameter, value) or []
    if not Path(value).exists():
        expected = "rows such as 0:100 (100 not among them) or 3,5,8, or a file that is there"
        raise click.BadParameter(f"expected {expected}, got {shown(value)}", context, parameter)
    return FILE.convert(value, parameter, context)


def parse_excluded(context: click.Context, parameter: click.Parameter, value: str) -> Sequence[int] | Path | None:
    """The same, or "none" for no row; None where nothing is said."""
    if not value:
        return None
    return [] if value == "none" else parse_rows_or_file(context, parameter, value)


def _promised(context: click.Context, parameter: click.Parameter, value: str, *, or_auto: bool) -> str:
    """A budget; of one that is too small to be promised, the user is told so."""
    if not (or_auto and value == AUTO) and parse_bytes(value, or_auto=or_auto) < PROMISED:
        say(
            f"note: --memory is kept from {format_bytes(PROMISED)} up; with {value}, tens of megabytes more may "
            "be taken, for the C library keeps some of what is freed"
        )
    return value


def parse_count(text: str) -> int | None:
    """A positive whole number, in digits that everybody reads; None where it is none."""
    return int(text) if re.fullmatch(r"\s*0*[1-9]\d{0,17}\s*", text, re.ASCII) else None


def _parse_assignments(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Values written as NAME=VALUE."""
    options = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"expected NAME=VALUE, got {shown(value)}", context, parameter)
        options[name] = text
    return options
