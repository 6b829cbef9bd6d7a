"""The ways to multiply by P on a GPU, fastest first. Each is proved on the device before it is used (`trust.py`).

- "wgmma" and "mma" are two forms of the fused CUDA source (`cuda/`), for NVIDIA devices of compute capability 9.0 and
  of 8.0 on.
- "sums" adds up integers in shared memory, for a sparse P, on NVIDIA devices of compute capability 8.0 on.
- "triton" is a second implementation that shares nothing with them (`by_triton.py`), for signs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gradstore.projection import cuda
from gradstore.projection.entries import Entries
from gradstore.projection.kinds import kind_of

PRECISIONS = cuda.PRECISIONS
_HERE = Path(__file__).parent


class Accumulate(Protocol):
    """Adds ``block @ P[first_k : first_k + K', start : start + p].T`` to an output in place; see `cuda.accumulate`."""

    def __call__(
        self,
        entries: Entries,
        out: Tensor,
        block: Tensor,
        start: int,
        first_k: int,
        precision: str,
        *,
        workspace: int = ...,
    ) -> None:
        """See the class."""


class GpuPath(Protocol):
    """One way to multiply by P on a GPU."""

    @property
    def name(self) -> str:
        """What it is called in logs and messages."""

    def suits(self, index: int, kind: str) -> bool:
        """Whether this device could take it at all, for entries of this kind."""

    def missing(self, index: int) -> str:
        """What must be installed before it can be used, or ""."""

    def rows(self, kind: str, precision: str) -> tuple[int, ...]:
        """Numbers of rows of which each is computed by another compiled variant; together they need all of them."""

    def versions(self) -> dict[str, str]:
        """What else, beside the device and torch, a verdict on it depends on."""

    def sources(self) -> tuple[Path, ...]:
        """The files that its result depends on."""

    def gave_up(self, index: int) -> str:
        """What a product waited for in vain before the device failed, or ""."""

    def product(self, index: int) -> Accumulate:
        """What multiplies by P on a device."""


@dataclass(frozen=True)
class Fused:
    """The fused CUDA source, by one of two matrix instructions.

    Attributes:
        name: "wgmma" or "mma".
    """

    name: str

    def suits(self, index: int, kind: str) -> bool:
        """See `GpuPath`."""
        if kind_of(kind).fused is None or not _compiles_cuda(index):
            return False
        return self.name == "mma" or cuda.is_hopper(index)

    def missing(self, index: int) -> str:
        """See `GpuPath`."""
        return cuda.missing()

    def rows(self, kind: str, precision: str) -> tuple[int, ...]:
        """See `GpuPath`."""
        return cuda.row_tiles(kind, precision)

    def versions(self) -> dict[str, str]:
        """See `GpuPath`."""
        return _nvrtc()

    def sources(self) -> tuple[Path, ...]:
        """See `GpuPath`."""
        return _cuda_sources()

    def gave_up(self, index: int) -> str:
        """See `GpuPath`."""
        return cuda.gave_up(index, hopper=self.name == "wgmma")

    def product(self, index: int) -> Accumulate:
        """See `GpuPath`."""
        return partial(cuda.accumulate, cuda.device(index, hopper=self.name == "wgmma"))


@dataclass(frozen=True)
class Sums:
    """Sums of integers in shared memory, by CUDA, for a sparse P."""

    name: str = "sums"

    def suits(self, index: int, kind: str) -> bool:
        """See `GpuPath`."""
        return kind_of(kind).sparse is not None and _compiles_cuda(index)

    def missing(self, index: int) -> str:
        """See `GpuPath`."""
        return cuda.missing()

    def rows(self, kind: str, precision: str) -> tuple[int, ...]:
        """See `GpuPath`."""
        return cuda.SUMS_ROW_TILES

    def versions(self) -> dict[str, str]:
        """See `GpuPath`."""
        return _nvrtc()

    def sources(self) -> tuple[Path, ...]:
        """See `GpuPath`."""
        return _cuda_sources()

    def gave_up(self, index: int) -> str:
        """See `GpuPath`; its thread blocks wait for nothing."""
        return ""

    def product(self, index: int) -> Accumulate:
        """See `GpuPath`."""
        return partial(cuda.accumulate_sums, cuda.sums_device(index))


@dataclass(frozen=True)
class ByTriton:
    """The product in Triton."""

    name: str = "triton"

    def suits(self, index: int, kind: str) -> bool:
        """See `GpuPath`."""
        return kind_of(kind).triton and torch.cuda.get_device_capability(index) >= (8, 0)

    def missing(self, index: int) -> str:
        """See `GpuPath`."""
        return _triton_missing()

    def rows(self, kind: str, precision: str) -> tuple[int, ...]:
        """See `GpuPath`."""
        from gradstore.projection import by_triton

        return by_triton.ROW_TILES[precision]

    def versions(self) -> dict[str, str]:
        """See `GpuPath`."""
        import triton

        set_here = {name: value for name, value in os.environ.items() if name.startswith("TRITON_")}
        return {"triton": triton.__version__, **set_here}

    def sources(self) -> tuple[Path, ...]:
        """See `GpuPath`."""
        return _HERE / "by_triton.py", _HERE / "triton_kernels.py"

    def gave_up(self, index: int) -> str:
        """See `GpuPath`; its programs wait for nothing."""
        return ""

    def product(self, index: int) -> Accumulate:
        """See `GpuPath`."""
        from gradstore.projection import by_triton

        return by_triton.accumulate


def _compiles_cuda(index: int) -> bool:
    """Whether a device could run the CUDA sources."""
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= cuda.OLDEST


def _nvrtc() -> dict[str, str]:
    return {"nvrtc": ".".join(map(str, cuda.nvrtc_version()))}


def _cuda_sources() -> tuple[Path, ...]:
    return tuple(sorted(path for path in (_HERE / "cuda").rglob("*") if path.suffix in (".py", ".cu", ".cuh")))


@cache
def _triton_missing() -> str:
    """Why Triton cannot be used, or ""."""
    try:
        from gradstore.projection import triton_kernels

        return "" if triton_kernels.triton.__version__ else "this Triton has no version"
    except Exception as error:  # whatever a broken installation raises
        return f"Triton cannot be imported ({type(error).__name__}: {error}); pip install triton"


PATHS: tuple[GpuPath, ...] = (Fused("wgmma"), Fused("mma"), Sums(), ByTriton())
