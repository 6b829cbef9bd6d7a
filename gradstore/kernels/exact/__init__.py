"""Kernels computed from the model itself, without a projection."""

from gradstore.kernels.exact.exact_gram import exact_gram

__all__ = ["exact_gram"]
