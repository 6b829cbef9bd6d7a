"""The fused projection for tensors on NVIDIA devices, compiled at first use; see ``src/project.cu``."""

from __future__ import annotations

from gradstore.projection.cuda.driver import device, unavailable, usable
from gradstore.projection.cuda.geometry import PRECISIONS
from gradstore.projection.cuda.product import accumulate

__all__ = ["PRECISIONS", "accumulate", "device", "unavailable", "usable"]
