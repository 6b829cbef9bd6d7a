"""The random projection: one definition of P, and the paths that multiply by it.

`Projection` is imported on first use, so that `kinds` can be asked without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradstore.projection.projection import Projection

__all__ = ["Projection"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gradstore.projection.projection import Projection

    return Projection
