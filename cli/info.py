"""`gradstore info`."""

from __future__ import annotations

from pathlib import Path

import click

from .loading import load
from .options import PATH, as_json
from .output import print_json, print_pairs


@click.command(
    short_help="Describe a store, or this machine.",
    epilog="Examples: gradstore info stores/train   gradstore info --system",
)
@click.argument("store", required=False, type=PATH)
@click.option("--system", is_flag=True, help="Say which projection path, devices and libraries this machine has.")
@as_json
def info(store: Path | None, system: bool, as_json: bool) -> None:
    """Describe a store, or this machine."""
    if (store is None) == (not system):
        raise click.UsageError("name a store, or give --system")
    import gradstore as gs

    if store is not None:
        card = gs.open(store).card()
    else:
        load("Projection")
        from gradstore.featurization.environment import system_card

        card = system_card()
    print_json(card) if as_json else print_pairs(card)
