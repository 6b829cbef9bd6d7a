"""`gradstore demo`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from gradstore.projection.kinds import BY_DEVICE, DEFAULT, KINDS

from .loading import load
from .options import PATH, as_json
from .output import print_json, printable, say
from .stopping import ON, keeping


@click.command(
    short_help="Find the poison in a digits classifier.", epilog="Example: gradstore demo demo && open demo/report.html"
)
@click.argument("directory", default="demo", type=PATH)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Seed of the data, the training and the projection.",
)
@click.option(
    "--proj-dim", type=click.IntRange(1), help="Projected dimension K.  [default: 10240, or 4096 without compiled code]"
)
@click.option(
    "--projection",
    default=DEFAULT,
    show_default=True,
    type=click.Choice([*KINDS, BY_DEVICE]),
    help="Entries of P, as of featurize.",
)
@as_json
def demo(directory: Path, seed: int, proj_dim: int | None, projection: str, as_json: bool) -> None:
    """Poison a digits classifier, then find the poison: the whole of gradstore on real data in about a minute.

    Writes DIRECTORY with a project file, weights, three stores and a page with pictures.
    """
    load("featurize", "topk", "residual")
    from gradstore.demo import run

    with keeping(lambda: f"what is finished is kept in {shlex.quote(str(directory))}; {ON}"):
        result = run(directory, seed=seed, proj_dim=proj_dim, projection=projection, progress=say)
    if as_json:
        print_json(result.as_dict())
    else:
        click.echo(printable(result.summary()))
