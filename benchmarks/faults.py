"""The table of injected faults, from a run of the fault tests.

    python -m benchmarks.faults [--soak] [--write]

Runs the tests, which note what they injected and what came of it, and prints one Markdown line a fault; `--write` puts
the table into docs/faults.md. A fault that was silently wrong would fail its test, and the table with it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/faults.md"
COUNTS = ("injected", "recovered", "refused", "silently wrong")
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def measure(soak: bool) -> list[dict[str, Any]]:
    """Rows that the fault tests noted."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        tests = sorted(str(path) for path in (ROOT / "tests").glob("test_fault_*.py"))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            *(["-m", "soak", "--timeout=0"] if soak else []),
            *tests,
        ]
        environment = {**os.environ, "GRADSTORE_FAULT_COUNTS": str(counts)}
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            raise SystemExit("a fault test failed; there is no table")
        return [json.loads(line) for line in counts.read_text().splitlines()]


def table(rows: list[dict[str, Any]]) -> str:
    """One Markdown line for each fault and what it is, in order of the faults' numbers."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["fault"], row["what"]].append(row)
    lines = ["| | fault | " + " | ".join(COUNTS) + " | control |", "| --- | --- |" + " ---: |" * len(COUNTS) + " --- |"]
    for (fault, what), found in sorted(groups.items(), key=lambda item: _number(item[0][0])):
        sums = [str(sum(row[count] for row in found)) for count in COUNTS]
        lines.append(f"| {fault} | {what} | {' | '.join(sums)} | {found[0]['control']} |")
    return "\n".join(lines) + "\n"


def _number(fault: str) -> tuple[str, int, str]:
    digits = "".join(ch for ch in fault if ch.isdigit())
    return fault[0], int(digits), fault


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak", action="store_true", help="the larger numbers, for hours")
    parser.add_argument("--write", action="store_true", help="put the table into docs/faults.md")
    chosen = parser.parse_args()
    found = table(measure(chosen.soak))
    print(found)
    if chosen.write:
        head, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(head + BEGIN + found + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
