"""A CUDA device as the product sees it: compiled kernels, and launches on the current stream that are checked."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gradstore.projection.cuda import cuda_source
from gradstore.projection.cuda.geometry import Variant

OLDEST = (8, 0)  # the first with asynchronous copies
_HOPPER = (9, 0)
_PACK_THREADS = 256
# What the product waited for when it gave up; the numbers stand in src/waiting.cuh.
_GAVE_UP = {1: "gradients", 2: "room for gradients", 3: "its turn to add to the output"}


def _many(names: str, kind: type) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names.split())


class Pack(ctypes.Structure):
    """Gradients to scaled 16-bit limbs: ``struct Pack`` in ``src/pack.cuh``."""

    _fields_ = (
        *_many("block packed undo turns", ctypes.c_void_p),
        *_many("rows columns row_stride", ctypes.c_int64),
        *_many("start first_group", ctypes.c_uint64),
        *_many("groups tile_rows padded_rows", ctypes.c_int32),
        ("turn_count", ctypes.c_uint32),
    )


class Job(ctypes.Structure):
    """The product with P: ``struct Job`` in ``src/fold.cuh``."""

    _fields_ = (
        *_many("packed undo out turns trouble", ctypes.c_void_p),
        *_many("rows count out_stride", ctypes.c_int64),
        ("first_group", ctypes.c_uint64),
        *_many("first_k key0 key1 domain", ctypes.c_uint32),
        *_many("groups spans padded_rows row_tiles k_tiles", ctypes.c_int32),
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
    return torch.cuda.get_device_capability(index) == _HOPPER


class CudaDevice:
    """Compiles variants when they are first needed and launches them. Not shared between processes.

    Args:
        index: of the CUDA device.
        hopper: whether to multiply by wgmma instead of mma.

    Raises:
        RuntimeError: from every method, where a call of the driver fails; the text names call and code.
    """

    def __init__(self, index: int, *, hopper: bool) -> None:
        major, minor = torch.cuda.get_device_capability(index)
        self.index, self.hopper = index, hopper
        self.architecture = f"sm_{major}{minor}" + ("a" if (major, minor) == _HOPPER else "")
        self.trouble = torch.zeros(1, dtype=torch.int32, pin_memory=True)  # which the device writes and the host reads
        self._loaded: dict[Variant, dict[str, Any]] = {}
        self._resident: dict[Variant, int] = {}

    def resident(self, variant: Variant) -> int:
        """Thread blocks of the product that the device holds at once."""
        if variant not in self._resident:
            from cuda.bindings import driver

            kernel = self._kernels(variant)[cuda_source.ENTRY]
            size = variant.threads, variant.shared_bytes
            with torch.cuda.device(self.index):
                self._enter()
                found = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(kernel, *size)
            (blocks,) = _check(found, "asking how many blocks fit")
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

    def pack(self, variant: Variant, dtype: torch.dtype, job: Pack, rows: int, spans: int) -> None:
        """Queue the packing of `rows` x `spans` pieces."""
        from cuda.bindings import driver

        kernel = self._kernels(variant)[f"pack_{str(dtype).removeprefix('torch.')}"]
        self._launch(driver.cuLaunchKernel, kernel, (rows, spans), _PACK_THREADS, 0, job, (0,))

    def multiply(self, variant: Variant, job: Job, blocks: int) -> None:
        """Queue the product by `blocks` thread blocks, which wait for one another and so start together."""
        from cuda.bindings import driver

        job.trouble = self.trouble.data_ptr()
        kernel = self._kernels(variant)[cuda_source.ENTRY]
        size = variant.threads, variant.shared_bytes
        self._launch(driver.cuLaunchCooperativeKernel, kernel, (blocks, 1), *size, job, ())

    def gave_up(self) -> str:
        """What the product waited for in vain, or "" if it did not; can be read after an error of the device."""
        code = int(self.trouble[0])
        return _GAVE_UP.get(code, f"something unknown, code {code}") if code else ""

    def _launch(
        self,
        launch: Any,
        kernel: Any,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        job: ctypes.Structure,
        extra: tuple[int, ...],
    ) -> None:
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(job))
        with torch.cuda.device(self.index):
            self._enter()
            stream = torch.cuda.current_stream().cuda_stream
            result = launch(kernel, *grid, 1, threads, 1, 1, shared, stream, ctypes.addressof(arguments), *extra)
            _check(result, "launching the projection")

    def _enter(self) -> None:
        """Make the context that torch uses current: in a new thread there may be none yet."""
        from cuda.bindings import driver

        (context,) = _check(driver.cuCtxGetCurrent(), "asking for the context")
        if int(context) == 0:
            (number,) = _check(driver.cuDeviceGet(self.index), "finding the device")
            (context,) = _check(driver.cuDevicePrimaryCtxRetain(number), "opening the device")
            _check(driver.cuCtxSetCurrent(context), "entering the device's context")

    def _kernels(self, variant: Variant) -> dict[str, Any]:
        if variant not in self._loaded:
            self._loaded[variant] = self._load(variant)
        return self._loaded[variant]

    def _load(self, variant: Variant) -> dict[str, Any]:
        from cuda.bindings import driver

        code = cuda_source.cubin(variant, self.architecture)
        with torch.cuda.device(self.index):
            self._enter()
            (module,) = _check(driver.cuModuleLoadData(code), "loading the projection")
            names = (cuda_source.ENTRY, *cuda_source.PACKS)
            kernels = {name: _check(driver.cuModuleGetFunction(module, name.encode()), name)[0] for name in names}
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            product = kernels[cuda_source.ENTRY]
            _check(driver.cuFuncSetAttribute(product, attribute, variant.shared_bytes), "shared memory")
        return kernels


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


def _check(result: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    """The values of a driver call, or an error that says what failed."""
    code, *values = result
    if int(code) != 0:
        raise RuntimeError(f"{what} failed: {getattr(code, 'name', code)}")
    return tuple(values)
