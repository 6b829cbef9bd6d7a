"""gradstore: an out-of-core store of projected per-example gradients for PyTorch classifiers.

The public names are those that `__init__.pyi` imports. Each is imported on first use, so that `import gradstore` costs
nothing and the command line can print its help without torch.
"""

from __future__ import annotations

import ast as _ast
from importlib import import_module as _import_module
from importlib.metadata import PackageNotFoundError as _NotInstalled
from importlib.metadata import version as _version
from pathlib import Path as _Path
from typing import Any as _Any

_WHERE = {
    name.asname: (f"gradstore.{statement.module}", name.name)
    for statement in _ast.parse(_Path(__file__).with_suffix(".pyi").read_text()).body
    if isinstance(statement, _ast.ImportFrom)
    for name in statement.names
}

__all__ = sorted(_WHERE)

try:
    __version__ = _version("gradstore")
except _NotInstalled:  # a source checkout on the path
    __version__ = "0+source"


def __getattr__(name: str) -> _Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'gradstore' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _WHERE[name]
    return getattr(_import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
