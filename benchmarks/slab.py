"""The rival of the fused product: write a slab of P to memory in bf16, then let cuBLAS multiply."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from gradstore.projection.cuda import cuda_source
from gradstore.projection.entries import Entries

_THREADS = 256


class SlabProduct:
    """Signs of P by slabs of ``columns`` parameters; the generator is the fused product's own.

    Args:
        device: a `CudaDevice`.
        count: rows of P.
        columns: parameters in a slab, a multiple of 4096.
    """

    def __init__(self, device, count: int, columns: int) -> None:
        from cuda.bindings import driver

        text = (Path(__file__).parent / "slab.cu").read_text()
        code = cuda_source.compile_source(text, device.architecture)
        torch.cuda.current_stream().synchronize()
        error, self._module = driver.cuModuleLoadData(code)
        assert int(error) == 0, error
        error, self._kernel = driver.cuModuleGetFunction(self._module, b"signs")
        assert int(error) == 0, error
        self.slab = torch.empty(count, columns, dtype=torch.bfloat16, device="cuda")

    def generate(self, entries: Entries, first_block: int) -> None:
        """Fill the slab with P[:count, 128 * first_block : ...]."""
        from cuda.bindings import driver

        count, columns = self.slab.shape
        values = (
            self.slab.data_ptr(),
            count,
            columns // 128,
            first_block,
            entries.seed & 0xFFFFFFFF,
            entries.seed >> 32,
        )
        kinds = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint64, *(ctypes.c_uint32,) * 3)
        blocks = -(-count * (columns // 128) // _THREADS)
        stream = torch.cuda.current_stream().cuda_stream
        arguments = ((*values, 2 * entries.stream), kinds)
        (error,) = driver.cuLaunchKernel(self._kernel, blocks, 1, 1, _THREADS, 1, 1, 0, stream, arguments, 0)
        assert int(error) == 0, error

    def accumulate(self, entries: Entries, out: Tensor, block: Tensor) -> None:
        """Add ``block @ P.T`` to ``out``; block is bf16 and starts at parameter 0."""
        width = self.slab.shape[1]
        for begin in range(0, block.shape[1], width):
            part = block[:, begin : begin + width]
            self.generate(entries, begin // 128)
            out += torch.mm(part, self.slab[:, : part.shape[1]].T, out_dtype=torch.float32)
