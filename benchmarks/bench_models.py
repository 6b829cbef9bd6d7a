"""Any PyTorch classifier: more than a hundred models, right or wrong, by which routes, and how fast.

    python benchmarks/bench_models.py                        # every model whose library is installed
    python benchmarks/bench_models.py --source hand --no-time
    python benchmarks/bench_models.py --only BERT "GPT-2"
    python benchmarks/bench_models.py --timed                # times of those that the table says are right
    python benchmarks/bench_models.py --timed --every 5      # of every fifth, in the order of the zoo
    python benchmarks/bench_models.py --write                # docs/models.md from benchmarks/results/models.csv

Every model runs in a process of its own, so a crash is an outcome. The engine's per-example, per-class gradients of a
few examples are compared with looped autograd of the same weights in float64 (`zoo/rightness.py` says how); then both
the engine and `vmap(jacrev)` form the Jacobian of 32 examples, alternating, each in the chunks of examples that are
fastest for it; then each once more in a fresh process, for its peak memory.

A run replaces the rows of the models that it ran and keeps all others, so that several environments fill one table.
Those of the tests have transformers. timm and torchvision need one of their own, for a release of torchvision asks for
one release of torch: make a new environment, `pip install torch torchvision` of two releases that fit (torchvision's
page says which), then `pip install timm`, and `pip install -e ".[cpu]"` in this folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from setting import RESULTS, setting
from zoo import SOURCES, entries
from zoo.entry import Entry
from zoo.report import page
from zoo.rightness import rightness
from zoo.speed import SIDES, peak, speed

TABLE = RESULTS / "models.csv"
PAGE = RESULTS.parents[1] / "docs" / "models.md"
RIGHTNESS = (
    *("outcome", "why", "parameters", "share_structured", "share_func", "share_loop", "reasons", "batch_audit"),
    *("rows_checked", "error_sq_norm", "error_gradient", "error_parameter", "error_worst"),
    *("autograd_error_sq_norm", "autograd_error_gradient", "autograd_error_parameter"),
)
COLUMNS = (
    *("model", "source", *RIGHTNESS, "n", "speedup", "rows_per_s"),
    *(f"{side}_{what}" for side in SIDES for what in ("s", "chunk", "peak_MB", "why")),
    *("repeats", "date", "device", "cpu", "simd", "threads", "seed", "python", "torch", "numpy"),
    *("OPENBLAS_CORETYPE", "load_per_core"),
)
SMALL, FEW = 20000, (4, 16)  # hand-written models of so few parameters are also timed with so few examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=SOURCES, help="default: all that are installed")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models by name")
    parser.add_argument("--no-time", action="store_true", help="right or wrong only")
    parser.add_argument(
        "--timed", action="store_true", help="time only; what was found right stays as the table has it"
    )
    parser.add_argument("--every", type=int, default=1, help="every so many, of those asked for")
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=int, default=900, help="seconds a process may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--write", action="store_true", help="write the page from the table, and run nothing")
    parser.add_argument("--child", nargs=4, metavar=("WHAT", "NAME", "N", "CHUNK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        child(*options.child, options)
    elif options.write:
        PAGE.write_text(page(read(options.table)))
    else:
        for entry in chosen(options):
            for row in run(entry, options):
                replace(options.table, row)
                print("  ".join(f"{row[key]}" for key in COLUMNS[:9] if key in row), row.get("speedup", ""), flush=True)


def chosen(options: argparse.Namespace) -> list[Entry]:
    """The models asked for."""
    found = [entry for source in SOURCES if options.source in (None, source) for entry in entries(source)]
    if options.only is None:
        return found[:: options.every]
    if unknown := set(options.only) - {entry.name for entry in found}:
        sys.exit(f"not in the zoo, or its library is not installed: {', '.join(sorted(unknown))}")
    return [entry for entry in found if entry.name in options.only]


def run(entry: Entry, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A model's rows, one for each number of examples that it is timed with."""
    before = next((row for row in read(options.table) if options.timed and row["model"] == entry.name), None)
    found_right = {key: before[key] for key in RIGHTNESS} if before else in_process("rightness", entry, 0, 0, options)
    first = {"model": entry.name, "source": entry.library} | found_right
    about = setting(options.seed) | {"threads": options.threads}
    if options.no_time or first["outcome"] != "right":
        return [first | about]
    small = entry.source == "hand" and int(first["parameters"]) <= SMALL
    found = []
    for n in (*FEW, options.n) if small else (options.n,):
        row = first | in_process("speed", entry, n, 0, options)
        for side in SIDES if n == options.n else ():
            if f"{side}_chunk" in row:
                row |= in_process(side, entry, n, row[f"{side}_chunk"], options)
        found.append(row | about)
    return found


def in_process(what: str, entry: Entry, n: int, chunk: int, options: argparse.Namespace) -> dict[str, Any]:
    """What a fresh process measures; a crash or a time out is an outcome."""
    command = [sys.executable, __file__, "--child", what, entry.name, str(n), str(chunk)]
    for name in ("threads", "repeats", "seed"):
        command += [f"--{name}", str(getattr(options, name))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return {"outcome": "crash", "why": f"{what}: more than {options.limit} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"outcome": "crash", "why": f"{what}: exit status {done.returncode}: {last[:200]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(what: str, name: str, n: str, chunk: str, options: argparse.Namespace) -> None:
    """Measure one thing and print it."""
    warnings.simplefilter("ignore")
    entry = next(entry for source in SOURCES for entry in entries(source) if entry.name == name)
    if what == "rightness":
        found = rightness(entry, options.seed)
    elif what == "speed":
        found = speed(entry, int(n), options.repeats)
    else:
        found = {f"{what}_peak_MB": round(peak(entry, what, int(n), int(chunk)) / 1e6, 1)}
    print(json.dumps(found))


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def replace(path: Path, row: dict[str, Any]) -> None:
    """Put a row in the place of those of its model, and of its number of examples where it has one."""
    new = {key: _short(row.get(key, "")) for key in COLUMNS}
    kept = [old for old in read(path) if old["model"] != new["model"] or (new["n"] and old["n"] not in ("", new["n"]))]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*kept, new])


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) and abs(value) < 1e-2 else str(value)


if __name__ == "__main__":
    main()
