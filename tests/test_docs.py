"""Pages and docstrings name only files and modules that exist; docs/paper.md names every equation of the paper."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import gradstore as gs

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/**/*.md"))
}
FILES = [
    f"/{path.relative_to(ROOT)}" + "/" * path.is_dir()
    for folder in (".ci", "benchmarks", "cli", "docs", "gradstore", "tests")
    for path in (ROOT / folder, *(ROOT / folder).rglob("*"))
] + [f"/{path.name}" for path in ROOT.iterdir() if path.is_file()]
KINDS = ".cpp .csv .cuh .cu .h .md .png .py .toml .txt"
"""Endings by which a word is known as the name of a file; those with a slash are known by that."""
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGES["docs/paper.md"].splitlines()
    if line.startswith("| ") and "---" not in line and "in the paper" not in line
]
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef


def docstrings(source: str) -> Iterator[str]:
    return (ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED))


TEXTS = PAGES | {
    str(path.relative_to(ROOT)): "\n".join(docstrings(path.read_text()))
    for folder in ("gradstore", "cli", "benchmarks", ".ci")
    for path in (ROOT / folder).rglob("*.py")
}


def paths(text: str) -> set[str]:
    """Names of files and folders in a page: what links lead to, and words in backquotes that look like one."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]*)\)", text) if "://" not in link}
    words = {word for span in re.findall(r"`([^`]+)`", text) for word in span.split()}
    named = {word for word in words if re.fullmatch(r"\.?\w[\w.*-]*(/[\w.*-]+)*/?", word)}
    named = {word for word in named if not word.startswith(".venv")}  # which `make` makes
    return (links - {""}) | {w for w in named if "/" in w or Path(w).suffix in KINDS.split()}


def exists(path: str) -> bool:
    """Whether there is such a file or folder, at least by the end of its path; NAME and * stand for any name."""
    pattern = re.escape(path.removeprefix("../")).replace(r"\*", "[^/]*").replace("NAME", "[^/]*")
    return any(re.search(f"/{pattern}/?$", file) for file in FILES)


def modules(text: str) -> set[str]:
    """Dotted names of our packages, and what the pages call by `gs.`."""
    return set(re.findall(r"(?<![\w/.])(?:gradstore|gradstore_cli|benchmarks|gs)(?:\.[A-Za-z_]\w*)+(?![\w/])", text))


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    if name.startswith("gs."):
        return name.split(".")[1] in gs.__all__
    parts = name.split(".")
    for known in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:known]))
        except ModuleNotFoundError:
            continue
        return known == len(parts) or hasattr(found, parts[known])
    return False


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if paths(text) or modules(text)])
def test_what_is_named_exists(page: str) -> None:
    assert not [path for path in sorted(paths(TEXTS[page])) if not exists(path)]
    assert not [name for name in sorted(modules(TEXTS[page])) if not resolves(name)]


def test_what_does_not_exist_is_found() -> None:
    text = "see [it](docs/none.md), `gradstore/search/topk.py`, `kinds/NAME.py` and `gradstore.search.none`, `gs.all`"
    assert [path for path in sorted(paths(text)) if not exists(path)] == ["docs/none.md", "kinds/NAME.py"]
    assert not any(resolves(name) for name in modules(text))


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
