"""What commands take on small stores, where starting is most of it: each in a fresh process, on a terminal.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_starting [--repeats 5] [--before PYTHON] [--only WORD ...]

appends to results/starting.csv. `--before` names the Python of another checkout; its commands run in turn with these.
The stores are those of `gradstore init`: 256 and 64 rows of 10 classes, K = 1024, written once by this checkout.

Each figure is the median over `repeats` rounds. `wall` is from the start of the process to its end, `cpu` what it has
computed, `first` the time to the first byte on the terminal (a pseudo-terminal of stdout and stderr together), and
`beyond torch` the median difference to `python -c "import torch"` run just before, of what imports torch. `imports`
names what it has imported of the heavy libraries, found by one more run. The files are in the page cache.
"""

from __future__ import annotations

import argparse
import math
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.setting import append_rows

HEAVY = ("torch", "sklearn", "scipy", "faiss", "PIL", "jinja2", "h5py", "numpy", "rich")
TORCH, GRAM = "import torch", "gram.h5"
PLAIN = ("pass", "import click", "import numpy, h5py, blake3", TORCH)  # what Python and libraries take by themselves
COMMANDS = (
    "--version",
    "--help",
    "topk --help",
    "inof train",
    "info no",
    "info train",
    "verify train",
    "annotate other --note seen",
    "remove other --rows 3 --yes",
    "export test test.npy",
    "topk train no",
    "topk train test --rows 0",
    "topk train test --rows 0 --mode certified",
    "topk train test",
    "index train",
    "index train --rebuild",
    "forensics train test --poisoned poisoned.txt",
    f"gram test --out {GRAM}",
    "evaluate no test",
    "fit train --out surrogate.safetensors",
    "evaluate surrogate.safetensors test --bootstrap 0",
    "attribute surrogate.safetensors test --row 0",
    "check no.py",
    "featurize no.py --out no",
    "featurize project.py --proj-dim 1024 --out train",
    "check project.py --proj-dim 1024",
    "residual project.py test --pairs 9",
    "import no.npy --out no --tool trak --model m",
    "info --system",
    "doctor",
)


@dataclass(frozen=True)
class Run:
    """One process: seconds to its end, of computing, and to its first byte; NaN where it has written none."""

    wall: float
    cpu: float
    first: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--before", help="the Python of another checkout")
    parser.add_argument("--only", nargs="*", default=[""], help="commands that begin with one of these")
    parser.add_argument("--folder", help="where the stores go")
    options = parser.parse_args()
    pythons = {"this": sys.executable, **({"before": options.before} if options.before else {})}
    commands = [command for command in COMMANDS if command.startswith(tuple(options.only))]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        prepare(folder)
        append_rows("starting", [plain(code, folder, options.repeats) for code in PLAIN], seed=0)
        for command in commands:
            append_rows("starting", measure(command, pythons, folder, options.repeats), seed=0)


def prepare(folder: Path) -> None:
    """A project, its stores, an index and a surrogate."""
    (folder / "poisoned.txt").write_text("3\n5\n8\n")
    featurize = "featurize project.py --proj-dim 1024"
    for command in (
        "init project.py",
        f"{featurize} --out train",
        f"{featurize} --split test --out test",
        f"{featurize} --split test --out other",
        "index train",
        "fit train --out surrogate.safetensors",
    ):
        subprocess.run(gradstore(sys.executable, command), cwd=folder, check=True, capture_output=True)


def gradstore(python: str, command: str) -> list[str]:
    return [python, "-m", "gradstore_cli", *command.split()]


def plain(code: str, folder: Path, repeats: int) -> dict[str, object]:
    runs = [run([sys.executable, "-c", code], folder) for _ in range(repeats)]
    return {**row(f"python -c '{code}'", "this", runs), "wall beyond torch": "", "cpu beyond torch": "", "imports": ""}


def measure(command: str, pythons: dict[str, str], folder: Path, repeats: int) -> list[dict[str, object]]:
    """One row a version: in every round each runs once, and just before it torch alone, where it needs that."""
    imports = {version: imported(python, command, folder) for version, python in pythons.items()}
    found: dict[str, list[tuple[Run, Run | None]]] = {version: [] for version in pythons}
    for _ in range(repeats):
        for version, python in pythons.items():
            torch = run([python, "-c", TORCH], folder) if "torch" in imports[version] else None
            found[version].append((run(gradstore(python, command), folder), torch))
    rows = []
    for version, pairs in found.items():
        beyond = [(ours.wall - torch.wall, ours.cpu - torch.cpu) for ours, torch in pairs if torch is not None]
        walls, cpus = zip(*beyond, strict=True) if beyond else ((), ())
        rows.append(
            {
                **row(f"gradstore {command}", version, [ours for ours, _ in pairs]),
                "wall beyond torch": median(walls),
                "cpu beyond torch": median(cpus),
                "imports": " ".join(imports[version]),
            }
        )
    return rows


def row(what: str, version: str, runs: Sequence[Run]) -> dict[str, object]:
    seconds = {name: median([getattr(one, name) for one in runs]) for name in ("wall", "cpu", "first")}
    return {"command": what, "version": version, **seconds, "unit": "s", "repeats": len(runs)}


def median(values: Sequence[float]) -> object:
    known = [value for value in values if not math.isnan(value)]
    return round(statistics.median(known), 3) if known else ""


def run(command: Sequence[str], folder: Path) -> Run:
    """Run a command on a terminal of its own."""
    (folder / GRAM).unlink(missing_ok=True)
    master, slave = pty.openpty()
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave)
    os.close(slave)
    first = float("nan")
    while written(master):
        first = time.perf_counter() - began if math.isnan(first) else first
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    os.close(master)
    return Run(wall, usage.ru_utime + usage.ru_stime, first)


def written(master: int) -> bytes:
    """What was written to a terminal next; nothing once nobody has it open any more."""
    try:
        return os.read(master, 65536)
    except OSError:
        return b""


def imported(python: str, command: str, folder: Path) -> list[str]:
    """Which heavy libraries a command has imported in the end."""
    (folder / GRAM).unlink(missing_ok=True)
    code = (
        "import sys, gradstore_cli\ntry: gradstore_cli.main()\n"
        f"finally: print(*(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)"
    )
    ran = subprocess.run([python, "-c", code, *command.split()], cwd=folder, capture_output=True, text=True)
    return ran.stderr.splitlines()[-1].split()


if __name__ == "__main__":
    main()
