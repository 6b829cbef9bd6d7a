"""The fused projection for tensors on NVIDIA devices, compiled at first use; see ``src/project.cu``."""

from __future__ import annotations

from gradstore.projection.cuda.cuda_source import nvrtc_version
from gradstore.projection.cuda.driver import OLDEST, device, gave_up, is_hopper, missing
from gradstore.projection.cuda.fused_product import accumulate
from gradstore.projection.cuda.geometry import PRECISIONS, row_tiles

__all__ = [
    "OLDEST",
    "PRECISIONS",
    "accumulate",
    "device",
    "gave_up",
    "is_hopper",
    "missing",
    "nvrtc_version",
    "row_tiles",
]
