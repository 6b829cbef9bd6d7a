"""Products with P for tensors on NVIDIA devices, compiled at first use; see ``src/project.cu`` and ``src/sums.cu``."""

from __future__ import annotations

from gradstore.projection.cuda.cuda_source import nvrtc_version
from gradstore.projection.cuda.driver import OLDEST, device, gave_up, is_hopper, missing
from gradstore.projection.cuda.fused_product import accumulate
from gradstore.projection.cuda.geometry import PRECISIONS, row_tiles
from gradstore.projection.cuda.sparse_driver import sums_device
from gradstore.projection.cuda.sparse_geometry import SUMS_ROW_TILES
from gradstore.projection.cuda.sparse_product import accumulate_sums

__all__ = [
    "OLDEST",
    "PRECISIONS",
    "SUMS_ROW_TILES",
    "accumulate",
    "accumulate_sums",
    "device",
    "gave_up",
    "is_hopper",
    "missing",
    "nvrtc_version",
    "row_tiles",
    "sums_device",
]
