"""`gradstore topk`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradstore.arithmetic.names import ENGINES

from .loading import load, load_project
from .options import PATH, as_json, assignments_option, choice_option, kernel_option, memory_option, parse_rows
from .output import on_one_line, print_json, print_table, say
from .writing import Writing, output_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradstore.search.topk import TopK
    from gradstore.store.rows import Rows

SHOWN = 20


@click.command(
    cls=Writing,
    short_help="List the most similar training examples.",
    epilog="Examples: gradstore topk stores/train stores/test -k 5 --rows 0:20 --html topk.html, "
    'gradstore topk stores/train project.py --split test --rows 0:100 --classes "cat - dog"',
)
@click.argument("train", type=PATH)
@click.argument("queries", metavar="QUERIES|PROJECT.PY", type=PATH)
@click.option("-k", default=5, show_default=True, type=click.IntRange(1), help="Neighbours a query.")
@kernel_option
@click.option("--rows", callback=parse_rows, help="Query rows, e.g. 0:100 or 3,5,8.  [default: all]")
@click.option("--split", default="test", show_default=True, help="With a project: split of the queries.")
@assignments_option("With a project")
@click.option("--device", default="auto", show_default=True, help="With a project: auto, cpu, cuda or cuda:<index>.")
@click.option(
    "--classes",
    metavar="WEIGHTS",
    help='Compare a combination of logits: "cat - dog" (why the one rather than the other), "cat", or predicted.',
)
@click.option(
    "--mode",
    default="exact",
    show_default=True,
    help="exact: read every row; certified: the same answer through an index; approx: candidates of the index only.",
)
@choice_option("--engine", ENGINES, "With exact, for the same answer:")
@click.option("--error-bars", is_flag=True, help="Show each similarity's standard error, which the projection brings.")
@output_option("--csv", "Write query_row, rank, train_row, similarity to a file.")
@output_option("--html", "Write a page with pictures (the first 50 of queries and neighbours).")
@memory_option("1GB", "the result included, an index beside it")
@as_json
def topk(
    train: Path,
    queries: Path,
    k: int,
    kernel: str,
    rows: Sequence[int] | None,
    split: str,
    options: dict[str, str],
    device: str,
    classes: str | None,
    mode: str,
    engine: str,
    error_bars: bool,
    csv: Path | None,
    html: Path | None,
    memory: str,
    as_json: bool,
) -> None:
    """List the training examples that the model finds most similar to each query.

    TRAIN is a store. The queries are a store of the same project, weights and settings, or a project file, of which
    --rows of --split are then featurized on the spot.
    """
    import gradstore as gs
    from gradstore.store.shared_inputs import shared_inputs

    store = gs.open(train)
    if queries.suffix == ".py":
        asked, rows = _featurize(store, queries, options, split, rows, device), None
    else:
        asked = gs.open(queries)
    load("topk")
    result = gs.topk(
        store,
        asked,
        k,
        kernel,
        rows=rows,
        classes=classes,
        mode=mode,
        memory=memory,
        engine=engine,
        error_bars=error_bars,
    )
    seen = shared_inputs(store, asked) if asked != store else ()
    if len(seen):
        some = ", ".join(str(asked.rows[i]) for i in seen[:5]) + (" …" if len(seen) > 5 else "")
        say(f"note: {len(seen)} of {len(asked)} queries are training rows, byte for byte: rows {some} of {asked.split}")
    if result.search.note:
        say(f"note: {result.search.note}")
    if mode != "exact":
        proof = "exact by proof" if mode == "certified" else f"measured recall@10 {result.search.recall:.4f}"
        say(f"{proof}; {result.search.rows_read} rows read")
    for path, save in ((csv, result.save_csv), (html, result.save_html)):
        if path is not None:
            save(path)
            say(f"wrote {path}")
    if as_json:
        print_json(map(result.record, range(len(result.rows))))
    else:
        _print(result)


def _featurize(
    train: Rows, file: Path, options: dict[str, str], split: str, rows: Sequence[int] | None, device: str
) -> Rows:
    import gradstore as gs

    project = load_project(file, options)
    return gs.featurize_queries(project, train, split=split, rows=rows, device=device)


def _print(result: TopK) -> None:
    rows = []
    for record in map(result.record, range(min(SHOWN, len(result.rows)))):
        near = [f"{n['row']}{_label(n['label'])}\n{n['similarity']:.3f}{_error(n)}" for n in record["neighbours"]]
        rows.append((str(record["row"]), _name(record["label"]), _name(record["predicted"]), *near))
    ranks = [f"#{rank}" for rank in range(1, result.k + 1)]
    click.echo(f"the {result.k} most similar training rows by {result.kernel}: row (label), similarity\n")
    print_table(("query", "label", "predicted", *ranks), rows, right=(0,))
    if len(result.rows) > SHOWN:
        say(f"… and {len(result.rows) - SHOWN} more queries; --json, --csv FILE or --html FILE give the rest")


def _label(label: str | None) -> str:
    return f" ({_name(label)})" if label is not None else ""


def _name(label: str | None) -> str:
    return on_one_line(label or "")


def _error(neighbour: dict[str, Any]) -> str:
    return f"\n± {neighbour['standard_error']:.3f}" if "standard_error" in neighbour else ""
