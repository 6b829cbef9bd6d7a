"""Whether gradstore can be installed on each Python of this machine, from wheels alone: with its pins, and without.

Nothing is installed, and little more than metadata is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from interpreters import Interpreter, find

_CUDA = ", a CUDA build"
ROOT = Path(__file__).resolve().parent.parent
WAYS = {
    "with the pins": ("-c", "constraints.txt", "{wheel}[cpu,test,check,test-cuda]"),
    "of the GPU tests, beside a CPU build": ("-r", "constraints-cuda.txt"),
    "the newest of everything": ("{wheel}[cpu]",),
}
"""What is asked of pip, by the name of a way to install."""
OF_WHEEL = ("gradstore", "cli", "pyproject.toml", "README.md", "LICENSE")
"""What a wheel is built from."""


class Resolved(NamedTuple):
    """What pip would install.

    Attributes:
        packages: version by name, in lower case.
        torch: its version and build; "" where it is not among them. A CUDA build brings gigabytes of libraries.
    """

    packages: dict[str, str]
    torch: str

    @property
    def cuda(self) -> bool:
        """Whether torch is a CUDA build."""
        return self.torch.endswith(_CUDA)


class RefusedError(Exception):
    """Pip's reason why it would not do what it was asked for."""


def told(pip: Path, *arguments: str | Path, **more: Any) -> None:
    """Run pip.

    Args:
        pip: a Python that has it.
        arguments: for pip.
        more: for `subprocess.run`.

    Raises:
        RefusedError: what pip says where it fails.
    """
    command = [str(pip), "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **more)
    if done.returncode:
        raise RefusedError(_reason(done.stdout))


def new_pip(folder: Path) -> Path:
    """Make an environment whose pip is the newest: older ones download whole wheels to look into them.

    Returns:
        Path of its Python.

    Raises:
        RefusedError: it cannot be had.
    """
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    told(python, "install", "--upgrade", "pip")
    return python


def copy(names: Iterable[str], folder: Path) -> None:
    """Copy files and folders of the project to a folder."""
    for name in names:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(source, folder / name)


def wheel_of_metadata(pip: Path, folder: Path) -> Path:
    """Build a wheel of the project, quickly: as where there is no compiler.

    Returns:
        Path of the wheel.

    Raises:
        RefusedError: it cannot be built.
    """
    source = folder / "source"
    source.mkdir()
    copy(OF_WHEEL, source)
    without = {**os.environ, "CC": "false", "CXX": "false"}
    told(pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source, env=without)
    (wheel,) = folder.glob("*.whl")
    return wheel


def resolve(pip: Path, interpreter: Interpreter, asked: tuple[str, ...]) -> Resolved:
    """Ask pip what it would install for an interpreter.

    Args:
        pip: a Python with a pip of 23.3 or later.
        interpreter: need not have a pip of its own.
        asked: pip's requirements and constraints, from the root of the project.

    Returns:
        Its answer; nothing is installed.

    Raises:
        RefusedError: some requirement has no wheel for it, or two contradict one another.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--only-binary", ":all:", "--report", str(report)]
        told(pip, "--python", interpreter.path, "install", *options, *asked, cwd=ROOT)
        return _read(json.loads(report.read_text()))


def _read(report: dict[str, Any]) -> Resolved:
    described = {package["metadata"]["name"].lower(): package["metadata"] for package in report["install"]}
    versions = {name: package["version"] for name, package in described.items()}
    if "torch" not in described:
        return Resolved(versions, "")
    cuda = any(need.startswith("nvidia-") for need in described["torch"].get("requires_dist", ()))
    return Resolved(versions, versions["torch"] + (_CUDA if cuda else ""))


def _reason(said: str) -> str:
    """What pip says from its first error on; all of it where it names none."""
    lines = said.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("ERROR")), 0)
    return "\n".join(line for line in lines[first:] if line.strip())


def attempt(pip: Path, wheel: Path, interpreter: Interpreter, name: str) -> tuple[bool, str]:
    """Whether one way to install resolves for an interpreter, and what to say of it."""
    began, asked = time.monotonic(), WAYS[name]
    try:
        found = resolve(pip, interpreter, tuple(word.format(wheel=wheel) for word in asked))
    except RefusedError as error:
        command = " ".join(word.format(wheel=".") for word in asked)
        return False, f"{interpreter} cannot install gradstore {name} (pip install {command}):\n{error}"
    torch = f", torch {found.torch}" if found.torch else ""
    return True, f"{interpreter}: {len(found.packages)} packages {name}{torch}; {time.monotonic() - began:.0f} s"


def main() -> int:
    """Try every interpreter, two at a time; say what was tried. The exit status is 1 where pip refused one."""
    everywhere = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            pip = new_pip(folder / "venv")
            wheel = wheel_of_metadata(pip, folder)
        except RefusedError as error:
            print(f"nothing was tried, since pip cannot build gradstore with {sys.executable}:\n{error}")
            return 1
        tried = [(interpreter, way) for interpreter in find() for way in WAYS]
        with ThreadPoolExecutor(2) as pool:
            for resolved, said in pool.map(lambda one: attempt(pip, wheel, *one), tried):
                everywhere &= resolved
                print(said, flush=True)
    return 0 if everywhere else 1


if __name__ == "__main__":
    sys.exit(main())
