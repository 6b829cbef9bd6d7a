"""What takes a second or more to import: after what can be refused without it, and not without a word."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import is_drawable

if TYPE_CHECKING:
    from gradstore.model.project import Project

_LINE = "loading torch …"


def load(*names: str) -> None:
    """Import what some public names of gradstore stand on.

    A terminal shows meanwhile what the wait is for, on a line that is gone when anything else is written.

    Args:
        names: of functions or classes in `gradstore` that need torch.
    """
    import gradstore as gs

    with _shown():
        for name in names:
            getattr(gs, name)


def load_project(file: Path, options: Mapping[str, Any]) -> Project:
    """Run a project file; one that is not there is refused before torch is imported.

    Returns:
        Its project.

    Raises:
        ProjectError: see `gradstore.load_project`.
    """
    import gradstore as gs
    from gradstore.model.project_file import project_file

    project_file(file)
    load("load_project")
    return gs.load_project(file, options)


@contextmanager
def _shown() -> Iterator[None]:
    """Show the line within, where somebody looks and waits."""
    if "torch" in sys.modules or not is_drawable():
        yield
        return
    print(_LINE, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # and what a terminal has shown beside it, such as ^C
