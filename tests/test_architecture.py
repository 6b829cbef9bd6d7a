"""Modules are read top to bottom in the order in which data flows: each imports only modules above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(path for folder in ("gradstore", "cli") for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Names of the gradstore modules that a file imports anywhere but under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(n)
        for b in ast.walk(tree)
        if isinstance(b, ast.If) and "TYPE_CHECKING" in ast.dump(b.test)
        for n in ast.walk(b)
    }
    nodes = [n for n in ast.walk(tree) if id(n) not in hidden]
    names = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    names |= {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return {module for name in names if name.startswith("gradstore.") for module in [".".join(name.split(".")[:2])]}


def test_imports_point_upstream() -> None:
    graph: dict[str, set[str]] = {}
    for path in (p for p in MODULES if p.is_relative_to(ROOT / "gradstore") and p != ROOT / "gradstore/__init__.py"):
        name = "gradstore." + path.relative_to(ROOT / "gradstore").parts[0].removesuffix(".py")
        graph.setdefault(name, set()).update(imports(path) - {name})
    placed: set[str] = set()
    while ready := {name for name, needs in graph.items() if name not in placed and needs <= placed}:
        placed |= ready
    assert placed == set(graph), f"these modules import one another in a circle: {sorted(set(graph) - placed)}"


def test_nothing_left_of_featurize_knows_hdf5_and_nothing_right_of_it_a_model() -> None:
    left = ["project", "parameters", "examples", "weights", "show", "jacobians", "projection"]
    for path in MODULES:
        names = {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
        if names & set(left) and "cli" not in names:
            assert not imports(path) & {"gradstore.rows", "gradstore.store", "gradstore.schema", "gradstore.writer"}, (
                path
            )
        if names & {"topk", "index", "gram"} and "cli" not in names:
            assert not imports(path) & {"gradstore.jacobians", "gradstore.plan", "gradstore.featurize"}, path


KINDS_REPEATED = ("digests", "exact", "gram", "index", "jacobian", "matrix_unit", "mixed", "projection", "topk")
# What is printed, another library, the system, stand-ins of a GPU; and what takes a third of the time, for `make soak`.
NOT_REPEATED = {"cli", "faiss", "memory", "trust", "audit"}


def test_numerical_tests_are_repeated_as_on_other_processors() -> None:
    """Each new module of these kinds joins by one line, its `pytestmark`."""
    marked, unmarked = set(), set()
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        words = path.stem.removeprefix("test_")
        if words.startswith(KINDS_REPEATED) and words.split("_")[-1] not in NOT_REPEATED:
            (marked if "mark.numerical" in path.read_text() else unmarked).add(path.name)
    assert not unmarked, f"mark them `pytestmark = pytest.mark.numerical`: {sorted(unmarked)}"
    assert len(marked) >= 14


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "manager", "processor"])
def test_no_file_is_called(name: str) -> None:
    scripts = [ROOT / ".ci" / "run", *(ROOT / ".ci").glob("*.py")]
    assert len(scripts) > 3
    assert not [path for path in (*MODULES, *scripts) if name in path.stem]


def test_help_imports_no_torch() -> None:
    call = "import sys, gradstore_cli as c\ntry: c.main(['featurize', '--help'])\nexcept SystemExit: pass\n"
    code = call + "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
