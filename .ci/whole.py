"""Install gradstore whole on another Python of this machine, as a user would, and run the tests there.

    python .ci/whole.py [PYTHON [pytest's arguments]]

The source archive and the wheel are built, the wheel is installed with the pins in a fresh environment, and the tests
run from a folder that has no source of the package beside it. Without a PYTHON the newest interpreter is taken whose
version is not that of this one. Everything lies in one temporary folder (5.5 GB with torch's CUDA build).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from interpreters import Interpreter, find, probe
from resolve import ROOT, RefusedError, copy, new_pip, resolve

EXTRAS = "[cpu,test]"
BESIDE_TESTS = (
    *("tests", "benchmarks", "docs", ".ci"),
    *("Makefile", "pyproject.toml", "constraints.txt", "constraints-cuda.txt", "README.md", "CHANGELOG.md"),
)
"""What the tests read; the package itself must come from where it was installed."""
OF_SOURCE = ("tests/test_architecture.py", "tests/test_docs.py")
"""The tests that read the package's source where it is developed."""


def chosen(asked: str) -> Interpreter | None:
    """The interpreter that was asked for, or the newest of another version; None where there is no other."""
    if asked:
        found = probe(Path(asked))
        if found is None:
            sys.exit(f"SOAK_PYTHON: expected a CPython of version 3.10 or newer, got {asked}")
        return found
    others = [other for other in find() if other.version[:2] != sys.version_info[:2]]
    return others[-1] if others else None


def install(pip: Path, interpreter: Interpreter, folder: Path) -> Path:
    """Build the project and install its wheel in a fresh environment.

    Args:
        pip: a Python with a new pip.
        interpreter: to install for.
        folder: to write in.

    Returns:
        The environment's folder of programs.
    """
    built, environment = folder / "dist", folder / "environment"
    subprocess.run([pip, "-m", "pip", "install", "--quiet", "build"], check=True)
    subprocess.run([pip, "-m", "build", "--outdir", built, ROOT], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([interpreter.path, "-m", "venv", environment], check=True)
    (wheel,) = built.glob("*.whl")
    options = ["--disable-pip-version-check", "--only-binary", ":all:", "-c", str(ROOT / "constraints.txt")]
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", *options, f"{wheel}{EXTRAS}"], check=True)
    return environment / "bin"


def main(asked: str, arguments: list[str]) -> int:
    """Install and test.

    Args:
        asked: a Python, or "".
        arguments: for pytest.

    Returns:
        The exit status: that of the tests, and 0 where no other Python is here.
    """
    interpreter = chosen(asked)
    if interpreter is None:
        print("not installed on another Python: none is here; SOAK_PYTHON=… names one")
        return 0
    with tempfile.TemporaryDirectory(prefix="gradstore-whole-") as name:
        folder = Path(name)
        try:
            pip = new_pip(folder / "pip")
            found = resolve(pip, interpreter, ("-c", "constraints.txt", f".{EXTRAS}"))
        except RefusedError as error:
            sys.exit(f"{interpreter} cannot install gradstore:\n{error}")
        amount = "3 GB" if found.cuda else "0.4 GB"
        print(
            f"{interpreter}: about {amount} to download, torch {found.torch}; SOAK_PYTHON=… names another", flush=True
        )
        copy(BESIDE_TESTS, folder)  # now, since installing takes minutes in which the project may be edited
        programs = install(pip, interpreter, folder)
        subprocess.run([programs / "gradstore", "--help"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([programs / "gradstore", "info", "--system"], check=True)
        ignored = [f"--ignore={name}" for name in OF_SOURCE]  # pytest imports what is only deselected
        command = [str(programs / "pytest"), "-n", "2", *ignored, *arguments]
        return subprocess.run(command, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]))
