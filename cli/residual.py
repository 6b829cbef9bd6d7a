"""`gradstore residual`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .loading import load, load_project
from .options import PATH, as_json, kernel_option, memory_option, project_options
from .output import print_json, print_pairs, say
from .writing import Writing, output_option


@click.command(
    cls=Writing,
    short_help="Compare a projected kernel with the exact one on sampled pairs.",
    epilog="Example: gradstore residual project.py stores/train stores/test --html residual.html",
)
@project_options
@click.argument("train", type=PATH)
@click.argument("queries", required=False, type=PATH)
@kernel_option
@click.option("--pairs", default=900, show_default=True, type=click.IntRange(1), help="Pairs of examples.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the sample.")
@output_option("--csv", "Write every pair to a file.")
@output_option("--html", "Write a page with the distribution of residuals.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:<index>.")
@memory_option("2GB")
@as_json
def residual(
    project_file: Path,
    options: Mapping[str, Any],
    train: Path,
    queries: Path | None,
    kernel: str,
    pairs: int,
    seed: int,
    csv: Path | None,
    html: Path | None,
    device: str,
    memory: str,
    as_json: bool,
) -> None:
    """Compare a projected kernel with the exact one, and the difference with what theory predicts.

    TRAIN and QUERIES are stores of the project; without QUERIES pairs are taken within TRAIN.
    """
    import gradstore as gs

    other, store = None if queries is None else gs.open(queries), gs.open(train)
    project = load_project(project_file, options)
    load("residual")
    found = gs.residual(
        project,
        store,
        other,
        kernel,
        pairs=pairs,
        seed=seed,
        memory=memory,
        device=device,
    )
    for path, save in ((csv, found.save_csv), (html, found.save_html)):
        if path is not None:
            save(path)
            say(f"wrote {path}")
    if as_json:
        print_json(found.as_dict())
    else:
        print_pairs({k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in found.as_dict().items()})
