"""The sparse projection (SJLT) on a card: a kernel with integer sums in shared memory, and its definition in torch.

Column p of P has one non-zero in each block of 1024 rows. For block j the generator's counter is
``(p mod 2^32, p div 2^32, 2^31 + j div 4, 2 * stream)``; of word ``w = words[j mod 4]`` the upper ten bits are the row
within the block, and bit 0 is the sign of 32.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from gradstore.projection.cuda import cuda_source
from gradstore.projection.philox import MASK32, philox4x32_10, split_key

BLOCK = 1024
_EACH, _ROWS, _PACK_THREADS, _THREADS = 4096, 32, 256, 512
_WORKSPACE = 80 << 20


class Job(ctypes.Structure):
    """``struct Job`` in ``sjlt.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("block", "packed", "unit", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "out_stride")),
        ("first", ctypes.c_uint64),
        ("column", ctypes.c_int64),
        *((name, ctypes.c_uint32) for name in ("key0", "key1", "domain")),
        *((name, ctypes.c_int32) for name in ("spans", "row_tiles")),
    )


class SjltProduct:
    """Adds products with P to an output; see `accumulate`.

    Args:
        architecture: of the device, such as "sm_90a".
    """

    def __init__(self, architecture: str) -> None:
        from cuda.bindings import driver

        code = cuda_source.compile_source((Path(__file__).parent / "sjlt.cu").read_text(), architecture)
        torch.cuda.current_stream().synchronize()
        module = _checked(driver.cuModuleLoadData(code))
        self._pack, self._product = (
            _checked(driver.cuModuleGetFunction(module, name)) for name in (b"pack", b"product")
        )
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self._product, attribute, BLOCK * _ROWS * 4))

    def accumulate(
        self,
        seed: int,
        stream: int,
        out: Tensor,
        block: Tensor,
        start: int,
        *,
        packs: bool = True,
        workspace: int = _WORKSPACE,
    ) -> None:
        """Add ``block @ P[:K, start : start + p].T`` to ``out``.

        Args:
            seed: of P.
            stream: of P.
            out: float32 [rows, K], K a multiple of 1024.
            block: float32 [rows, p].
            start: flat parameter index of the first column.
            packs: False multiplies what lies in the workspace, for timing.
            workspace: bytes of packed gradients; no bit depends on it.
        """
        from cuda.bindings import driver

        (rows, columns), tiles = block.shape, -(-len(block) // _ROWS)
        first, last = start // _EACH, -(-(start + columns) // _EACH)
        most = min(last - first, max(1, workspace // (tiles * _ROWS * _EACH * 4)))
        packed = torch.empty(tiles * most * _EACH * _ROWS, dtype=torch.int32, device=block.device)
        unit = torch.empty(most * tiles * _ROWS, device=block.device)
        for span in range(first, last, most):
            spans = min(most, last - span)
            job = Job(
                *(tensor.data_ptr() for tensor in (block, packed, unit, out)),
                *(rows, columns, block.stride(0), out.stride(0), span * _EACH, span * _EACH - start),
                *(seed & MASK32, seed >> 32, 2 * stream, spans, tiles),
            )
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(job))
            queue, at = torch.cuda.current_stream().cuda_stream, ctypes.addressof(arguments)
            if packs:
                _checked(driver.cuLaunchKernel(self._pack, tiles, spans, 1, _PACK_THREADS, 1, 1, 0, queue, at, 0))
            grid, shared = (out.shape[1] // BLOCK, tiles, 1), BLOCK * _ROWS * 4
            _checked(driver.cuLaunchKernel(self._product, *grid, _THREADS, 1, 1, shared, queue, at, 0))


def _checked(result: tuple) -> object:
    code, *values = result
    assert int(code) == 0, code
    return values[0] if values else None


def places(seed: int, stream: int, p: Tensor, j: int) -> tuple[Tensor, Tensor]:
    """Rows within block j, int64, and signs, float64, of columns p int64."""
    device = p.device
    third, fourth = (torch.full((), word, device=device) for word in (2**31 + j // 4, 2 * stream))
    w = philox4x32_10((p & MASK32, p >> 32, third, fourth), split_key(seed))[j % 4]
    return w >> 22, (w & 1).double() * 2 - 1


def by_definition(seed: int, stream: int, block: Tensor, start: int, K: int) -> Tensor:
    """``block @ P[:K, start : start + p].T`` in float64; small integers exactly, whatever the order of summation."""
    p = start + torch.arange(block.shape[1], device=block.device)
    total = torch.zeros(len(block), K, dtype=torch.float64, device=block.device)
    for j in range(K // BLOCK):
        row, sign = places(seed, stream, p, j)
        total.index_add_(1, j * BLOCK + row, block.double() * (32 * sign))
    return total
