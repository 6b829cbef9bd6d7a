"""The CUDA source of one variant, and its compilation by NVRTC, kept in a cache by content.

Neither needs a GPU. NVRTC comes with every CUDA build of torch, and so do its bindings, the package ``cuda-bindings``,
from torch 2.11 on; before, the extra ``gradstore[cuda]`` brings them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from gradstore.machine.user_cache import cache_folder, publish

FOLDER = Path(__file__).parent / "src"
ENTRY = "product"
PACKS = ("pack_float32", "pack_float16", "pack_bfloat16")
_DIGEST_BYTES = 32


class Compiled(Protocol):
    """One compiled form of a program; its kernels are `ENTRY` and `PACKS`."""

    @property
    def main(self) -> str:
        """The file in `FOLDER` that is compiled."""

    @property
    def defines(self) -> dict[str, int]:
        """Preprocessor definitions."""

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block of `ENTRY`."""


def source_of(variant: Compiled) -> str:
    """The whole program of a variant; the files it includes are in `FOLDER`."""
    lines = [f"#define {name} {value}" for name, value in variant.defines.items()]
    lines.append('#include "entries.cuh"')
    if variant.defines.get("WGMMA"):
        lines.append(_wgmma(variant.defines["ROWS"]))
    lines.append(f'#include "{variant.main}"')
    return "\n".join(lines) + "\n"


def cubin(variant: Compiled, architecture: str) -> bytes:
    """Get the machine code of a variant: from the cache, or compiled and put there.

    Returns:
        A cubin for an architecture such as "sm_90a".

    Raises:
        ImportError: cuda-bindings or NVRTC is not installed.
        RuntimeError: NVRTC does not accept the source; the text is its log.
    """
    source = source_of(variant)
    path = cache_folder() / f"{_key(source, architecture)}.cubin"
    code = _read(path)
    if code is None:
        code = compile_source(source, architecture)
        with suppress(OSError):  # a cache that cannot be written costs time only
            publish(path, hashlib.sha256(code).digest() + code)
    return code


def compile_source(source: str, architecture: str, report: TextIO | None = None) -> bytes:
    """Compile to machine code; takes seconds.

    Args:
        source: the program.
        architecture: such as "sm_90a".
        report: takes the assembler's notes: registers, spills, losses of performance.

    Returns:
        The cubin.

    Raises:
        ImportError: cuda-bindings or NVRTC is not installed.
        RuntimeError: NVRTC does not accept the source; the text is its log.
    """
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={architecture}", "--std=c++17", f"-I{FOLDER}"]
    if report is not None:
        options.append("--ptxas-options=-v")
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"projection.cu", 0, [], [])
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _fetched(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode().strip("\0\n")
        if int(status) != 0:
            errors = [line for line in log.splitlines() if "error" in line]
            text = errors[0] if errors else log or status.name
            raise RuntimeError(f"NVRTC did not compile the projection for {architecture}: {text}")
        if report is not None:
            report.write(log)
        return _fetched(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _fetched(size_of: Callable[..., Any], fetch: Callable[..., Any], program: Any) -> bytes:
    """What NVRTC writes into a buffer of the size that it names."""
    _, size = size_of(program)
    content = b" " * size
    fetch(program, content)
    return content


def nvrtc_version() -> tuple[int, int]:
    """Ask NVRTC for its version.

    Returns:
        (major, minor).

    Raises:
        ImportError: it is not installed.
    """
    from cuda.bindings import nvrtc

    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the bindings without the library
        raise ImportError(f"NVRTC is missing: {error}") from error
    return int(major), int(minor)


def _key(source: str, architecture: str) -> str:
    digest = hashlib.sha256(f"{architecture} {nvrtc_version()}\n{source}".encode())
    for path in sorted(FOLDER.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> bytes | None:
    """Cached code, unless it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _wgmma(rows: int) -> str:
    """`wgmma` for tiles of `rows` gradients: the instruction names each of its rows / 2 accumulators."""
    sums = rows // 2
    operands = ", ".join(f"%{i}" for i in range(sums))
    a = ", ".join(f"%{sums + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(sum[{i}])' for i in range(sums))
    shape = f"m64n{rows}k16.f32.f16.f16"
    return f"""
__device__ __forceinline__ void wgmma(float (&sum)[{sums}], const u32* a, u64 tile, int add) {{
    asm volatile(
        "{{\\n"
        ".reg .pred add;\\n"
        "setp.ne.b32 add, %{sums + 5}, 0;\\n"
        "wgmma.mma_async.sync.aligned.{shape} {{{operands}}}, {{{a}}}, %{sums + 4}, add, 1, 1, 0;\\n"
        "}}\\n"
        : {outputs}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile), "r"(add));
}}
"""
