"""`gradstore annotate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .loading import load_project
from .options import FILE, PATH, as_json, assignments_option, parse_excluded
from .output import print_json, say
from .progress import CountBar


@click.command(
    short_help="Change labels, marks, exclusions and names of classes.",
    epilog="Examples: gradstore annotate stores/train --from project.py   "
    "gradstore annotate stores/train --from labels.csv --note 'cleaned by hand'",
)
@click.argument("store", type=PATH)
@click.option(
    "--from",
    "source",
    type=FILE,
    help="A project file, or a CSV file with the columns row, and label or poisoned.",
)
@click.option("--split", help="Of the project.  [default: that of the store]")
@assignments_option("With a project file")
@click.option(
    "--exclude",
    default="",
    callback=parse_excluded,
    metavar="ROWS|FILE|none",
    help="Rows that are to count nowhere, such as 17 or 200:210, or a file with one a line; none ends it.",
)
@click.option("--classes", help="Names of the classes, separated by commas.")
@click.option("--note", help="For people; shown by `gradstore info`.")
@as_json
def annotate(
    store: Path,
    source: Path | None,
    split: str | None,
    options: dict[str, str],
    exclude: Sequence[int] | Path | None,
    classes: str | None,
    note: str | None,
    as_json: bool,
) -> None:
    """Change what is said of the rows of a store: labels, poison marks, exclusions, names of classes, a note.

    Features are not computed again, and the store stays comparable with its query stores. Each change is kept in the
    store's history.
    """
    import gradstore as gs
    from gradstore.store.annotation_table import read_annotation_table
    from gradstore.store.row_list import read_row_list

    given: dict[str, Any] = {"classes": classes.split(",") if classes is not None else None, "note": note}
    if source is not None and source.suffix == ".py":
        with CountBar("rows", "rows") as bar:
            gs.annotate_from_project(load_project(source, options), store, split=split, progress=bar)
    elif source is not None:
        given |= read_annotation_table(source, gs.open(store))
    if exclude is not None:
        n = len(gs.open(store))
        given["excluded"] = read_row_list(exclude, n, what="excluded rows") if isinstance(exclude, Path) else exclude
    if any(value is not None for value in given.values()) or source is None:
        gs.annotate(store, **given)
    now = gs.open(store)
    if as_json:
        print_json({"store": str(store), **now.card()})
    else:
        say(f"{store}: {now.annotations.history[-1][1]} changed")
