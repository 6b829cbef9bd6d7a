"""`gradstore init`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import FILE, as_json
from .output import print_json, say


@click.command(
    short_help="Write a project file to start from.", epilog="Example: gradstore init && gradstore check project.py"
)
@click.argument("path", default="project.py", type=FILE)
@as_json
def init(path: Path, as_json: bool) -> None:
    """Write a commented project file, by default project.py, that runs as it is."""
    from gradstore.model.starter_file import STARTER
    from gradstore.store.files.output import write_output

    write_output(path, [STARTER.encode()], keep=True)
    if as_json:
        print_json({"project": str(path)})
    else:
        say(f"wrote {path}; change it to your model and data, then try it with: gradstore check {path}")
