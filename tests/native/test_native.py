"""The one compiled library: which level it uses, what forbids it, and what is said where it is missing or another's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gradstore.arithmetic import matrix_unit
from gradstore.errors import UsageError
from gradstore.native import library
from gradstore.projection import Projection
from gradstore.projection.compiled_product import accumulate
from gradstore.projection.entries import Entries

pytestmark = pytest.mark.numerical

needs_library = pytest.mark.skipif(not library.available(), reason=f"compiled code: {library.status().why}")
LEVELS = library.levels()


@needs_library
def test_status_names_the_level_and_the_variable_forces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADSTORE_SIMD", raising=False)
    status = library.status()
    assert (status.level, status.levels, status.why, status.hint) == (LEVELS[0], LEVELS, "", "")
    assert Path(status.path).parent == Path(library.__file__).parent
    monkeypatch.setenv("GRADSTORE_SIMD", LEVELS[-1])
    assert library.status().level == library.level() == LEVELS[-1]
    assert (library.status().hint == "") == (len(LEVELS) == 1)
    monkeypatch.setenv("GRADSTORE_SIMD", "mmx")
    said = r"GRADSTORE_SIMD: SIMD level not available \(expected one of .*, got 'mmx'\)\."
    for ask in (library.status, library.level, matrix_unit.available):
        with pytest.raises(UsageError, match=said):
            ask()


@needs_library
def test_the_variable_forbids_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSTORE_SIMD", "none")
    why, hint = "GRADSTORE_SIMD=none forbids it", "unset GRADSTORE_SIMD"
    assert library.status() == library.Status(why=why, hint=hint)
    assert (library.levels(), library.level(), matrix_unit.levels(), matrix_unit.available()) == ((), "", (), False)
    assert Projection().backend != "native"
    with pytest.raises(UsageError, match=rf"backend: no compiled code \(got {why}\)\. .*{hint}"):
        accumulate(Entries("rademacher", 0, 0), torch.zeros(1, 1), torch.ones(1, 1), 0, 0)
    monkeypatch.delenv("GRADSTORE_SIMD")
    assert library.available()


@pytest.fixture
def read_again() -> Iterator[None]:
    library._read.cache_clear()
    yield
    library._read.cache_clear()


@needs_library
@pytest.mark.usefixtures("read_again")
def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    found = library.INTERFACE
    monkeypatch.setattr(library, "INTERFACE", found + 1)
    status = library.status()
    assert (status.level, status.levels) == ("", ())
    assert status.why == f"it was built from another version of gradstore: interface {found}, not {found + 1}"
    assert status.hint == "install a C++ compiler (g++ or clang++), then install gradstore again"


def test_without_the_library_the_reference_is_used(tmp_path: Path) -> None:
    """A copy of the package without its compiled file says so, and projects the same numbers."""
    package = Path(library.__file__).parents[1]
    shutil.copytree(package, tmp_path / "gradstore", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = (
        "import torch; from gradstore.native import library; from gradstore.projection import Projection;"
        "print(Projection().backend, library.status().why, library.status().hint, sep='|');"
        "print(Projection(dim=8).project(torch.ones(1, 128)).mul(8**0.5).int().tolist()[0])"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "GRADSTORE_SIMD": ""}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    where, numbers = done.stdout.splitlines()
    assert where == (
        "reference|it was not built: no C++ compiler worked when gradstore was installed|"
        "install a C++ compiler (g++ or clang++), then install gradstore again"
    )
    want = Projection(dim=8, backend="reference").project(torch.ones(1, 128)).mul(8**0.5).int().tolist()[0]
    assert numbers == str(want)
