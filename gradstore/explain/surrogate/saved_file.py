"""Whether a saved surrogate is there, asked before anything is imported to read it."""

from __future__ import annotations

import os
from pathlib import Path

from gradstore.errors import UsageError


def require_surrogate(path: Path) -> None:
    """Refuse a path at which nothing is; what else is wrong with it, whoever reads it says.

    Raises:
        UsageError: there is nothing.
    """
    try:
        os.lstat(path)
    except FileNotFoundError as error:
        raise UsageError("there is no surrogate", where=path, hint="`gradstore fit` writes one") from error
    except (OSError, ValueError):
        pass
