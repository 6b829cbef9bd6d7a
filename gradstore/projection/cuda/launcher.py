"""Compiled kernels on a CUDA device, and launches on the current stream that are checked."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from gradstore.projection.cuda import cuda_source
from gradstore.projection.cuda.cuda_source import Compiled

HOPPER = (9, 0)
_PACK_THREADS = 256


def fields(names: str, kind: type) -> tuple[tuple[str, type], ...]:
    """Fields of one type, for a structure."""
    return tuple((name, kind) for name in names.split())


class Launcher:
    """Compiles variants when they are first needed and launches their kernels. Not shared between processes.

    Args:
        index: of the CUDA device.

    Raises:
        RuntimeError: from every method, where a call of the driver fails; the text names call and code.
    """

    def __init__(self, index: int) -> None:
        major, minor = torch.cuda.get_device_capability(index)
        self.index = index
        self.architecture = f"sm_{major}{minor}" + ("a" if (major, minor) == HOPPER else "")
        self._loaded: dict[Compiled, dict[str, Any]] = {}

    def kernels(self, variant: Compiled) -> dict[str, Any]:
        """The kernels of a variant by name."""
        if variant not in self._loaded:
            self._loaded[variant] = self._load(variant)
        return self._loaded[variant]

    def pack(self, variant: Compiled, dtype: torch.dtype, job: ctypes.Structure, rows: int, spans: int) -> None:
        """Queue the packing of `rows` x `spans` pieces of gradients."""
        from cuda.bindings import driver

        kernel = self.kernels(variant)[f"pack_{str(dtype).removeprefix('torch.')}"]
        self.launch(driver.cuLaunchKernel, kernel, (rows, spans), _PACK_THREADS, 0, job, (0,))

    def launch(
        self,
        how: Any,
        kernel: Any,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        job: ctypes.Structure,
        extra: tuple[int, ...],
    ) -> None:
        """Queue a kernel on the current stream by one of the driver's calls, which takes `extra` last."""
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(job))
        with torch.cuda.device(self.index):
            self.enter()
            stream = torch.cuda.current_stream().cuda_stream
            result = how(kernel, *grid, 1, threads, 1, 1, shared, stream, ctypes.addressof(arguments), *extra)
            check(result, "launching the projection")

    def enter(self) -> None:
        """Make the context that torch uses current: in a new thread there may be none yet."""
        from cuda.bindings import driver

        (context,) = check(driver.cuCtxGetCurrent(), "asking for the context")
        if int(context) == 0:
            (number,) = check(driver.cuDeviceGet(self.index), "finding the device")
            (context,) = check(driver.cuDevicePrimaryCtxRetain(number), "opening the device")
            check(driver.cuCtxSetCurrent(context), "entering the device's context")

    def _load(self, variant: Compiled) -> dict[str, Any]:
        from cuda.bindings import driver

        code = cuda_source.cubin(variant, self.architecture)
        with torch.cuda.device(self.index):
            self.enter()
            (module,) = check(driver.cuModuleLoadData(code), "loading the projection")
            names = (cuda_source.ENTRY, *cuda_source.PACKS)
            kernels = {name: check(driver.cuModuleGetFunction(module, name.encode()), name)[0] for name in names}
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            product = kernels[cuda_source.ENTRY]
            check(driver.cuFuncSetAttribute(product, attribute, variant.shared_bytes), "shared memory")
        return kernels


def check(result: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    """Look at what a driver call returned.

    Returns:
        Its values.

    Raises:
        RuntimeError: it failed; says what.
    """
    code, *values = result
    if int(code) != 0:
        raise RuntimeError(f"{what} failed: {getattr(code, 'name', code)}")
    return tuple(values)
