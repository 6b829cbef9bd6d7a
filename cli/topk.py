"""`gradstore topk`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import as_json, kernel_help, memory_option, parse_rows
from .output import print_json, print_table, say

if TYPE_CHECKING:
    from gradstore.topk import TopK

SHOWN = 20


@click.command(
    short_help="List the most similar training examples.",
    epilog="Example: gradstore topk stores/train stores/test -k 5 --rows 0:20 --html topk.html",
)
@click.argument("train", type=click.Path(path_type=Path))
@click.argument("queries", type=click.Path(path_type=Path))
@click.option("-k", default=5, show_default=True, type=click.IntRange(1), help="Neighbours a query.")
@click.option("--kernel", default="proj-trntk", show_default=True, help=kernel_help())
@click.option("--rows", callback=parse_rows, help="Query rows, e.g. 0:100 or 3,5,8.  [default: all]")
@click.option("--csv", type=click.Path(path_type=Path), help="Write query_row, rank, train_row, similarity to a file.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with pictures (the first 50 queries).")
@memory_option("1GB")
@as_json
def topk(
    train: Path,
    queries: Path,
    k: int,
    kernel: str,
    rows: list[int] | None,
    csv: Path | None,
    html: Path | None,
    memory: str,
    as_json: bool,
) -> None:
    """List the training examples that the model finds most similar to each query.

    TRAIN and QUERIES are stores of one project, featurized with the same weights and settings.
    """
    import gradstore as gs

    result = gs.topk(gs.open(train), gs.open(queries), k, kernel, rows=rows, memory=memory)
    for path, save in ((csv, result.save_csv), (html, result.save_html)):
        if path is not None:
            say(f"wrote {save(path)}")
    if as_json:
        print_json(result.records())
    else:
        _print(result)


def _print(result: TopK) -> None:
    rows = []
    for record in result.records()[:SHOWN]:
        near = [f"{n['row']}{_label(n['label'])}\n{n['similarity']:.3f}" for n in record["neighbours"]]
        rows.append((str(record["row"]), record["label"] or "", record["predicted"] or "", *near))
    ranks = [f"#{rank}" for rank in range(1, result.k + 1)]
    click.echo(f"the {result.k} most similar training rows by {result.kernel}: row (label), similarity\n")
    print_table(("query", "label", "predicted", *ranks), rows, right=(0,))
    if len(result.rows) > SHOWN:
        say(f"… and {len(result.rows) - SHOWN} more queries; --json, --csv FILE or --html FILE give the rest")


def _label(label: str | None) -> str:
    return f" ({label})" if label is not None else ""
