"""Whether gradstore can be installed on each Python of this machine, from wheels alone: with its pins, and without.

Nothing is installed, and little more than metadata is downloaded. Takes about 25 seconds an interpreter.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from interpreters import Interpreter, find

_CUDA = ", a CUDA build"
ROOT = Path(__file__).resolve().parent.parent
WAYS = {
    "with the pins": ("-c", "constraints.txt", ".[cpu,test,check,test-cuda]"),
    "of the GPU tests, beside a CPU build": ("-r", "constraints-cuda.txt"),
    "the newest of everything": (".[cpu]",),
}
"""What is asked of pip, by the name of a way to install."""


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
    """Pip's reason why it would not install."""


def new_pip(folder: Path) -> Path:
    """A Python in a fresh environment, whose pip is the newest: older ones download whole wheels to look into them."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
    return python


def resolve(pip: Path, interpreter: Interpreter, asked: tuple[str, ...]) -> Resolved:
    """What pip would install for an interpreter.

    Args:
        pip: a Python with a pip of 23.3 or later.
        interpreter: need not have a pip of its own.
        asked: pip's requirements and constraints, from the root of the project.

    Raises:
        RefusedError: some requirement has no wheel for it, or two contradict one another.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--quiet", "--only-binary", ":all:", "--report", str(report)]
        command = [str(pip), "-m", "pip", "--python", str(interpreter.path), "install", *options, *asked]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RefusedError(_reason(done.stderr))
        return _read(json.loads(report.read_text()))


def _read(report: dict[str, Any]) -> Resolved:
    described = {package["metadata"]["name"].lower(): package["metadata"] for package in report["install"]}
    versions = {name: package["version"] for name, package in described.items()}
    if "torch" not in described:
        return Resolved(versions, "")
    cuda = any(need.startswith("nvidia-") for need in described["torch"].get("requires_dist", ()))
    return Resolved(versions, versions["torch"] + (_CUDA if cuda else ""))


def _reason(errors: str) -> str:
    """What pip says from its first error on; all of it where it names none."""
    lines = errors.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("ERROR")), 0)
    return "\n".join(line for line in lines[first:] if line.strip())


def main() -> int:
    """Try every interpreter; say what was tried. The exit status is 1 where pip refused one."""
    refused = 0
    with tempfile.TemporaryDirectory() as folder:
        pip = new_pip(Path(folder) / "venv")
        for interpreter in find():
            for name, asked in WAYS.items():
                began = time.monotonic()
                try:
                    found = resolve(pip, interpreter, asked)
                except RefusedError as error:
                    refused += 1
                    print(f"{interpreter} cannot install gradstore {name} (pip install {' '.join(asked)}):\n{error}")
                    continue
                torch = f", torch {found.torch}" if found.torch else ""
                seconds = f"{time.monotonic() - began:.0f} s"
                print(f"{interpreter}: {len(found.packages)} packages {name}{torch}; {seconds}", flush=True)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
