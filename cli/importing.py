"""`gradstore import`."""

from __future__ import annotations

from pathlib import Path

import click

from gradstore.errors import shown

from .options import FILE, PATH, as_json, lock_option, parse_count
from .output import print_json, say
from .stopping import keeping, rows_kept


@click.command(
    name="import",
    short_help="Make a store of another tool's memory map.",
    epilog="Example: gradstore import trak/0/grads.mmap --out stores/train --tool trak --model resnet9.pt",
)
@click.argument("source", type=PATH)
@click.option("--out", required=True, type=PATH, help="Directory of the store.")
@click.option("--tool", required=True, help="What computed the features, e.g. trak or projection_ntk.")
@click.option("--model", required=True, help="Any text that names the weights; other models are never compared.")
@click.option("--projection", default="unknown", show_default=True, help="Kind of the projection.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the projection.")
@click.option("--split", default="train", show_default=True, help="Name of the split.")
@click.option("--shape", help="Of a raw memory map, e.g. 50000,4096 or 1000,10,4096.")
@click.option(
    "--source-dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float16", "float32"]),
    help="Of a raw map.",
)
@click.option("--labels", type=FILE, help="A .npy file of labels.")
@click.option("--logits", type=FILE, help="A .npy file of the network's outputs.")
@click.option("--dtype", default="float16", show_default=True, help="Of the stored features: float16, float32 or int8.")
@lock_option()
@as_json
def import_command(
    source: Path,
    out: Path,
    tool: str,
    model: str,
    projection: str,
    seed: int,
    split: str,
    shape: str | None,
    source_dtype: str,
    labels: Path | None,
    logits: Path | None,
    dtype: str,
    lock: str,
    as_json: bool,
) -> None:
    """Make a store of features [n, K] or [n, c, K] that another tool left in SOURCE: .npy, or a raw memory map."""
    from gradstore.store.array_file import read_array
    from gradstore.store.import_features import Provenance, import_features

    with keeping(lambda: rows_kept(out)):
        store = import_features(
            source,
            out,
            Provenance(tool, model, projection, seed),
            split=split,
            shape=_sizes(shape),
            source_dtype=source_dtype,
            labels=None if labels is None else read_array(labels),
            logits=None if logits is None else read_array(logits),
            dtype=dtype,
            lock=lock,
        )
    if as_json:
        print_json({"store": str(out), **store.card()})
    else:
        say(f"{out}: {store.card()['features']}, imported")


def _sizes(shape: str | None) -> tuple[int, ...] | None:
    if shape is None:
        return None
    sizes = [parse_count(size) for size in shape.split(",")]
    if None in sizes:
        raise click.BadParameter(f"expected sizes like 50000,4096, got {shown(shape)}", param_hint="--shape")
    return tuple(size for size in sizes if size)
