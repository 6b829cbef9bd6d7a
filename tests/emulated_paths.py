"""Paths of a GPU that is not there: the CUDA source on the host and Triton's interpreter, right or with a fault.

Run as a program it checks one of them in this process, as `self_check` does on a device.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from gradstore.projection import cuda, self_check
from gradstore.projection.cuda import cuda_source
from gradstore.projection.kinds import kind_of

TILE = 32
# What is changed in the headers: file, what stands there, what is put in its place.
SOURCE_FAULTS = {
    "permuted": ("entries.cuh", "return 16 * element + chunk;", "return 16 * element + (chunk ^ (chunk == 5));"),
    "wrong-word": ("entries.cuh", "(u32)(b >> 32), k,", "(u32)(b >> 32), k + (b == 1),"),
    "does-not-compile": ("entries.cuh", "constexpr int GROUP", "constant int GROUP"),
    "another-block": ("sums.cu", "FIRST_CALL + j / 4,", "FIRST_CALL + j / 4 + (p == 5),"),
    "unsynchronised": ("sums.cu", "tile, stretch, j);\n            __syncthreads();", "tile, stretch, j);"),
    "rows-of-another-scale": ("sums.cu", "(i64)stretch * job.row_tiles * ROWS + row", "(i64)stretch * ROWS + row"),
}
FAULTS = ("", *SOURCE_FAULTS, "hangs", "dies", "raises", "memory", "killed", "no-device", "no-start")


@dataclass(frozen=True)
class EmulatedPath:
    """One path, for `trust.choose`.

    Attributes:
        name: "wgmma", "mma", "sums" or "triton".
        fault: of `FAULTS`, or "" for none.
        absent: what is to be installed, or "".
    """

    name: str
    fault: str = ""
    absent: str = ""

    def suits(self, index: int, kind: str) -> bool:
        if self.name == "sums":
            return kind_of(kind).sparse is not None
        return kind_of(kind).sparse is None and (self.name != "triton" or kind == "rademacher")

    def missing(self, index: int) -> str:
        return self.absent

    def rows(self, kind: str, precision: str) -> tuple[int, ...]:
        return (TILE,)

    def versions(self) -> dict[str, str]:
        return {"fault": self.fault}

    def sources(self) -> tuple[Path, ...]:
        return ()

    def gave_up(self, index: int) -> str:
        return ""

    def product(self, index: int):
        return self.accumulate

    def accumulate(self, *given, **more) -> None:
        if self.fault == "memory":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "raises":
            raise RuntimeError("launching the projection failed: CUDA_ERROR_LAUNCH_FAILED")
        if self.fault == "dies":
            os._exit(9)
        if self.name == "triton":
            from gradstore.projection import by_triton

            by_triton.accumulate(*given, **more)
            return
        folder = Path(os.environ["EMULATED_FOLDER"]) / (self.fault if self.fault in SOURCE_FAULTS else "right")
        if self.name == "sums":
            from test_cuda_sums import SumsEmulation

            cuda.accumulate_sums(SumsEmulation(folder), *given, **more)
        else:
            from test_cuda_source import Emulation

            cuda.accumulate(Emulation(folder, self.name == "wgmma"), *given, **more)


def spoiled_source(folder: Path, fault: str) -> Path:
    """A copy of the CUDA headers with a fault in it."""
    file, right, wrong = SOURCE_FAULTS[fault]
    if not folder.exists():
        shutil.copytree(cuda_source.FOLDER, folder)
        text = (folder / file).read_text()
        assert right in text, "the fault no longer fits the source"
        (folder / file).write_text(text.replace(right, wrong))
    return folder


def main(arguments: list[str]) -> None:
    """Check a path: index, name:fault, kind, precision."""
    name, _, fault = arguments[1].partition(":")
    if fault == "no-device":
        print(json.dumps({"unavailable": "CUDA-capable device(s) is/are busy or unavailable"}))
        return
    if fault == "no-start":
        raise ImportError("cannot import name 'gradstore'")
    base = Path(os.environ["EMULATED_FOLDER"])
    if fault in SOURCE_FAULTS:
        cuda_source.FOLDER = spoiled_source(base / f"src-{fault}", fault)
    (base / (fault if fault in SOURCE_FAULTS else "right")).mkdir(exist_ok=True)
    if fault == "hangs":
        self_check.FINISH_SECONDS = 0.2
    ended = time.monotonic() if fault != "hangs" else None
    path = EmulatedPath(name, fault)
    cpu, kinds = torch.device("cpu"), arguments[2:4]
    self_check.report(path.accumulate, *kinds, (TILE,), cpu, lambda: lambda: ended is not None, crowd=False)


if __name__ == "__main__":
    main(sys.argv[1:])
