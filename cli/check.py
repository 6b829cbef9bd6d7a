"""`gradstore check`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .loading import load_project
from .options import alone_option, as_json, bad_row_option, memory_option, project_options, settings_options
from .output import print_hanging, print_json, print_table


@click.command(
    short_help="Try a project before spending hours on it.", epilog="Example: gradstore check project.py --split test"
)
@project_options
@settings_options
@memory_option("auto")
@bad_row_option
@alone_option
@click.option("--routes", is_flag=True, help="List each parameter, how it is differentiated, and what that costs.")
@as_json
def check(
    project_file: Path, options: dict[str, str], split: str, routes: bool, as_json: bool, **settings: Any
) -> None:
    """Try a project before spending hours on it.

    Checks eval mode, logits, repeatable rows, labels and Jacobians; says how large the store would be and how long
    featurize would take. Writes nothing.
    """
    project = load_project(project_file, options)
    from gradstore.featurization.trial import checks

    results = []
    for result in checks(project, split=split, **settings):
        results.append(result)
        if not as_json:
            print_hanging(f"{'ok  ' if result.error is None else 'FAIL'}  {result.name:<12}  ", result.detail)
        if routes and not as_json and result.costs:
            rows = [(cost.name, f"{cost.size:,}", cost.route, f"{cost.share:.1%}") for cost in result.costs]
            print_table(["parameter", "values", "route", "time"], rows, right=(1, 3))
    if as_json:
        listed = {r.name: {"routes": [asdict(cost) for cost in r.costs]} for r in results if routes and r.costs}
        print_json(
            [{"name": r.name, "ok": r.error is None, "detail": r.detail, **listed.get(r.name, {})} for r in results]
        )
    failed = next((r.error for r in results if r.error is not None), None)
    if failed is not None:
        raise failed
