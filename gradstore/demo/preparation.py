"""The demo's folder before featurize: the project file and the weights it names."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from safetensors.torch import save

from gradstore.demo.training import train
from gradstore.errors import UsageError
from gradstore.model.project import Project, load_project


def project_text(seed: int = 0) -> str:
    """The demo's project file, whose default seed is `seed`."""
    text = files("gradstore.demo").joinpath("digits.py").read_text(encoding="utf-8")
    return text.replace("def project(seed: int = 0)", f"def project(seed: int = {int(seed)})")


def trained_project(folder: Path, seed: int, say: Callable[[str], None]) -> Project:
    """The project in `folder`, written and trained unless it is there already.

    Args:
        folder: made if need be.
        seed: decides the split, which images are poisoned, and the weights.
        say: told what is done.

    Returns:
        The project, its weights loaded.

    Raises:
        UsageError: the folder cannot be written, or holds another `project.py`.
    """
    file, text = folder / "project.py", project_text(seed)
    if not file.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(file, text.encode())
        except OSError as error:
            reason = error.strerror
            raise UsageError("the folder cannot be used", where=folder, got=reason, hint="Choose another") from error
    elif file.read_text(encoding="utf-8") != text:
        raise UsageError(
            "the folder holds another project.py",
            where=file,
            expected=f"the demo's, with seed {seed}",
            hint="Choose another folder",
        )
    project = load_project(file)
    weights = folder / "cnn.safetensors"
    if not weights.exists():
        kind, digits = type(project.model), project.splits["train"]
        poisoned = int(project.poisoned_mask("train").sum())  # type: ignore[union-attr]
        say(f"training a small network on {len(digits):,} digits, {poisoned} of them poisoned")
        _write(weights, save(train(lambda: kind(classes=10), digits, seed)))
    return project.prepare()


def _write(path: Path, content: bytes) -> None:
    """Make a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
