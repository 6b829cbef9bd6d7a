"""`gradstore export`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import PATH, as_json, memory_option
from .output import print_json, say
from .writing import OutputFile, Writing


@click.command(
    cls=Writing,
    short_help="Write a store's arrays as .npy or .safetensors.",
    epilog="Examples: gradstore export stores/train train.npy   gradstore export stores/train train.safetensors",
)
@click.argument("store", type=PATH)
@click.argument("file", type=OutputFile())
@memory_option("256MB")
@as_json
def export(store: Path, file: Path, memory: str, as_json: bool) -> None:
    """Write the features of a store as float32 to FILE.npy, or everything but pictures to FILE.safetensors."""
    import gradstore as gs
    from gradstore.store.export import export as write_file

    opened = gs.open(store)
    written = write_file(opened, file, memory=memory)
    if as_json:
        print_json({"file": str(written), "shape": list(opened.shape), "bytes": written.stat().st_size})
    else:
        say(f"wrote {file}")
