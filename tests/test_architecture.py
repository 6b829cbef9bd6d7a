"""The house as CONTRIBUTING lists it: rooms in the order in which an example goes through them, and who knows whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "gradstore").rglob("*.py"))
COMMANDS = sorted((ROOT / "cli").rglob("*.py"))
LEFT = {"model", "jacobians", "projection"}
"""Rooms that know a model and no store; `featurization` is the bridge to the others."""


def module_of(path: Path) -> str:
    """The name of a file's module without `gradstore`; of a package's `__init__`, the package's."""
    parts = path.relative_to(ROOT / "gradstore").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES if module_of(path)}


def listed(text: str) -> list[str]:
    """Modules in the order of CONTRIBUTING's list, an indented line `room:` going on where it says."""
    found: list[str] = []
    for room, words in re.findall(r"^([a-z_/]+): +([^#\n]+)", text, re.MULTILINE):
        names = [word for word in words.split() if re.fullmatch("[a-z_0-9]+", word)]
        found += [f"{room}/{name}".replace("/", ".") if room != "gradstore" else name for name in names]
    return found


def the_list() -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return listed(text[text.index("```rooms") :].split("```")[1])


def imports(source: str) -> set[str]:
    """Modules of gradstore that a source imports anywhere but for types alone, without `gradstore`."""
    tree = ast.parse(source)
    typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    hidden = {id(inner) for block in typing for inner in ast.walk(block)}
    nodes = [node for node in ast.walk(tree) if id(node) not in hidden]
    wanted = [(n.module, [a.name for a in n.names]) for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]
    wanted += [(a.name, []) for n in nodes if isinstance(n, ast.Import) for a in n.names]
    found = set()
    for module, names in wanted:
        if module and module.partition(".")[0] == "gradstore":
            own = module.partition(".")[2]
            inner = {f"{own}.{name}".strip(".") for name in names}
            found |= inner & set(MODULES) or {own}
    return found - {""}


GRAPH = {name: imports(path.read_text()) for name, path in MODULES.items()}


def against(order: Sequence[str], graph: Mapping[str, set[str]]) -> list[str]:
    """Imports of what the order does not put above."""
    place = {name: i for i, name in enumerate(order)}
    return [
        f"{a} imports {b}" for a in order for b in sorted(graph.get(a, ())) if not place.get(b, len(order)) < place[a]
    ]


def reached(rooms: set[str]) -> dict[str, set[str]]:
    """Everything that the modules of some rooms import, by themselves or through others; and who does."""
    found: dict[str, set[str]] = {}
    todo = [(name, name) for name in MODULES if name.split(".")[0] in rooms]
    while todo:
        name, by = todo.pop()
        if by not in found.setdefault(name, set()):
            found[name].add(by)
            todo += [(needed, by) for needed in GRAPH.get(name, ())]
    return found


def test_every_module_is_listed_once_and_nothing_else() -> None:
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py" and not GRAPH[name]}
    assert Counter(the_list()) == Counter(set(MODULES) - packages)


def test_imports_point_upwards_between_rooms_and_inside_them() -> None:
    assert not against(the_list(), GRAPH)


def test_an_import_against_the_order_is_found() -> None:
    order = the_list()
    for a, b in (("store.rows", "search.topk"), ("store.schema", "store.feature_store"), (order[0], order[-1])):
        assert against(order, {**GRAPH, a: {*GRAPH[a], b}}) == [f"{a} imports {b}"]


def test_what_reads_stores_knows_no_model() -> None:
    allowed = {"kernels.exact", "kernels.residual"}  # which compute from the model itself
    for name, users in reached({"store", "kernels", "search", "explain"}).items():
        if name.split(".")[0] in LEFT:
            users = {user for user in users if not user.startswith(tuple(allowed))}
            assert not users, f"{name} is reached from {sorted(users)}"


def test_stores_are_read_and_explained_by_a_process_that_can_import_no_model() -> None:
    blocked = [f"gradstore.{name}" for name in MODULES if name.split(".")[0] in LEFT]
    known = [name for name in MODULES if name.split(".")[0] in {"store", "kernels", "search", "explain", "report"}]
    free = [f"gradstore.{name}" for name in known if not name.startswith(("kernels.exact", "kernels.residual"))]
    assert {"gradstore.search.topk", "gradstore.explain.forensics", "gradstore.kernels.gram"} < set(free)
    code = (
        f"import sys, importlib; sys.modules.update(dict.fromkeys({blocked}))\n"
        f"for name in {free}: importlib.import_module(name)\n"
        "try: import gradstore.kernels.residual\n"
        "except ImportError: print('no model here')"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout == "no model here\n"


def test_nothing_left_of_featurization_knows_a_store() -> None:
    rooms = {name.split(".")[0] for name in reached(LEFT)}
    assert not rooms & {"store", "featurization", "kernels", "search", "explain", "report"}


def test_a_report_computes_nothing() -> None:
    rooms = {name.split(".")[0] for name in reached({"report"})}
    assert not rooms & {*LEFT, "featurization", "kernels", "search", "explain"}


def test_the_library_knows_no_command() -> None:
    assert not [
        path
        for path in FILES
        if "gradstore_cli" in path.read_text() or re.search(r"^import click|from click", path.read_text(), re.MULTILINE)
    ]


@pytest.mark.parametrize("folder", ["gradstore", "cli", "tests"])
def test_no_name_occurs_twice(folder: str) -> None:
    """A command is called like what it runs, so that the two packages are looked at apart."""
    sources = [p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}]
    names = Counter(path.name for path in sources if path.stem != "__init__")
    assert len(names) > 20
    assert not [name for name, count in names.items() if count > 1]


def test_tests_mirror_the_rooms() -> None:
    rooms = {path.name for path in (ROOT / "gradstore").iterdir() if (path / "__init__.py").exists()} | {"cli"}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= rooms
    assert rooms - folders <= {"native", "engine"}, "which are tested through what they carry"


KINDS_REPEATED = ("digests", "exact", "gram", "index", "jacobian", "matrix_unit", "mixed", "projection", "topk")
# What is printed, another library, the system, stand-ins of a GPU; and what takes a third of the time, for `make soak`.
NOT_REPEATED = {"cli", "faiss", "memory", "trust", "audit"}


def test_numerical_tests_are_repeated_as_on_other_processors() -> None:
    """Each new module of these kinds joins by one line, its `pytestmark`."""
    marked, unmarked = set(), set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        words = path.stem.removeprefix("test_")
        if words.startswith(KINDS_REPEATED) and words.split("_")[-1] not in NOT_REPEATED:
            (marked if "mark.numerical" in path.read_text() else unmarked).add(path.name)
    assert not unmarked, f"mark them `pytestmark = pytest.mark.numerical`: {sorted(unmarked)}"
    assert len(marked) >= 14


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "manager", "processor"])
def test_no_file_is_called(name: str) -> None:
    scripts = [ROOT / ".ci" / "run", *(ROOT / ".ci").glob("*.py")]
    assert len(scripts) > 3
    assert not [path for path in (*FILES, *COMMANDS, *scripts) if name in path.stem]


def test_help_imports_no_torch() -> None:
    call = "import sys, gradstore_cli as c\ntry: c.main(['featurize', '--help'])\nexcept SystemExit: pass\n"
    code = call + "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
