"""`gradstore index`."""

from __future__ import annotations

from pathlib import Path

import click

from .loading import load
from .options import PATH, as_json, kernel_option, memory_option
from .output import print_json, print_pairs
from .progress import CountBar


@click.command(
    short_help="Build the index of a training store.",
    epilog="Example: gradstore index stores/train, then gradstore topk stores/train stores/test --mode certified",
)
@click.argument("train", type=PATH)
@kernel_option
@click.option("--size", type=int, help="Dimensions of the sketch, at most 512.  [default: what 1 % of the store holds]")
@click.option("--faiss", metavar="FACTORY", help='Build a FAISS index besides, e.g. "HNSW32" or "RaBitQ".')
@click.option("--on", default="sketch", show_default=True, help="What the FAISS index holds: sketch or full features.")
@click.option("--recall/--no-recall", default=True, show_default=True, help="Measure recall@10 of approximate search.")
@click.option("--rebuild", is_flag=True, help="Build it even if there is a good one.")
@memory_option("1GB")
@as_json
def index(
    train: Path,
    kernel: str,
    size: int | None,
    faiss: str | None,
    on: str,
    recall: bool,
    rebuild: bool,
    memory: str,
    as_json: bool,
) -> None:
    """Build the index through which topk finds the same neighbours by reading a few rows.

    The index is a cache inside the store: opened if it is good, extended if the store has grown, else built again.
    """
    import gradstore as gs

    store = gs.open(train)
    load("Session")
    with CountBar("sketch", "rows") as bar:
        session = gs.Session(store, kernel, size=size, faiss=faiss, on=on, rebuild=rebuild, memory=memory, progress=bar)
    card = session.card()
    if recall:
        card["recall@10"] = f"{session.recall():.4f}, measured on rows that the index was not fitted to"
    if as_json:
        print_json(card)
    else:
        print_pairs(card)
