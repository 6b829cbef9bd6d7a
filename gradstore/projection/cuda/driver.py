"""A CUDA device as the product sees it: compiled kernels, and launches on the current stream that are checked."""

from __future__ import annotations

import ctypes
import warnings
from functools import cache
from typing import Any

import torch

from gradstore.errors import UsageError
from gradstore.projection.cuda import source
from gradstore.projection.cuda.geometry import Variant
from gradstore.projection.cuda.jobs import Job, Pack

_OLDEST = (8, 0)  # the first with asynchronous copies
_HOPPER = (9, 0)
_PACK_THREADS = 256


def unavailable(index: int) -> str:
    """Why the fused product cannot run on a CUDA device, or "" if it can."""
    if torch.version.hip is not None:
        return "it is not an NVIDIA device"
    if torch.cuda.get_device_capability(index) < _OLDEST:
        return f"{torch.cuda.get_device_name(index)} is older than compute capability 8.0"
    try:
        source.nvrtc_version()
        source.cuda_core()
    except ImportError as error:
        return f"cuda-core is not usable ({error}); pip install 'gradstore[cuda]'"
    return ""


@cache
def usable(index: int | None) -> bool:
    """Whether the fused product can run on a CUDA device (None: the current one); if not, says why once."""
    why = unavailable(torch.cuda.current_device() if index is None else index)
    if why:
        warnings.warn(f"projecting with the slow reference on the GPU: {why}", RuntimeWarning, stacklevel=4)
    return not why


@cache
def device(index: int) -> CudaDevice:
    """The device of an index, with the kernels that were loaded on it."""
    return CudaDevice(index)


class CudaDevice:
    """Compiles variants when they are first needed and launches them. Not shared between processes.

    Args:
        index: of the CUDA device.
    """

    def __init__(self, index: int) -> None:
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        self.index, self.processors = index, properties.multi_processor_count
        self.hopper = capability == _HOPPER
        self.architecture = f"sm_{properties.major}{properties.minor}" + ("a" if self.hopper else "")
        self._loaded: dict[Variant, dict[str, Any]] = {}

    def pack(self, variant: Variant, dtype: torch.dtype, job: Pack, rows: int, spans: int) -> None:
        """Queue the packing of `rows` x `spans` pieces."""
        kernel = self._kernels(variant)[f"pack_{str(dtype).removeprefix('torch.')}"]
        self._launch(kernel, (rows, spans), _PACK_THREADS, 0, job)

    def multiply(self, variant: Variant, job: Job, blocks: int) -> None:
        """Queue the product by `blocks` thread blocks, each of which must find a free multiprocessor in time."""
        kernel = self._kernels(variant)[source.ENTRY]
        self._launch(kernel, (blocks, 1), variant.threads, variant.shared_bytes, job)

    def _launch(self, kernel: Any, grid: tuple[int, int], threads: int, shared: int, job: ctypes.Structure) -> None:
        from cuda.bindings import driver

        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(job))
        with torch.cuda.device(self.index):
            self._enter()
            stream = torch.cuda.current_stream().cuda_stream
            _check(
                driver.cuLaunchKernel(kernel, *grid, 1, threads, 1, 1, shared, stream, ctypes.addressof(arguments), 0),
                "launching the projection",
            )

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

        try:
            code = source.cubin(variant, self.architecture)
        except RuntimeError as error:
            raise UsageError(
                "the fused projection does not compile",
                where=self.architecture,
                got=str(error),
                hint='Update nvidia-cuda-nvrtc, or choose backend="reference"',
            ) from error
        with torch.cuda.device(self.index):
            self._enter()
            (module,) = _check(driver.cuModuleLoadData(code), "loading the projection")
            names = (source.ENTRY, *source.PACKS)
            kernels = {name: _check(driver.cuModuleGetFunction(module, name.encode()), name)[0] for name in names}
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            product = kernels[source.ENTRY]
            _check(driver.cuFuncSetAttribute(product, attribute, variant.shared_bytes), "shared memory")
        return kernels


def _check(result: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    """The values of a driver call, or an error that says what failed."""
    code, *values = result
    if int(code) != 0:
        raise RuntimeError(f"{what} failed: {getattr(code, 'name', code)}")
    return tuple(values)
