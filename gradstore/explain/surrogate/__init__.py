"""The kernel generalised linear model (kGLM): a surrogate of a network, linear in a kernel of its training examples."""

from gradstore.explain.surrogate.kernel_glm import KernelGLM

__all__ = ["KernelGLM"]
