"""The table of injected faults, from runs of the fault tests.

    python -m benchmarks.faults [--write]              the numbers of every test run
    python -m benchmarks.faults --soak [TEST ...]      the larger numbers, for hours; all tests, or just some
                                                       (GRADSTORE_SOAK_SHARE=0.1: a tenth of them)

Runs the tests, which note what they injected and what came of it, and prints one Markdown line a fault; `--write` puts
the table into docs/faults.md. A fault that was silently wrong would fail its test, and the table with it. What a soak
run injected is kept in results/soak.csv, and the largest number of each fault is the column "by hand".
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.setting import RESULTS, append_rows

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/faults.md"
COUNTS = ("injected", "recovered", "refused", "silently wrong")
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def measure(tests: Sequence[str], soak: bool) -> list[dict[str, Any]]:
    """Rows that the fault tests noted."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        every = sorted(
            str(path) for path in (ROOT / "tests").glob("*/test_*.py") if "record: Record" in path.read_text()
        )
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            *(["-m", "soak", "--timeout=0"] if soak else []),
            *(tests or every),
        ]
        environment = {**os.environ, "GRADSTORE_FAULT_COUNTS": str(counts)}
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            raise SystemExit("a fault test failed; there is no table")
        return read(counts)


def read(counts: Path) -> list[dict[str, Any]]:
    """Rows in a file of counts, such as a test run leaves where GRADSTORE_FAULT_COUNTS says."""
    return [json.loads(line) for line in counts.read_text().splitlines()]


def added_up(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows by (fault, what), in order of the faults' numbers."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["fault"], row["what"]].append(row)
    return dict(sorted(groups.items(), key=lambda item: _number(item[0][0])))


def soaked() -> dict[tuple[str, str], int]:
    """The most faults of each kind that one soak run injected."""
    path = RESULTS / "soak.csv"
    most: dict[tuple[str, str], int] = defaultdict(int)
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                key = row["fault"], row["what"]
                most[key] = max(most[key], int(row["injected"]))
    return most


def keep(rows: Sequence[dict[str, Any]]) -> None:
    """Add what a soak run injected to results/soak.csv."""
    sums = [
        {"fault": fault, "what": what, **{count: sum(row[count] for row in found) for count in COUNTS}}
        for (fault, what), found in added_up(rows).items()
    ]
    append_rows("soak", sums, seed=0)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One Markdown line for each fault and what it is, in order of the faults' numbers."""
    heads = [*COUNTS, "by hand"]
    lines = ["| | fault | " + " | ".join(heads) + " | control |", "| --- | --- |" + " ---: |" * len(heads) + " --- |"]
    by_hand = soaked()
    for (fault, what), found in added_up(rows).items():
        sums = [str(sum(row[count] for row in found)) for count in COUNTS]
        controls = sorted((row["control"] for row in found), key=lambda text: text.startswith(("see ", "as above")))
        control = controls[0]  # parallel tests note in any order; some only point at the one that has the control
        more = by_hand.get((fault, what), "")
        lines.append(f"| {fault} | {what} | {' | '.join(sums)} | {more} | {control} |")
    return "\n".join(lines) + "\n"


def _number(fault: str) -> tuple[str, int, str]:
    digits = "".join(ch for ch in fault if ch.isdigit())
    return fault[0], int(digits), fault


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="files or names of tests; default all fault tests")
    parser.add_argument("--soak", action="store_true", help="the larger numbers, kept in results/soak.csv")
    parser.add_argument("--counts", type=Path, help="what a test run noted, instead of running the tests")
    parser.add_argument("--write", action="store_true", help="put the table into docs/faults.md")
    chosen = parser.parse_args()
    rows = read(chosen.counts) if chosen.counts else measure(chosen.tests, chosen.soak)
    if chosen.soak:
        return keep(rows)
    found = table(rows)
    print(found)
    if chosen.write:
        head, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(head + BEGIN + found + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
