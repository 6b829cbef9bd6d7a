"""docs/paper.md names every equation of the paper, and only code and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "paper.md").read_text().splitlines()
    if line.startswith("| ") and "---" not in line and "in the paper" not in line
]


def test_every_equation_has_a_row() -> None:
    found: set[int] = set()
    for where, *_ in ROWS:
        if where.startswith("eq. "):
            for part in where.removeprefix("eq. ").split(", "):
                first, _, last = part.partition("-")
                found |= set(range(int(first), int(last or first) + 1))
    assert found == set(range(1, 24))
    appendices = {where for where, *_ in ROWS if where.startswith("App.")}
    assert {f"App. {letter}" for letter in "BFGHIJL"} < appendices


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}")
def test_code_and_test_exist(row: list[str]) -> None:
    _, _, code, test = row
    assert (ROOT / code.strip("`")).is_file()
    defined = re.compile(rf"^def {re.escape(test.strip('`'))}\(", re.MULTILINE)
    assert any(defined.search(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py"))
