"""`gradstore gram`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from gradstore.arithmetic.names import ARITHMETICS
from gradstore.kernels.definitions import EXACT, PROJECTED

from .loading import load, load_project
from .options import PATH, as_json, assignments_option, choice_option, memory_option
from .output import print_json, print_pairs, say
from .progress import CountBar
from .stopping import ON, keeping
from .writing import Writing, output_option


@click.command(
    cls=Writing,
    short_help="Write the matrix of kernel values between all rows.",
    epilog="Examples: gradstore gram stores/train stores/test --out gram.h5   "
    "gradstore gram project.py train test --kernel trntk --out exact.h5",
)
@click.argument("source", metavar="STORE|PROJECT.PY", type=PATH)
@click.argument("sides", nargs=-1, metavar="[STORE|SPLIT]...")
@output_option("--out", "HDF5 file to write; continued where it was interrupted.", required=True, streams=False)
@click.option(
    "--kernel",
    help=f"From stores {', '.join(PROJECTED)}; from a project {', '.join(EXACT)}.  "
    f"[default: {next(iter(PROJECTED))} or {next(iter(EXACT))}]",
)
@choice_option("--arithmetic", ARITHMETICS, "Products from stores:")
@click.option("--layers", help="The final linear layer (ck), or a regular expression of module names (embedding).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:<index>.")
@assignments_option()
@memory_option("2GB")
@as_json
def gram(
    source: Path,
    sides: tuple[str, ...],
    out: Path,
    kernel: str | None,
    arithmetic: str,
    layers: str | None,
    device: str,
    options: Mapping[str, Any],
    memory: str,
    as_json: bool,
) -> None:
    """Write the matrix of kernel values between all rows of two stores, or exactly between two splits of a project.

    With one store or split, the matrix is that of its rows with one another.
    """
    import gradstore as gs

    with (
        keeping(lambda: f"finished parts are kept beside {shlex.quote(str(out))}; {ON}"),
        CountBar("gram", "values") as progress,
    ):
        if source.suffix == ".py":
            a, b = _two(sides, "splits", least=1)
            project = load_project(source, options)
            made = gs.exact_gram(
                project,
                str(a),
                b,
                kernel or next(iter(EXACT)),
                out=out,
                memory=memory,
                device=device,
                layers=layers,
                progress=progress,
            )
            for note in project.notes:
                say(note)
        else:
            (b,) = _two(sides, "stores", least=0)[:1]
            left, right = gs.open(source), gs.open(b) if b is not None else None
            load("gram")
            made = gs.gram(
                left,
                right,
                kernel or next(iter(PROJECTED)),
                out=out,
                memory=memory,
                arithmetic=arithmetic,
                device=device,
                progress=progress,
            )
    facts = {"path": str(made.path), "shape": list(made.shape), **made.attributes}
    if as_json:
        print_json(facts)
    else:
        print_pairs({name: str(value) for name, value in facts.items()})
        say(f"wrote {made.path}")


def _two(sides: tuple[str, ...], what: str, least: int) -> tuple[str | None, str | None]:
    most = least + 1
    if not least <= len(sides) <= most:
        raise click.UsageError(f"expected {least} or {most} {what} after the first argument, got {len(sides)}")
    return (*sides, None, None)[0], (*sides, None, None)[1]
