"""`gradstore forensics`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gradstore.kernels.definitions import PROJECTED

from .loading import load
from .options import FILE, PATH, as_json, kernel_help, known_kernels, memory_option
from .output import print_json, print_pairs, print_table, say
from .writing import Writing, output_option

if TYPE_CHECKING:
    from gradstore.explain.forensics import Forensics
    from gradstore.report.views import Interval

SHOWN = 10


@click.command(
    cls=Writing,
    short_help="Flag queries that trace back to poison.",
    epilog="Example: gradstore forensics stores/train stores/test stores/stamped --html forensics.html",
)
@click.argument("train", type=PATH)
@click.argument("queries", nargs=-1, required=True, type=PATH)
@click.option(
    "--poisoned",
    type=FILE,
    help="Poisoned training rows: one index a line, or a .npy mask or index array.  [default: what the store knows]",
)
@click.option("-k", default=5, show_default=True, type=click.IntRange(1), help="Neighbours that vote.")
@click.option(
    "--votes", default=3, show_default=True, type=click.IntRange(1), help="Votes from which a query is flagged."
)
@click.option(
    "--kernel",
    "kernels",
    multiple=True,
    callback=known_kernels,
    default=list(PROJECTED)[:1],
    show_default=True,
    help=kernel_help() + " May be repeated.",
)
@output_option("--html", "Write a page with pictures.")
@memory_option("1GB", "the results of a kernel included")
@as_json
def forensics(
    train: Path,
    queries: tuple[Path, ...],
    poisoned: Path | None,
    k: int,
    votes: int,
    kernels: tuple[str, ...],
    html: Path | None,
    memory: str,
    as_json: bool,
) -> None:
    """Flag the queries whose most similar training examples are poisoned.

    A query is flagged when at least --votes of its k most similar training examples, over all of them, are poisoned.
    """
    import gradstore as gs
    from gradstore.store.row_list import read_row_list

    store = gs.open(train)
    stores = [gs.open(path) for path in queries]
    mask = None if poisoned is None else read_row_list(poisoned, len(store), what="poisoned rows")
    load("forensics")
    results = [
        gs.forensics(store, stores, poisoned=mask, k=k, votes=votes, kernel=name, memory=memory) for name in kernels
    ]
    if html is not None:
        from gradstore.explain.forensics import forensics_page
        from gradstore.report.page import write_forensics

        write_forensics(forensics_page(results), html)
        say(f"wrote {html}")
    if as_json:
        print_json((result.streamed() for result in results) if len(results) > 1 else results[0].streamed())
        return
    for i, result in enumerate(results):
        click.echo("\n" if i else "", nl=False)
        _print(result)


def _print(result: Forensics) -> None:
    found, k = result.confusion, result.neighbours[0].k
    poisoned, flagged = int(result.poisoned.sum()), int(result.flagged.sum())
    rule = f"≥ {result.threshold} of {k} neighbours poisoned"
    pairs = {
        "kernel": result.kernel,
        "training rows": f"{len(result.train)}, of which {poisoned} are poisoned",
        "flagged": f"{flagged} of {len(result.votes)} queries ({rule})",
    }
    if found is not None:
        pairs["precision"] = _proportion(found.precision, f"{found.tp} of {found.tp + found.fp} flagged are poisoned")
        pairs["recall"] = _proportion(found.recall, f"{found.tp} of {found.tp + found.fn} poisoned are flagged")
        pairs["counts"] = f"TP {found.tp}  FP {found.fp}  FN {found.fn}  TN {found.tn}"
    print_pairs(pairs)
    culprits = result.culprits(SHOWN)
    if culprits:
        click.echo()
        rows = [(str(row), str(count), "yes" if result.poisoned[row] else "no") for row, count in culprits]
        print_table(("training row", "flagged queries that point to it", "poisoned"), rows, right=(0, 1))


def _proportion(interval: Interval | None, meaning: str) -> str:
    if interval is None:
        return f"n/a ({meaning})"
    return f"{interval.value:.3f}  [{interval.low:.3f}, {interval.high:.3f}]  {meaning}"
