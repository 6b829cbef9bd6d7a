"""Which Pythons an installation is tried for, and what is said where pip refuses; both are stand-ins here."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / ".ci"))

import interpreters  # noqa: E402
import levels  # noqa: E402
import resolve  # noqa: E402
import whole  # noqa: E402


def stand_in(path: Path, version: str, *, name: str = "cpython", free_threaded: bool = False, status: int = 0) -> Path:
    """A program that answers the question for its version as a Python would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answer = f"{name} {free_threaded} {version.replace('.', ' ')}"
    path.write_text(f"#!/bin/sh\necho {answer}\necho {path}\nexit {status}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{tmp_path / 'missing'}")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return tmp_path


def test_one_interpreter_a_promised_version_is_found(machine: Path) -> None:
    first = stand_in(machine / "bin/python3", "3.11.7")
    newer = stand_in(machine / "bin/python3.14", "3.14.0")
    stand_in(machine / "bin/python3.9", "3.9.18")
    stand_in(machine / "bin/python3.12", "3.12.1", status=127)  # a shim of a version that is not active
    (machine / "bin/python3.13").write_text("no program")
    versions = machine / "pyenv/versions"
    stand_in(versions / "3.11.9/bin/python", "3.11.9")
    stand_in(versions / "3.13.0t/bin/python", "3.13.0", free_threaded=True)
    stand_in(versions / "pypy3.10/bin/python", "3.10.14", name="pypy")
    oldest = stand_in(versions / "3.10.13/bin/python", "3.10.13")
    found = [((3, 10, 13), oldest), ((3, 11, 7), first), ((3, 14, 0), newer)]
    assert interpreters.find() == [interpreters.Interpreter(*one) for one in found]


def test_this_python_is_described_as_it_is() -> None:
    found = interpreters.probe(Path(sys.executable))
    assert found is not None
    assert found.version == sys.version_info[:3]
    assert str(found) == f"Python {'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}"


def answer_of_pip(monkeypatch: pytest.MonkeyPatch, status: int, errors: str = "", report: dict | None = None) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if report is not None:
            Path(command[command.index("--report") + 1]).write_text(json.dumps(report))
        return subprocess.CompletedProcess(command, status, errors, "")

    monkeypatch.setattr(resolve.subprocess, "run", run)


def test_a_refusal_names_the_interpreter_and_what_pip_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_of_pip(monkeypatch, 1, "WARNING: old\nERROR: No matching distribution found for pillow==13.0.0\n\nhint: x\n")
    monkeypatch.setattr(resolve, "new_pip", lambda folder: folder / "python")
    monkeypatch.setattr(resolve, "wheel_of_metadata", lambda pip, folder: folder / "gradstore.whl")
    monkeypatch.setattr(resolve, "find", lambda: [interpreters.Interpreter((3, 10, 13), Path("/some/python"))])
    assert resolve.main() == 1
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "Python 3.10.13 at /some/python cannot install gradstore with the pins "
        "(pip install -c constraints.txt .[cpu,test,check,test-cuda]):",
        "ERROR: No matching distribution found for pillow==13.0.0",
        "hint: x",
    ]
    assert len(said) == 3 * len(resolve.WAYS)


def test_a_wheel_that_cannot_be_built_is_told_with_what_pip_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho 'WARNING: old'\necho 'ERROR: No matching distribution for setuptools' >&2\nexit 1\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(resolve, "new_pip", lambda folder: python)
    monkeypatch.setattr(
        resolve, "OF_WHEEL", ("pyproject.toml",)
    )  # all that is here where a whole installation is tested
    assert resolve.main() == 1
    assert capsys.readouterr().out.splitlines() == [
        f"nothing was tried, since pip cannot build gradstore with {sys.executable}:",
        "ERROR: No matching distribution for setuptools",
    ]


def test_a_level_at_which_gradstore_does_not_load_says_why(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(levels, "_SHOW", "raise SystemExit('no such switch')")
    assert levels.main("uncompiled", ["--version"]) == 1
    assert capfd.readouterr().err.splitlines()[0] == "no such switch"


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="two of the levels are of x86 processors"
)
def test_the_levels_take_shares_that_have_no_test_in_common_and_together_are_all(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(60))\ndef test(i):\n    pass\n"
    )
    found: list[str] = []
    for level in levels.LEVELS:
        command = [sys.executable, str(ROOT / ".ci" / "levels.py"), level, "--share=3", "--collect-only", "-q", "."]
        told = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True).stdout
        some = [line for line in told.splitlines() if "::" in line]
        assert 8 < len(some) < 40
        found += some
    assert sorted(found) == sorted(f"test_some.py::test[{i}]" for i in range(60))


def test_more_shares_than_levels_are_refused() -> None:
    with pytest.raises(SystemExit, match="some would run nowhere"):
        levels.main("uncompiled", ["--share=4", "--version"])


def test_what_reads_the_project_passes_where_a_whole_installation_is_tested(tmp_path: Path) -> None:
    resolve.copy(whole.BESIDE_TESTS, tmp_path)
    reading = {path for path in (tmp_path / "tests").glob("test_*.py") if re.search(r"\bROOT\b", path.read_text())}
    left_out = {tmp_path / name for name in whole.OF_SOURCE}
    assert left_out < reading
    command = [sys.executable, "-m", "pytest", "-q", "-k", "not whole_installation", *map(str, reading - left_out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("needs", "torch"), [([], "2.13.0"), (["nvidia-nccl-cu13==2; extra"], "2.13.0, a CUDA build")])
def test_the_build_of_torch_is_told(monkeypatch: pytest.MonkeyPatch, needs: list[str], torch: str) -> None:
    described = [{"name": "Torch", "version": "2.13.0", "requires_dist": needs}, {"name": "click", "version": "8.5.1"}]
    answer_of_pip(monkeypatch, 0, report={"install": [{"metadata": one} for one in described]})
    here = interpreters.Interpreter((3, 11, 7), Path(sys.executable))
    found = resolve.resolve(Path("pip"), here, (".",))
    assert found == resolve.Resolved({"torch": "2.13.0", "click": "8.5.1"}, torch)
    assert found.cuda == bool(needs)


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-cuda.txt"])
def test_a_pin_for_some_versions_has_another_for_the_rest(file: str) -> None:
    """A pin with a marker alone leaves the versions beyond it with whatever is newest that day."""
    pins = re.findall(r"^([\w-]+)==[\w.]+(?:; (.+))?$", (ROOT / file).read_text(), re.MULTILINE)
    assert len(pins) >= 4
    markers = {name: sorted(marker for other, marker in pins if other == name) for name, _ in pins}
    rest = ['python_version < "3.11"', 'python_version >= "3.11"']
    assert {name: found for name, found in markers.items() if found not in ([""], rest)} == {}


def made(folder: Path, python: Path) -> subprocess.CompletedProcess[str]:
    """What `make` does in a folder that has only what an installation asks for."""
    resolve.copy(("Makefile", "pyproject.toml", "constraints.txt"), folder)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "check", f"PYTHON={python}"]
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_refuses_an_old_python_before_anything_else(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    as_if = "import sys; sys.version, sys.version_info = '3.9.18 (main)', (3, 9, 18); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec "{sys.executable}" -c "{as_if}" "$2"\ntouch installed\n')
    old.chmod(0o755)
    done = made(tmp_path, old)
    said = f"gradstore needs Python 3.10 or newer; {old} is 3.9.18. Name another: make test PYTHON=python3.12"
    assert (done.returncode, done.stdout, done.stderr.splitlines()[0]) == (2, "", said)
    assert not (tmp_path / "installed").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_leaves_nothing_of_another_environment(tmp_path: Path) -> None:
    left = tmp_path / ".venv" / "lib" / "python3.9" / "left.py"
    left.parent.mkdir(parents=True)
    left.touch()
    python = tmp_path / "python3"  # makes the environment, with a pip that goes no further
    stops = 'rm .venv/bin/python; printf "#!/bin/sh\\nexit 3\\n" > .venv/bin/python; chmod +x .venv/bin/python'
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\n"{sys.executable}" "$@" --without-pip && {stops}\n')
    python.chmod(0o755)
    assert made(tmp_path, python).returncode == 2
    assert (tmp_path / ".venv" / "pyvenv.cfg").exists()
    assert not left.exists()
