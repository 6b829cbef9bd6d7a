"""A CUDA device as the product by sums sees it."""

from __future__ import annotations

import ctypes
from functools import cached_property

from gradstore.projection.cuda import cuda_source
from gradstore.projection.cuda.launcher import Launcher, check, fields
from gradstore.projection.cuda.sparse_geometry import THREADS, SumsVariant, tile_rows


class SumsJob(ctypes.Structure):
    """Packing and the product with P: ``struct SumsJob`` in ``src/sums.cu``."""

    _fields_ = (
        *fields("block packed undo out", ctypes.c_void_p),
        *fields("rows columns row_stride count out_stride", ctypes.c_int64),
        ("first_stretch", ctypes.c_uint64),
        ("column", ctypes.c_int64),
        *fields("first_k key0 key1 domain", ctypes.c_uint32),
        *fields("stretches row_tiles", ctypes.c_int32),
    )


_devices: dict[int, SumsDevice] = {}


def sums_device(index: int) -> SumsDevice:
    """The device of an index, with the kernels that were loaded on it."""
    if index not in _devices:
        _devices[index] = SumsDevice(index)
    return _devices[index]


class SumsDevice(Launcher):
    """The kernels of the product by sums; see `Launcher`."""

    @cached_property
    def tile_rows(self) -> int:
        """Rows of gradients whose sums fit the shared memory of a thread block."""
        from cuda.bindings import driver

        self.enter()
        (number,) = check(driver.cuDeviceGet(self.index), "finding the device")
        most = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        (shared_bytes,) = check(driver.cuDeviceGetAttribute(most, number), "asking for shared memory")
        return tile_rows(shared_bytes)

    def multiply(self, variant: SumsVariant, job: SumsJob, blocks: int) -> None:
        """Queue the product of all tiles of gradients with `blocks` blocks of rows of P."""
        from cuda.bindings import driver

        kernel = self.kernels(variant)[cuda_source.ENTRY]
        size = THREADS, variant.shared_bytes
        self.launch(driver.cuLaunchKernel, kernel, (blocks, job.row_tiles), *size, job, (0,))
