"""The tests as on other processors: PyTorch, oneDNN, MKL, OpenBLAS and gradstore are held to what those have.

    python .ci/levels.py LEVEL [--share=N] [pytest's arguments, such as -m numerical]

The levels are the names in `LEVELS`. With `--share=3` each of three levels runs another third of the tests.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
LEVELS = {
    # An x86 processor of before AVX-512. MKL heeds its switch on Intel's processors only.
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "GRADSTORE_SIMD": "avx2",
    },
    # The plainest code that each library has. MKL heeds MKL_CBWR on every processor.
    "plain": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Nehalem",
        "GRADSTORE_SIMD": "plain",
    },
    # This processor, and gradstore as it is where no compiler worked.
    "uncompiled": {"GRADSTORE_SIMD": "none"},
}
"""What each library is told, by the name of a level."""
_SHOW = """
import torch
from gradstore.native import library
print(f"torch {torch.backends.cpu.get_cpu_capability()}, gradstore {library.level() or 'uncompiled'}")
"""


def main(level: str, arguments: list[str]) -> int:
    """Run the tests at a level, after a line that says what is in use there.

    Args:
        level: one of `LEVELS`.
        arguments: `--share=N`, or none, and what is for pytest.

    Returns:
        Pytest's exit status; 0, with a message, where the level is of another family of processors.
    """
    if level != "uncompiled" and platform.machine().lower() not in ("x86_64", "amd64"):
        print(f"{level}: not run, since it is of x86 processors and this is {platform.machine()}")
        return 0
    environment = {**os.environ, **LEVELS[level]}
    if arguments and arguments[0].startswith("--share="):
        count = arguments[0].removeprefix("--share=")
        if count not in map(str, range(1, len(LEVELS) + 1)):
            sys.exit(f"--share={count}: 1 to {len(LEVELS)}, as many as levels; with more, some would run nowhere")
        share = f"{list(LEVELS).index(level) % int(count)}/{count}"
        arguments = [*arguments[1:], "-p", "share", "--share", share]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH"))))
    shown = subprocess.run(
        [sys.executable, "-c", _SHOW], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if shown.returncode:
        print(f"{level}: not run, since gradstore does not load there; the reason stands above", file=sys.stderr)
        return shown.returncode
    print(f"{level}: {shown.stdout.strip()}", flush=True)
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], env=environment, check=False).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in LEVELS:
        sys.exit(f"usage: levels.py {{{','.join(LEVELS)}}} [--share=N] [arguments of pytest]")
    sys.exit(main(sys.argv[1], sys.argv[2:]))
