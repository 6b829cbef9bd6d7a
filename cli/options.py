"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from gradstore.arithmetic.names import Choice
from gradstore.kernels.definitions import PROJECTED
from gradstore.machine.byte_counts import PROMISED, format_bytes, parse_bytes
from gradstore.projection.kinds import DEFAULT, KINDS
from gradstore.store.files.lock import LOCKS

from .output import say

F = TypeVar("F", bound=Callable[..., Any])

_MOST_ROWS = 10**8  # that a list of spans may name


def as_json(function: F) -> F:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON value instead of text.")(function)


def project_options(function: F) -> F:
    """The project file and `-o`."""
    function = assignments_option()(function)
    return click.argument("project_file", metavar="PROJECT.PY", type=click.Path(path_type=Path))(function)


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
            type=click.Choice(["per-class", "sum", "mixed"]),
            help="Store every class [n, c, K]; P Σ_c g^c [n, 1, K]; or Σ_c P_c g^c [n, 1, K].",
        ),
        click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the projection."),
        click.option(
            "--projection",
            default=DEFAULT,
            show_default=True,
            type=click.Choice(list(KINDS)),
            help=f"Entries of P: {', '.join(f'{name} ({entries})' for name, entries in KINDS.items())}.",
        ),
        click.option(
            "--proj-dim", default=10240, show_default=True, type=click.IntRange(1), help="Projected dimension K."
        ),
        click.option("--split", default="train", show_default=True, help="Split of the project."),
    ):
        function = option(function)
    return function


def alone_option(function: F) -> F:
    """`--alone`."""
    text = "Compute each example by itself, for a model that looks at its batch; slower, as `check --alone` measures."
    return click.option("--alone", is_flag=True, help=text)(function)


def lock_option(when: str = "") -> Callable[[F], F]:
    """`--lock`; `when` it is heeded, a few words that begin its help."""
    ways = "; ".join(f"{name}: {meaning}" for name, meaning in LOCKS.items())
    text = f"{when}: how other writers are kept out" if when else "How other writers are kept out"
    return click.option(
        "--lock", default="auto", show_default=True, type=click.Choice(list(LOCKS)), help=f"{text}. {ways}."
    )


def memory_option(default: str) -> Callable[[F], F]:
    """`--memory`; "auto" where it depends on the device."""
    auto = "; auto is 2GB on a CPU and three quarters of a GPU's memory" if default == "auto" else ""
    return click.option(
        "--memory",
        default=default,
        callback=_promised,
        show_default=True,
        metavar="BYTES",
        help=f"Memory to use beside the model and the result, e.g. 2GB{auto}.",
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
    return click.option("--kernel", default=default, show_default=True, help=kernel_help())(function)


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
            raise click.BadParameter(f"expected rows such as 0:100 or 3,5,8, got {value!r}", context, parameter)
        start = int(match.group(1))
        spans.append(range(start, int(match.group(2)) if match.group(2) else start + 1))
        if not spans[-1]:
            raise click.BadParameter(f"there are no rows in {part.strip()!r}", context, parameter)
    if sum(map(len, spans)) > _MOST_ROWS and len(spans) > 1:
        raise click.BadParameter(f"more rows than any split has: {value!r}", context, parameter)
    return spans[0] if len(spans) == 1 else [row for span in spans for row in span]


def _promised(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """A budget; of one that is too small to be promised, the user is told so."""
    if value != "auto" and parse_bytes(value) < PROMISED:
        say(
            f"note: --memory is kept from {format_bytes(PROMISED)} up; with {value}, tens of megabytes more may "
            "be taken, for the C library keeps some of what is freed"
        )
    return value


def _parse_assignments(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Values written as NAME=VALUE."""
    options = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"expected NAME=VALUE, got {value!r}", context, parameter)
        options[name] = text
    return options
