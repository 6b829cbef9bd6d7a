"""`gradstore verify`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import PATH, as_json, lock_option
from .output import print_json, print_table, say


@click.command(
    short_help="Compare every stored byte with its digest.",
    epilog="Examples: gradstore verify stores/train   gradstore verify stores/train --repair",
)
@click.argument("store", type=PATH)
@click.option("--repair", is_flag=True, help="Drop damaged shards, for featurize to compute again.")
@lock_option("With --repair")
@as_json
def verify(store: Path, repair: bool, lock: str, as_json: bool) -> None:
    """Compare every stored byte with its digest and name the damaged rows; the exit status is 5 where there are any."""
    from gradstore.indices import spans
    from gradstore.store.verify import verify as verify_store

    found = verify_store(store, repair=repair, lock=lock)
    if as_json:
        print_json(found.as_dict())
    elif found.damage:
        print_table(("file", "rows", "problem"), [(d.file, spans(d.rows), d.problem) for d in found.damage])
    found.require_ok()
    say(
        f"{store}: all {found.rows} stored rows are intact"
        + (f"; {found.missing} are not stored yet" if found.missing else "")
    )
