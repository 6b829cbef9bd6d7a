"""Checks on a GPU for `bench_cuda.py`: the tests that need one, and compute-sanitizer."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from cuda_timing import ROOT, Recorder

from gradstore.projection import cuda, trust
from gradstore.projection.device_paths import PATHS
from gradstore.projection.kinds import KINDS


def tests(record: Recorder) -> None:
    """The GPU tests, path by path, a minute a test, after the checks that the first of each kind would wait for."""
    for path in PATHS:
        for kind in KINDS:
            if path.suits(0, kind) and not path.missing(0):
                for precision in cuda.PRECISIONS:
                    found = trust.verdict(path, 0, kind, precision)
                    print(f"{path.name} {kind} {precision}: {found.fault or 'right'}, {found.seconds} s", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "--timeout", "60", "--tb=short"]
    files = [
        "tests/projection/test_cuda_gpu.py",
        "tests/machine/test_streams.py",
        "tests/demo/test_demo.py",
        "-p",
        "no:cacheprovider",
        "-p",
        "failures_at_once",
        "--durations=12",
        *shlex.split(os.environ.get("GPU_TESTS", "")),
    ]
    with_several = ["-n", "4"] if shutil.which("nvidia-smi") else []
    began = time.perf_counter()
    here = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": here}
    code = subprocess.run([*command, *files, *with_several], cwd=ROOT, env=environment).returncode
    record("GPU tests", code, "exit", note=f"{time.perf_counter() - began:.0f} s")
    sys.exit(code)


def sanitizer(record: Recorder) -> None:
    """A small product of each variant under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    code = (
        "import sys, time, torch\n"
        "from gradstore.projection import cuda\n"
        "from gradstore.projection.entries import Entries\n"
        "for hopper in {False, cuda.is_hopper(0)}:\n"
        "    for kind in ('rademacher', 'gaussian'):\n"
        "        for precision in ('fast', 'exact'):\n"
        "            began = time.time()\n"
        "            out, block = torch.zeros(33, 300, device='cuda'), torch.ones(33, COLUMNS, device='cuda')\n"
        "            device = cuda.device(0, hopper=hopper)\n"
        "            cuda.accumulate(device, Entries(kind, 1, 0), out, block, 128, 0, precision)\n"
        "            torch.cuda.synchronize()\n"
        "            print('done', hopper, kind, precision, round(time.time() - began, 1), 's', flush=True)\n"
        "for precision in ('fast', 'exact'):\n"
        "    out, block = torch.zeros(33, 1300, device='cuda'), torch.ones(33, COLUMNS, device='cuda')\n"
        "    cuda.accumulate_sums(cuda.sums_device(0), Entries('sjlt', 1, 0), out, block, 128, 0, precision)\n"
        "    torch.cuda.synchronize()\n"
        "    print('done sums', precision, flush=True)\n"
    )
    failed = 0
    for check, columns in (("memcheck", 20000), ("racecheck", 8192 + 256), ("synccheck", 20000)):
        # Not the driver functions that bindings look up and an older driver lacks: those are reported as errors, too.
        more = ["--report-api-errors", "no"] if check == "memcheck" else []
        program = code.replace("COLUMNS", str(columns))
        command = [tool, "--tool", check, *more, "--error-exitcode", "9", sys.executable, "-c", program]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        timer = threading.Timer(75, os.killpg, (process.pid, signal.SIGKILL))  # with the program that it watches
        timer.start()
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if len(lines) <= 60:
                print(lines[-1], flush=True)
        status = process.wait()
        timer.cancel()
        summary = [line for line in lines if "SUMMARY" in line] or [f"none, {len(lines)} lines"]
        record(check, status, "exit", note="; ".join(summary)[:150])
        failed += status != 0
    sys.exit(failed)
