"""Large arrays in memory of their own."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from gradstore.machine.mapped_memory import mapped_zeros


@pytest.mark.parametrize("shape", [(3,), (2, 3, 5), (1 << 18,), (2, 1000, 1024), (0, 4)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_an_array_is_zeros_that_can_be_written(shape: tuple[int, ...], dtype: str) -> None:
    array = mapped_zeros(shape, dtype)
    assert array.shape == shape
    assert array.dtype == dtype
    assert not array.any()
    array[...] = 3
    assert (array == 3).all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory held is read as Linux reports it")
def test_memory_goes_back_whichever_thread_drops_it_and_in_whatever_order() -> None:
    def held() -> int:
        with open("/proc/self/statm") as pages:
            return int(pages.read().split()[1]) * 4096

    before, arrays = held(), []

    def make() -> None:
        for _ in range(8):
            arrays.append(mapped_zeros((4 << 20,), np.uint8))
            arrays[-1][...] = 1

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held() > before + (60 << 20)
    del arrays[1:]  # what is left was mapped first
    assert held() < before + (8 << 20)
