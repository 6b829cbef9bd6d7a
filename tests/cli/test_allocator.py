"""What glibc keeps of freed memory in the process of a command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Blocks of half a megabyte, of which the last stays, once glibc has seen a large one freed.
SCRIPT = """
import sys
import gradstore_cli.allocator
if sys.argv[1] == "set":
    gradstore_cli.allocator.return_large_blocks()
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes, libc.memset.argtypes = (
    ctypes.c_void_p, [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
)
libc.free(libc.malloc(ctypes.c_size_t(30 << 20)))
blocks = [libc.malloc(ctypes.c_size_t(1 << 19)) for _ in range(200)]
for block in blocks:
    libc.memset(block, 1, 1 << 19)
for block in blocks[:-1]:
    libc.free(block)
print(int(open("/proc/self/statm").read().split()[1]) * 4096)
"""


def resident(*arguments: str, **more: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env={**os.environ, **more}, check=True, capture_output=True
    )
    return int(done.stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"), reason="is glibc's"
)
def test_freed_blocks_go_back_to_the_system() -> None:
    usual, ours = resident("leave"), resident("set")
    assert usual - ours > 80e6, "glibc keeps what is below a block that is in use"
    assert resident("set", MALLOC_MMAP_THRESHOLD_="33554432") - ours > 80e6, "who has set it decides"
