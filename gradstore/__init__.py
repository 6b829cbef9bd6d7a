"""gradstore: an out-of-core store of projected per-example gradients for PyTorch classifiers.

The public names are those that `__init__.pyi` imports. Each is imported on first use, so that `import gradstore` costs
nothing and the command line can print its help without torch; the version too is looked up when it is asked for.
"""

from __future__ import annotations

import ast as _ast
from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import Any as _Any

_WHERE = {
    name.asname: (f"gradstore.{statement.module}", name.name)
    for statement in _ast.parse(_Path(__file__).with_suffix(".pyi").read_text()).body
    if isinstance(statement, _ast.ImportFrom)
    for name in statement.names
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> _Any:
    if name == "__version__":
        return _version()
    if name not in _WHERE:
        raise AttributeError(f"module 'gradstore' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _WHERE[name]
    return getattr(_import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("gradstore")
    except PackageNotFoundError:  # a source checkout on the path
        return "0+source"
