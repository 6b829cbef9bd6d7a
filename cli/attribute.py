"""`gradstore attribute`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .loading import load
from .options import PATH, as_json, parse_rows
from .output import on_one_line, print_json, print_table, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradstore.explain.attribution import Attribution


@click.command(
    short_help="Divide a prediction among the training examples.",
    epilog="Example: gradstore attribute surrogate.safetensors stores/test --row 3 --class cat --rather-than dog",
)
@click.argument("surrogate", type=PATH)
@click.argument("queries", type=PATH)
@click.option("--row", type=click.IntRange(0), help="Row of the query.")
@click.option("--rows", callback=parse_rows, help="Or several, e.g. 0:100 or 3,5,8, in one pass.")
@click.option("--class", "wanted", help="Class to explain.  [default: the predicted one]")
@click.option("--rather-than", help="Class to compare it with.")
@click.option("-k", default=5, show_default=True, type=click.IntRange(1), help="Examples for and against.")
@click.option("--train", type=PATH, help="Training store.  [default: where the surrogate was fitted]")
@as_json
def attribute(
    surrogate: Path,
    queries: Path,
    row: int | None,
    rows: Sequence[int] | None,
    wanted: str | None,
    rather_than: str | None,
    k: int,
    train: Path | None,
    as_json: bool,
) -> None:
    """List the training examples that speak most for and against a prediction (eq. 3).

    SURROGATE is a file that `gradstore fit` wrote; QUERIES is a store with the same weights and settings. The
    attributions of all training examples sum to the surrogate's logit.
    """
    _require_one(row, rows)
    import gradstore as gs
    from gradstore.explain.surrogate.saved_file import require_surrogate

    require_surrogate(surrogate)
    asked, store = gs.open(queries), None if train is None else gs.open(train)
    load("KernelGLM", "attribute")
    from gradstore.explain.attribution import class_index

    model = gs.KernelGLM.load(surrogate)
    if row is None:
        every = gs.attributions(model, asked, rows, train=store)
    else:
        every = iter([gs.attribute(model, asked, row, train=store)])

    def record(found: Attribution) -> dict[str, Any]:
        c, other = (None if name is None else class_index(found.classes, name) for name in (wanted, rather_than))
        return found.as_dict(k, c, other)

    records = map(record, every)
    if as_json:
        print_json(next(records) if rows is None else records)
        return
    for i, each in enumerate(records):
        click.echo("\n" if i else "", nl=False)
        _print(each)


def _require_one(row: int | None, rows: Sequence[int] | None) -> None:
    if (row is None) == (rows is None):
        raise click.UsageError("give either --row or --rows")


def _print(record: dict[str, Any]) -> None:
    other = record["rather_than"]
    question = f"why {record['class']}" + (f" rather than {other}" if other else "")
    click.echo(on_one_line(f"query row {record['row']}, {record['predicted']} by the surrogate: {question}?") + "\n")
    rows = [
        (
            sign,
            str(item["row"]),
            on_one_line(item["label"] or "—"),
            f"{item['attribution']:+.4f}",
            f"{item['similarity']:.3f}",
        )
        for sign, name in (("for", "contributors"), ("against", "opponents"))
        for item in record[name]
    ]
    print_table(("speaks", "row", "label", "attribution", "similarity"), rows, right=(1, 3, 4))
    what = "difference of the logits" if other else "logit"
    say(f"all training examples together: {record['sum']:+.4f}, the {what}")
