"""Every command in a terminal: what a person sees, at any width, whatever has been set, and after Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import run
from conftest import Record
from gradstore_cli.commands import gradstore
from screens import CASES, GOLDEN, Case, require_golden
from terminal import CTRL_C, Screen, Terminals, in_terminal
from test_cli_streams import CONTROL as STREAMS

import gradstore as gs
from gradstore.native import library

PROJECT = """
import math
import warnings
import torch
from torch import nn
from torch.utils.data import TensorDataset
import gradstore as gs

class Told(TensorDataset):
    def __init__(self, *tensors, warn):
        super().__init__(*tensors)
        self.warn, self.reads = warn, 0

    def __getitem__(self, row):
        if row == self.warn:
            self.reads += 1
            warnings.warn(f"row {row}, read {self.reads} times, is a blurred picture, taken in the dark")
        return super().__getitem__(row)

def project(n: int = 48, warn: int = -1, bad: int = -1, split: str = "train"):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 1, 6, 6, generator=g), torch.arange(n) % 3
    if bad >= 0:
        x[bad] = math.inf
    return gs.Project(
        model=nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
        splits={split: Told(x, y, warn=warn), "test": TensorDataset(x[:10] + 0.1, y[:10])},
        classes=["cat", "dog", "größerer Vogel"], show=gs.image(), poisoned={split: [0, 3, 6, 9], "test": [0, 3]},
    )
"""
SLOW = "featurize project.py --split train --out slow --proj-dim 8192 -o n=8000"
PARAMETERS = [pytest.param(case, columns, id=f"{case.name}-{columns}") for case in CASES for columns in case.columns]
EACH = list({case.line.split()[0]: case for case in CASES if case.status == 0 and "help" not in case.name}.values())
DRAWN = [case for case in CASES if case.name in ("featurize", "topk", "forensics", "verify-damaged", "topk-nowhere")]


@pytest.fixture(scope="session")
def terminals() -> Iterator[Terminals]:
    opened = Terminals()
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def finished(terminals: Terminals, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command finds what it needs."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "project.py").write_text(PROJECT)
    for line in (
        "featurize project.py --split train --proj-dim 256 --out train",
        "featurize project.py --split test --proj-dim 256 --out test",
        "fit train --out fitted.safetensors",
        "export train features.npy",
    ):
        screen = terminals.run(folder, *line.split())
        assert screen.status == 0, screen.text
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "user"))


def look(terminals: Terminals, folder: Path, case: Case, columns: int, **more: str) -> Screen:
    """The screen of a case, which holds what all screens must."""
    if case.prepare is not None:
        case.prepare(folder)
    screen = terminals.run(folder, *case.line.split(), columns=columns, **more)
    require_sound(screen, case.status)
    return screen


def require_sound(screen: Screen, status: int) -> None:
    assert screen.status == status, screen.text
    assert "Traceback" not in screen.text
    assert "bug:" not in screen.text
    assert screen.is_left_in_order
    for line in screen.whole_lines:
        assert "─" not in line or len(line) <= screen.columns, "a table is broken"
        assert "━" not in line or len(line) <= screen.columns - len("^C"), "Ctrl-C would break the bar"


@pytest.mark.parametrize(("case", "columns"), PARAMETERS)
def test_screen(case: Case, columns: int, terminals: Terminals, folder: Path) -> None:
    screen = look(terminals, folder, case, columns)
    if case.stable and library.available():  # the torch projection has another name, which moves line ends
        require_golden(case.name, columns, screen.text, keep=True)


def test_every_command_is_tried_in_a_terminal() -> None:
    tried = {case.line.split()[0] for case in CASES if case.status == 0}
    assert set(gradstore.commands) - tried == set(), "a command without a terminal test is not done"


def test_every_screen_that_is_kept_is_compared() -> None:
    kept = {f"{case.name}.{columns}.txt" for case in CASES if case.stable for columns in case.columns}
    assert {path.name for path in GOLDEN.iterdir()} == kept


# -- what people have set ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DRAWN, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["NO_COLOR", "FORCE_COLOR"])
def test_colours_change_no_letter(name: str, case: Case, terminals: Terminals, folder: Path) -> None:
    screen = look(terminals, folder, case, 80, **{name: "1"})
    if library.available():
        require_golden(case.name, 80, screen.text)
    coloured = re.search(rb"\x1b\[[0-9;]*3[0-9][0-9;]*m", screen.written)
    assert (coloured is not None) == (name == "FORCE_COLOR" and case.name == "featurize"), "only bars have colours"


@pytest.mark.parametrize("columns", ["20", "300"])
def test_an_exported_width_is_not_the_terminals(columns: str, terminals: Terminals, folder: Path) -> None:
    for case in (case for case in CASES if case.name in ("help", "featurize", "featurize-workers", "topk")):
        more = {"COLUMNS": columns, "LINES": "2"}
        shutil.rmtree(folder / "new", ignore_errors=True)
        screen = look(terminals, folder, case, 80, **more)
        if library.available():
            require_golden(case.name, 80, screen.text)


@pytest.mark.parametrize("case", DRAWN, ids=lambda case: case.name)
def test_a_dumb_terminal_gets_no_control_sequence(case: Case, terminals: Terminals, folder: Path) -> None:
    screen = look(terminals, folder, case, 160, TERM="dumb")
    assert b"\x1b" not in screen.written
    assert ("━" in screen.text) is False
    if case.name == "featurize":
        assert "\ntrain: 48/48 rows  " in screen.text
    if case.name == "topk" and library.available():
        require_golden(case.name, 160, screen.text)


def test_forced_colours_put_no_bar_into_a_pipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = run(folder, "featurize project.py --split train --proj-dim 256 --out new")
    assert (result.status, result.out) == (0, "new\n")
    assert "\ntrain: 48/48 rows  " in result.err
    assert "\x1b" not in result.err
    for line in ("index train --rebuild", "gram train test --out gram.h5"):
        assert "\x1b" not in run(folder, line).err


def test_a_pipe_gets_whole_lines(folder: Path) -> None:
    lines = run(folder, "topk train test -k 20 --rows 0").out.splitlines()
    assert lines[2].split() == ["query", "label", "predicted", *(f"#{rank}" for rank in range(1, 21))]
    assert len(run(folder, "index train --rebuild").out.splitlines()) == 6


@pytest.mark.parametrize(
    ("more", "arrow", "label"),
    [
        ({"PYTHONIOENCODING": "latin-1"}, rb"\u2192", "größerer".encode("latin-1")),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "→".encode(), "größerer".encode()),
    ],
    ids=["latin-1", "C"],
)
def test_letters_that_the_locale_does_not_have(
    more: dict[str, str], arrow: bytes, label: bytes, folder: Path, record: Record
) -> None:
    line = "featurize project.py --split train --proj-dim 256 --out new --workers 2"
    screen = in_terminal(folder, *line.split(), **more)
    require_sound(screen, 0)
    assert arrow in screen.written
    screen = in_terminal(folder, "topk", "train", "test", **more)
    require_sound(screen, 0)
    assert label in screen.written
    record("E2", "locales without the letters of labels and messages", injected=2, recovered=2, refused=0, silent=0,
           control=f"print alone: {of_python(more)}")  # fmt: skip


def of_python(more: dict[str, str]) -> str:
    """The control: what Python makes of an arrow there."""
    program = [sys.executable, "-c", "print('\\u2192')"]
    done = subprocess.run(program, capture_output=True, env={**os.environ, **more}, check=False)
    assert b"UnicodeEncodeError" in done.stderr
    return "UnicodeEncodeError"


# -- closed streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EACH, ids=lambda case: case.name)
@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_with_a_stream_closed(closed: str, case: Case, terminals: Terminals, folder: Path, record: Record) -> None:
    screen = terminals.run(folder, *case.line.split(), "--json", closed=[closed])
    require_sound(screen, 0)
    if closed == "stderr":
        json.loads("\n".join(screen.whole_lines))
    else:
        assert re.search("^[{[]|\x1b\\[", screen.text, re.MULTILINE) is None, "JSON, or a bar, is on the wrong stream"
    record("E1", "streams that are closed, full, or read by nobody", injected=1, recovered=1, refused=0, silent=0,
           control=STREAMS)  # fmt: skip


def test_ctrl_c_with_stderr_closed(terminals: Terminals, folder: Path) -> None:
    (folder / "project.py").write_text(PROJECT + "\nprint('loaded', flush=True)\n")
    screen = terminals.run(folder, *SLOW.split(), closed=["stderr"], press=("loaded", CTRL_C))
    assert (screen.status, screen.text) == (130, "loaded\n^C")


# -- Ctrl-C ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "workers", "presses", "warm"), [(40, "1", 1, True), (80, "2", 1, True), (80, "1", 3, False)]
)
def test_featurize_stopped(
    columns: int, workers: str, presses: int, warm: bool, terminals: Terminals, folder: Path
) -> None:
    words = (*SLOW.split(), "--workers", workers)
    start = terminals.run if warm else in_terminal
    screen = start(folder, *words, columns=columns, press=("0/8,000 rows", CTRL_C * presses))
    require_sound(screen, 130)
    assert "^C" not in screen.text
    said = f"stopped: 0 of 8,000 rows are stored in slow; the same command continues: gradstore {' '.join(words)}"
    assert screen.whole_lines[-1] == said
    assert sum("━" in line for line in screen.whole_lines) == 1, "one bar is left"


@pytest.mark.parametrize(
    ("pressed", "status", "said", "left"),
    [
        (b"y\n", 0, "train: 2 rows removed", 46),
        (b"\n", 0, "nothing was removed", 48),
        (b"\x04", 0, "nothing was removed", 48),
        (CTRL_C, 130, "stopped: the same command begins again: gradstore remove train --rows 3,40", 48),
    ],
    ids=["yes", "no", "end", "ctrl-c"],
)
def test_before_rows_are_removed_a_person_is_asked(
    pressed: bytes, status: int, said: str, left: int, terminals: Terminals, folder: Path
) -> None:
    question = "Remove 2 of 48 rows of train for good, 3, 40? [y/N]:"
    screen = terminals.run(folder, *["remove", "train", "--rows", "3,40"], press=("[y/N]", pressed))
    assert screen.status == status, screen.text
    assert screen.whole_lines[0].startswith(question)
    assert screen.whole_lines[-1] == said
    assert len(gs.open(folder / "train").present_at) == left


@pytest.mark.parametrize(
    ("line", "at", "said"),
    [
        (
            "topk train project.py -o n=16000 -o warn=20 --split train",
            "blurred",
            "stopped: the same command begins again: ",
        ),
        (
            "gram project.py train -o n=4000 --out gram.h5",
            "values",
            "stopped: finished parts are kept beside gram.h5; ",
        ),
        ("demo there --proj-dim 64", "featurizing", "stopped: what is finished is kept in there; the same command "),
    ],
)
def test_stopped(line: str, at: str, said: str, terminals: Terminals, folder: Path) -> None:
    screen = terminals.run(folder, *line.split(), press=(at, CTRL_C))
    require_sound(screen, 130)
    assert "^C" not in screen.text
    assert screen.whole_lines[-1].startswith(said)
    assert screen.whole_lines[-1].endswith(f": gradstore {line}")
