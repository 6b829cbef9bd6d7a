"""`gradstore featurize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradstore.errors import shown
from gradstore.machine.byte_counts import AUTO

from .loading import load_project
from .options import (
    PATH,
    alone_option,
    as_json,
    bad_row_option,
    lock_option,
    memory_option,
    parse_count,
    project_options,
    settings_options,
)
from .output import print_json, print_path, say
from .progress import CountBar, FeaturizeBar
from .stopping import keeping, rows_kept

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradstore.featurization.plan import Plan
    from gradstore.store.verify import Damage


@click.command(
    short_help="Store the projected gradients of a split.",
    epilog="Example: gradstore featurize project.py --split train --out stores/train",
)
@project_options
@settings_options
@click.option("--out", required=True, type=PATH, help="Directory of the store.")
@click.option(
    "--batch-size",
    default="auto",
    show_default=True,
    callback=lambda c, p, v: _batch_size(v),
    help="Rows projected together.",
)
@memory_option("auto")
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Read existing shards first, compute damaged ones again.",
)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 1024), help="Processes, on the CPU.")
@click.option("--grow-from", type=PATH, help="A store with a smaller --proj-dim to take over.")
@click.option(
    "--data-check",
    default="all",
    show_default=True,
    type=click.Choice(["all", "sample"]),
    help="Whose inputs are compared before going on: all stored rows', or those of 256 random ones.",
)
@bad_row_option
@click.option("--retry-absent", is_flag=True, help="Compute rows again that were left out.")
@alone_option
@lock_option()
@click.option("--allow-other-versions", is_flag=True, help="Continue a store begun with another torch or device type.")
@as_json
def featurize(
    project_file: Path, options: dict[str, str], split: str, out: Path, as_json: bool, **settings: Any
) -> None:
    """Store the projected per-example gradients of one split.

    The same command continues an interrupted run; a finished store is left alone.
    """
    import gradstore as gs

    project = load_project(project_file, options)
    with keeping(lambda: rows_kept(out)), CountBar("stored inputs", "rows") as compared, FeaturizeBar(split) as bar:
        store = gs.featurize(
            project,
            split=split,
            out=out,
            on_plan=_announce,
            on_damage=_say_damage,
            on_note=say,
            on_data_check=compared.once,
            progress=bar.show,
            **settings,
        )
    if as_json:
        print_json({"store": str(out), **store.card()})
    else:
        say(f"{out}: {store.card()['features']}, " + ("finished" if bar.used else "was finished before; nothing to do"))
        print_path(out)


def _announce(plan: Plan) -> None:
    from gradstore.machine.byte_counts import format_bytes

    together = "each row by itself" if plan.alone else f"rows in groups of {plan.manifest.group}"
    n, parameters = plan.manifest.n, sum(block.size for block in plan.blocks)
    say(
        f"{n:,} rows × {plan.manifest.schema.c} classes × {parameters:,} parameters → {format_bytes(plan.bytes)}; "
        f"{plan.device.type}, {plan.projection.path(plan.device)} projection, {together}"
    )
    for name, route in plan.engine.generic():
        say(f"note: {name} takes a general route, {route}, which is slower")


def _say_damage(damage: Sequence[Damage]) -> None:
    for found in damage:
        say(f"{found.file}: {found.problem}; its rows are computed again")


def _batch_size(value: str) -> int | None:
    if value == AUTO:
        return None
    size = parse_count(value)
    if size is None:
        raise click.BadParameter(f"expected auto or a positive integer, got {shown(value)}")
    return size
