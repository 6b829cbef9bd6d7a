"""`gradstore remove`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gradstore.errors import UsageError

from .options import PATH, as_json, lock_option, parse_rows_or_file
from .output import on_one_line, print_json, say
from .progress import CountBar
from .stopping import signal_behind

if TYPE_CHECKING:
    import numpy as np


@click.command(
    short_help="Take rows out of a store for good.",
    epilog="Examples: gradstore remove stores/train --rows 17,200:210   "
    "gradstore remove stores/train --rows erase.txt --yes",
)
@click.argument("store", type=PATH)
@click.option(
    "--rows",
    required=True,
    callback=parse_rows_or_file,
    metavar="ROWS|FILE",
    help="Rows such as 17 or 200:210, or a file: one row a line, or a .npy mask or index array.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@lock_option()
@as_json
def remove(store: Path, rows: Sequence[int] | Path, yes: bool, lock: str, as_json: bool) -> None:
    """Take rows out of a store for good: features, logits, labels, pictures and digests.

    They keep their places, empty, and nothing counts them. Indexes are deleted, and built again where they are wanted.
    Surrogates, Gram matrices, exports and copies that were made before are yours to delete.
    """
    import gradstore as gs
    from gradstore.indices import spans
    from gradstore.store.row_list import read_row_list

    n = gs.open(store).manifest.n
    chosen = read_row_list(rows, n, what="rows to remove") if isinstance(rows, Path) else _mask(rows, n)
    places = chosen.nonzero()[0]
    if (
        len(places)
        and not yes
        and not _agreed(f"Remove {len(places)} of {n} rows of {store} for good, {spans(places)}?")
    ):
        say("nothing was removed")
        return
    with CountBar("shards", "shards") as bar:
        now = gs.remove(store, chosen, lock=lock, progress=bar)
    if as_json:
        print_json({"store": str(store), "removed": len(places), **now.card()})
    else:
        say(f"{store}: {len(places)} rows removed")


def _mask(rows: Sequence[int], n: int) -> np.ndarray:
    from gradstore.indices import row_mask

    return row_mask(rows if isinstance(rows, range) else sorted(set(rows)), n, where="--rows")


def _agreed(question: str) -> bool:
    """Ask who sits at the terminal."""
    if not sys.stdin.isatty():
        raise UsageError("removing rows cannot be undone", where="--yes", expected="--yes, since nobody can be asked")
    try:
        return click.confirm(on_one_line(question), err=True)
    except click.Abort as error:
        say("")  # Ctrl-C and Ctrl-D leave the line open
        stop = signal_behind(error)
        if stop is not None:
            raise stop from error
        return False
