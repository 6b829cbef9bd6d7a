"""Standard streams that are closed, full, or read by nobody, and Ctrl-C before a command has begun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import PROJECT, run
from conftest import Record

FULL = Path("/dev/full")
CONTROL = "print alone: on a closed stdout exit 0 and no word, on a full one 120 and lines that name no file"
STOPPED_AT_START = """
import os, signal, sys
class CtrlC:
    def find_spec(name, path=None, target=None):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, CtrlC)
import gradstore_cli
gradstore_cli.main(["--help"])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "project.py").write_text(PROJECT)
    assert run(folder, "featurize project.py --split train --out train --proj-dim 64").status == 0
    return folder


def in_shell(folder: Path, line: str, *, buffered: bool = True) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a line of bash, in which `gradstore` is the command."""
    program = f'set -o pipefail; gradstore() {{ "{sys.executable}" -m gradstore_cli "$@"; }}; {line}'
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    done = subprocess.run(["bash", "-c", program], cwd=folder, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


def note(record: Record, count: int, *, refused: int) -> None:
    record("E1", "streams that are closed, full, or read by nobody", injected=count, recovered=count - refused,
           refused=refused, silent=0, control=CONTROL)  # fmt: skip


@pytest.mark.parametrize(("command", "buffered"), [("info train", False), ("topk train train", True), ("--help", True)])
def test_who_stops_reading_ends_the_command_quietly(command: str, buffered: bool, folder: Path, record: Record) -> None:
    # The first command writes once its reader has gone for sure.
    status, out, err = in_shell(folder, f"{{ sleep 0.3; gradstore {command}; }} | exec 0<&-", buffered=buffered)
    assert (status, out, err) == (141, "", "")
    note(record, 1, refused=1)


def test_the_first_line_only(folder: Path) -> None:
    status, out, err = in_shell(folder, "gradstore topk train train | head -n 1")
    assert status in (0, 141)
    assert out == "the 5 most similar training rows by proj-trntk: row (label), similarity\n"
    assert err == ""


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize(("command", "buffered"), [("info train", False), ("topk train train", True), ("--help", True)])
def test_results_that_do_not_fit_are_one_error(command: str, buffered: bool, folder: Path, record: Record) -> None:
    status, _, err = in_shell(folder, f"gradstore {command} > {FULL}", buffered=buffered)
    assert (status, err) == (7, "error: stdout: the results cannot be written (got No space left on device).\n")
    note(record, 1, refused=1)


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_what_print_alone_does() -> None:
    """The control: Python's own streams."""
    program, environment = [sys.executable, "-c", "print(1)"], {**os.environ, "PYTHONUNBUFFERED": ""}
    for shell, status, said in ((f'exec "$@" > {FULL}', 120, "Exception ignored"), ('exec "$@" >&-', 0, "")):
        words = ["bash", "-c", shell, "bash", *program]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, done.stderr[: len(said)]) == (status, said)
        assert "stdout:" not in done.stderr


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize("redirection", [f"2> {FULL}", "2>&-", "2>&- <&-"])
def test_messages_that_cannot_be_written_stop_nothing(redirection: str, folder: Path, record: Record) -> None:
    line = "gradstore featurize project.py --split train --out train --proj-dim 64 --json"
    status, out, err = in_shell(folder, f"{line} {redirection}")
    assert (status, err) == (0, "")
    assert json.loads(out)["split"] == "train, 48 rows"
    assert in_shell(folder, f"gradstore topk nowhere train {redirection}") == (2, "", "")
    note(record, 2, refused=1)


def test_with_all_streams_closed_a_command_works(folder: Path, record: Record) -> None:
    assert in_shell(folder, "gradstore export train features.npy <&- >&- 2>&-") == (0, "", "")
    assert run(folder, "export train same.npy").status == 0
    assert (folder / "features.npy").read_bytes() == (folder / "same.npy").read_bytes()
    note(record, 1, refused=0)


@pytest.mark.parametrize("redirections", [(), ("2>&-",)])
def test_ctrl_c_while_commands_are_imported(redirections: Sequence[str], tmp_path: Path) -> None:
    (tmp_path / "start.py").write_text(STOPPED_AT_START)
    status, out, err = in_shell(tmp_path, " ".join(['"' + sys.executable + '" start.py', *redirections]))
    assert (status, out, err) == (130, "", "" if redirections else "stopped\n")


def test_a_process_of_ours_that_has_ended_is_no_closed_stdout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradstore.projection import diagnosis

    def diagnose(again: bool) -> None:
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(diagnosis, "diagnose", diagnose)
    result = run(folder, "doctor")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("bug: RuntimeError: a process has ended early: of a worker")


INTERRUPTED = """
import os, signal, torch
import gradstore as gs
from torch.utils.data import TensorDataset

class Scope:
    def __enter__(self):
        return self
    def __exit__(self, *error):
        if error[0] is not None:
            raise RuntimeError("trying to pop from an empty stack")

def interrupt():
    with Scope():
        os.kill(os.getpid(), signal.{number})
        for _ in range(1000):  # where Python calls the handler
            pass

class Model(torch.nn.Linear):
    calls = 0
    def forward(self, x):
        Model.calls += 1
        if Model.calls == {call}:
            interrupt()
        return super().forward(x)

def project():
    if {call} == 0:
        interrupt()
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(40, 3), torch.zeros(40, dtype=torch.int64))
    return gs.Project(model=Model(3, 2), splits={{"train": data}})
"""


IN_A_FINALIZER = """
import os, signal, torch
import gradstore as gs
from torch.utils.data import TensorDataset

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # where Python calls the handler
            pass

class Model(torch.nn.Linear):
    calls = 0
    def forward(self, x):
        Model.calls += 1
        if Model.calls == 12:
            Dying()
        return super().forward(x)

def project():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(40, 3), torch.zeros(40, dtype=torch.int64))
    return gs.Project(model=Model(3, 2), splits={"train": data})
"""


def test_a_signal_within_a_finalizer_stops_a_command_without_a_traceback(tmp_path: Path) -> None:
    """Python cannot raise anything from there: it would print that it ignores it, and go on."""
    (tmp_path / "project.py").write_text(IN_A_FINALIZER)
    found, out, err = in_shell(tmp_path, "gradstore featurize project.py --split train --out store --proj-dim 64")
    assert (found, out) == (143, ""), err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("stopped: ")


@pytest.mark.parametrize(
    ("number", "status", "call"), [("SIGINT", 130, 0), *(("SIGTERM", 143, call) for call in (8, 10, 12, 14, 24))]
)
def test_a_signal_that_a_library_turns_into_an_error_is_still_a_signal(
    number: str, status: int, call: int, tmp_path: Path
) -> None:
    """It arrives within the clean-up of a library, here of the project, which then fails with an error of its own."""
    (tmp_path / "project.py").write_text(INTERRUPTED.format(number=number, call=call))
    words = "featurize project.py --split train --out store --proj-dim 64"
    found, out, err = in_shell(tmp_path, f"gradstore {words}")
    assert (found, out) == (status, ""), err
    assert err.splitlines()[-1].startswith("stopped: ")
    assert err.splitlines()[-1].endswith(f"gradstore {words}")
