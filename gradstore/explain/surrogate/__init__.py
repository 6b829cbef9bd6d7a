"""The kernel generalised linear model (kGLM): a surrogate of a network, linear in a kernel of its training examples.

`KernelGLM` is imported on first use, so that a file of one can be looked for without torch and scikit-learn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradstore.explain.surrogate.kernel_glm import KernelGLM

__all__ = ["KernelGLM"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gradstore.explain.surrogate.kernel_glm import KernelGLM

    return KernelGLM
