"""Kernels of stored features and their Gram matrices."""
