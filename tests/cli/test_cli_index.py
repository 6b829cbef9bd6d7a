"""The commands index and topk, with everything that topk can be asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import run
from test_cli import folder

__all__ = ["folder"]


def test_certified_topk_prints_what_exact_topk_prints(folder: Path) -> None:
    exact = run(folder, "topk train test -k 3 --json")
    certified = run(folder, "topk train test -k 3 --json --mode certified")
    assert certified.status == 0
    assert json.loads(certified.out) == json.loads(exact.out)
    assert "exact by proof; " in certified.err
    approx = run(folder, "topk train test -k 3 --json --mode approx")
    assert "measured recall@10 1.0000; " in approx.err, "100 candidates are all of 48 rows"
    assert json.loads(approx.out) == json.loads(exact.out)


def test_index_says_what_it_is(folder: Path) -> None:
    result = run(folder, "index train --rebuild --json")
    assert result.status == 0, result.err
    card = json.loads(result.out)
    assert card["state"] == "built: it was asked for"
    assert card["recall@10"].startswith("1.0000, ")
    assert json.loads(run(folder, "index train --json --no-recall").out)["state"] == "opened"
    assert "recall@10" not in run(folder, "index train --no-recall").out


def test_queries_from_a_project_are_those_of_its_store(folder: Path) -> None:
    stored = run(folder, "topk train test -k 3 --rows 2:6 --json")
    fresh = run(folder, "topk train project.py --split test -k 3 --rows 2:6 --json")
    assert fresh.status == 0, fresh.err
    assert json.loads(fresh.out) == json.loads(stored.out)


def test_classes(folder: Path) -> None:
    result = run(folder, "topk train test -k 3 --json --classes cat-dog")
    assert result.status == 0, result.err
    assert len(json.loads(result.out)) == 10
    assert run(folder, "topk train test --classes predicted --json").status == 0


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        (
            "topk train test --mode fast",
            2,
            "--mode: unknown mode (expected one of exact, certified, approx, got 'fast')",
        ),
        (
            "topk train test --engine gpu",
            2,
            "Invalid value for '--engine': 'gpu' is not one of 'auto', 'float32', 'int8', 'bfloat16', 'cuda'.",
        ),
        ("topk train test --classes lynx", 2, "--classes: no such class (expected one of cat, dog, bird, got 'lynx')"),
        ("topk train project.py --rows 8:12", 2, "--rows: no such query row (expected 0 to 9, got 10)"),
        ("topk train nowhere.py", 3, "nowhere.py"),
        ("index train --size 1000", 2, "--size: unusable number of directions (expected 1 to 512, got 1000)"),
        ("index nowhere", 2, "nowhere: this is not a gradstore store"),
        (
            "index train --faiss HNSW0",
            2,
            "--faiss: FAISS refuses this index (got 'HNSW0': a process that was ended by SIG",
        ),
        ("index train --faiss Cheese", 2, "--faiss: FAISS refuses this index (got 'Cheese'"),
    ],
)
def test_errors(folder: Path, line: str, status: int, message: str) -> None:
    result = run(folder, line)
    assert result.status == status, result.err
    assert message in result.err
    assert "Traceback" not in result.err
