"""A CUDA device as the fused product sees it: two queues, and kernels that wait for one another and may give up."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradstore.projection.cuda import cuda_source
from gradstore.projection.cuda.geometry import Variant
from gradstore.projection.cuda.launcher import HOPPER, Launcher, check, fields

OLDEST = (8, 0)  # the first with asynchronous copies
# What the product waited for when it gave up; the numbers stand in src/waiting.cuh.
_GAVE_UP = {1: "gradients", 2: "room for gradients", 3: "its turn to add to the output"}


class Pack(ctypes.Structure):
    """Gradients to scaled 16-bit limbs: ``struct Pack`` in ``src/pack.cuh``."""

    _fields_ = (
        *fields("block packed undo turns", ctypes.c_void_p),
        *fields("rows columns row_stride", ctypes.c_int64),
        *fields("start first_group", ctypes.c_uint64),
        *fields("groups tile_rows padded_rows", ctypes.c_int32),
        ("turn_count", ctypes.c_uint32),
    )


class Job(ctypes.Structure):
    """The product with P: ``struct Job`` in ``src/fold.cuh``."""

    _fields_ = (
        *fields("packed undo out turns trouble", ctypes.c_void_p),
        *fields("rows count out_stride", ctypes.c_int64),
        ("first_group", ctypes.c_uint64),
        *fields("first_k key0 key1 domain", ctypes.c_uint32),
        *fields("groups spans padded_rows row_tiles k_tiles", ctypes.c_int32),
    )


def missing() -> str:
    """What the fused product needs and is not installed, or ""."""
    try:
        cuda_source.nvrtc_version()
    except ImportError as error:
        return f"the compiler NVRTC cannot be used ({error}); pip install 'gradstore[cuda]'"
    return ""


_devices: dict[tuple[int, bool], CudaDevice] = {}


def device(index: int, *, hopper: bool) -> CudaDevice:
    """The device of an index, with the kernels of one form of the product that were loaded on it."""
    if (index, hopper) not in _devices:
        _devices[index, hopper] = CudaDevice(index, hopper=hopper)
    return _devices[index, hopper]


def gave_up(index: int, *, hopper: bool) -> str:
    """What a product of this form waited for in vain, or "" if none did; asks nothing of the device."""
    found = _devices.get((index, hopper))
    return found.gave_up() if found else ""


def is_hopper(index: int) -> bool:
    """Whether a device has the instruction wgmma, which no other generation has."""
    return torch.cuda.get_device_capability(index) == HOPPER


class CudaDevice(Launcher):
    """The kernels of one form of the fused product. Not shared between processes.

    Args:
        index: of the CUDA device.
        hopper: whether to multiply by wgmma instead of mma.

    Raises:
        RuntimeError: from every method, where a call of the driver fails; the text names call and code.
    """

    def __init__(self, index: int, *, hopper: bool) -> None:
        super().__init__(index)
        self.hopper = hopper
        self.trouble = torch.zeros(1, dtype=torch.int32, pin_memory=True)  # which the device writes and the host reads
        self._resident: dict[Variant, int] = {}

    def resident(self, variant: Variant) -> int:
        """Thread blocks of the product that the device holds at once."""
        if variant not in self._resident:
            from cuda.bindings import driver

            kernel = self.kernels(variant)[cuda_source.ENTRY]
            size = variant.threads, variant.shared_bytes
            with torch.cuda.device(self.index):
                self.enter()
                found = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(kernel, *size)
            (blocks,) = check(found, "asking how many blocks fit")
            processors = torch.cuda.get_device_properties(self.index).multi_processor_count
            self._resident[variant] = int(blocks) * processors
        return self._resident[variant]

    @contextmanager
    def lanes(self) -> Iterator[StreamLanes]:
        """Packing on a stream of its own, beside the products on the current one, which goes on after both."""
        lanes = StreamLanes(self.index)
        try:
            yield lanes
        finally:
            lanes.join()

    def multiply(self, variant: Variant, job: Job, blocks: int) -> None:
        """Queue the product by `blocks` thread blocks, which wait for one another and so start together."""
        from cuda.bindings import driver

        job.trouble = self.trouble.data_ptr()
        kernel = self.kernels(variant)[cuda_source.ENTRY]
        size = variant.threads, variant.shared_bytes
        self.launch(driver.cuLaunchCooperativeKernel, kernel, (blocks, 1), *size, job, ())

    def gave_up(self) -> str:
        """What the product waited for in vain, or "" if it did not; can be read after an error of the device."""
        code = int(self.trouble[0])
        return _GAVE_UP.get(code, f"something unknown, code {code}") if code else ""


class StreamLanes:
    """Two streams that hand slots of memory to one another; see `product.Lanes`.

    A product leaves no room on a multiprocessor, so packing runs where one has nothing left to do: at the end of each
    launch, when there are fewer tiles than multiprocessors.
    """

    def __init__(self, index: int) -> None:
        self._main, self._side = torch.cuda.current_stream(index), torch.cuda.Stream(index)
        while self._side == self._main:  # torch hands out the same few streams again and again
            self._side = torch.cuda.Stream(index)
        self._side.wait_stream(self._main)
        self._filled: dict[int, torch.cuda.Event] = {}
        self._read: dict[int, torch.cuda.Event] = {}

    @contextmanager
    def packing(self, slot: int) -> Iterator[None]:
        """See `product.Lanes`."""
        if slot in self._read:
            self._side.wait_event(self._read[slot])
        with torch.cuda.stream(self._side):
            yield
        self._filled[slot] = self._side.record_event()

    @contextmanager
    def multiplying(self, slot: int) -> Iterator[None]:
        """See `product.Lanes`."""
        self._main.wait_event(self._filled[slot])
        yield
        self._read[slot] = self._main.record_event()

    def join(self) -> None:
        """Have the current stream wait for both, so that memory which either uses may be given to others after it."""
        self._main.wait_stream(self._side)
