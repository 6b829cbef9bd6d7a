"""Modules are read top to bottom in the order in which data flows: each imports only modules above it."""

from __future__ import annotations

import ast
import re
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


def graph() -> dict[str, set[str]]:
    """The modules of the package, a folder as one, by those that each imports."""
    found: dict[str, set[str]] = {}
    for path in (p for p in MODULES if p.is_relative_to(ROOT / "gradstore") and p != ROOT / "gradstore/__init__.py"):
        name = "gradstore." + path.relative_to(ROOT / "gradstore").parts[0].removesuffix(".py")
        found.setdefault(name, set()).update(imports(path) - {name})
    return found


def test_imports_point_upstream() -> None:
    needed = graph()
    placed: set[str] = set()
    while ready := {name for name, needs in needed.items() if name not in placed and needs <= placed}:
        placed |= ready
    assert placed == set(needed), f"these modules import one another in a circle: {sorted(set(needed) - placed)}"


# What the user brings, its Jacobians and their projection; and what joins these with a store, or asks the model again.
LEFT = ["project", "parameters", "examples", "weights", "show", "jacobians", "projection"]
BOTH = ["batch", "check", "demo", "diagnosis", "environment", "exact", "featurize", "fingerprint", "fresh", "plan"]
BOTH += ["previews", "projection_audit", "residual", "settings"]
NEED_A_MODEL = {f"gradstore.{name}" for name in (*LEFT, *BOTH)}


def test_nothing_left_of_featurize_knows_hdf5() -> None:
    for name, needs in graph().items():
        if name.removeprefix("gradstore.") in LEFT:
            assert not needs & {"gradstore.store", "gradstore.schema", "gradstore.writer", "gradstore.storage"}, name


def test_only_the_modules_listed_need_a_model() -> None:
    """By all that they import, functions' own imports too, and not only for types."""
    needed, found = graph(), {f"gradstore.{name}" for name in LEFT}
    while more := {name for name, needs in needed.items() if name not in found and needs & found}:
        found |= more
    assert found == NEED_A_MODEL


def test_stores_are_read_compared_and_explained_where_there_is_no_model() -> None:
    """Every other module is imported by a process that cannot import these."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in MODULES if path.is_relative_to(ROOT / "gradstore")]
    names = sorted(".".join(path.parts) for path in paths if f"gradstore.{path.parts[1]}" not in NEED_A_MODEL)
    assert {"gradstore.store", "gradstore.kernels", "gradstore.search.session", "gradstore.forensics"} < set(names)
    code = (
        f"import sys, importlib; sys.modules.update(dict.fromkeys({sorted(NEED_A_MODEL)}))\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "try: import gradstore.residual\n"
        "except ImportError: print('no model here')"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout == "no model here\n"


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


def test_every_file_of_compiled_code_is_built_from() -> None:
    """A header that is not named there would be changed without anything being compiled again."""
    named = re.findall(r'"(gradstore/native/src/[\w.]+)"', (ROOT / "pyproject.toml").read_text())
    assert sorted(named) == sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("gradstore/*/src/*"))


def test_help_imports_no_torch() -> None:
    call = "import sys, gradstore_cli as c\ntry: c.main(['featurize', '--help'])\nexcept SystemExit: pass\n"
    code = call + "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
