"""gradstore: an out-of-core store of projected per-example gradients for PyTorch classifiers.

The names below are the public interface. Each is imported on first use, so `import gradstore` costs nothing and the
command line can print its help without torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError as _NotInstalled
from importlib.metadata import version as _version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradstore.attribution import attribute
    from gradstore.concat import concat
    from gradstore.errors import GradstoreError
    from gradstore.exact.gram import exact_gram
    from gradstore.export import export
    from gradstore.faithfulness import evaluate
    from gradstore.featurize import featurize
    from gradstore.fingerprint import fingerprint
    from gradstore.forensics import forensics
    from gradstore.fresh import featurize_queries
    from gradstore.gram import gram
    from gradstore.gram_file import Gram, open_gram
    from gradstore.importing import Provenance, import_features
    from gradstore.project import Project, load_project
    from gradstore.projection import Projection
    from gradstore.residual import residual
    from gradstore.rows import Rows
    from gradstore.search.session import Session
    from gradstore.show import image, text
    from gradstore.store import FeatureStore
    from gradstore.store import open_store as open
    from gradstore.surrogate import KernelGLM
    from gradstore.topk import topk
    from gradstore.verify import verify

_WHERE = {
    "FeatureStore": "store",
    "Gram": "gram_file",
    "GradstoreError": "errors",
    "KernelGLM": "surrogate",
    "Project": "project",
    "Projection": "projection",
    "Provenance": "importing",
    "Rows": "rows",
    "Session": "search.session",
    "attribute": "attribution",
    "concat": "concat",
    "evaluate": "faithfulness",
    "exact_gram": "exact.gram",
    "export": "export",
    "featurize": "featurize",
    "featurize_queries": "fresh",
    "fingerprint": "fingerprint",
    "forensics": "forensics",
    "gram": "gram",
    "image": "show",
    "import_features": "importing",
    "load_project": "project",
    "open": "store:open_store",
    "open_gram": "gram_file",
    "residual": "residual",
    "text": "show",
    "topk": "topk",
    "verify": "verify",
}

__all__ = [
    "FeatureStore",
    "GradstoreError",
    "Gram",
    "KernelGLM",
    "Project",
    "Projection",
    "Provenance",
    "Rows",
    "Session",
    "attribute",
    "concat",
    "evaluate",
    "exact_gram",
    "export",
    "featurize",
    "featurize_queries",
    "fingerprint",
    "forensics",
    "gram",
    "image",
    "import_features",
    "load_project",
    "open",
    "open_gram",
    "residual",
    "text",
    "topk",
    "verify",
]

try:
    __version__ = _version("gradstore")
except _NotInstalled:  # a source checkout on the path
    __version__ = "0+source"


class _Package(ModuleType):
    """A package whose public functions win over the modules of the same name.

    Importing `gradstore.topk` would otherwise replace the function `gradstore.topk` by the module.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'gradstore' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    return getattr(import_module(f"gradstore.{module}"), attribute or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


sys.modules[__name__].__class__ = _Package
