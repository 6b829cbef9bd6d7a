"""Where a project file is, asked before anything is imported to run it."""

from __future__ import annotations

from pathlib import Path

from gradstore.errors import ProjectError


def project_file(path: str | Path) -> Path:
    """Find a project file.

    Returns:
        Its whole path.

    Raises:
        ProjectError: there is none.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise ProjectError(
            "the project file does not exist", where=path, hint="`gradstore init` writes one to start from"
        )
    return file
