"""The kernel generalised linear model (kGLM): a surrogate of a network, linear in a kernel of its training examples."""

from gradstore.surrogate.model import KernelGLM

__all__ = ["KernelGLM"]
