"""Whatever a command is given: it works, or refuses in one line with the status that README lists; never a bug."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import hostile_calls
import pytest
from commands import run
from conftest import Record
from hostile_calls import CALLS, prepare
from test_cli_streams import CONTROL as STREAMS

SCRIPT = Path(__file__).parents[1] / "hostile_calls.py"
STATUSES = {0, *range(2, 10)}
FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    prepare(folder)
    return folder


def problem(done: dict[str, Any]) -> str:
    """What is wrong with the outcome of a call; empty where nothing is."""
    status, err = done["status"], done["err"]
    refusals = [line for line in err.split("\n") if re.match("error: ", line, re.IGNORECASE)]
    foreign = re.search(
        "bug:|Traceback|Warning|warning: |note: (?!--memory|a kernel|nothing keeps)|[\0-\x08\x0b-\x1f\x7f]", err
    )
    if status not in STATUSES:
        return f"status {status}"
    if foreign:
        return f"says {foreign.group()!r}"
    if len(refusals) != (status != 0):
        return f"{len(refusals)} refusals with status {status}"
    if refusals and "differ" not in refusals[0] and not err.endswith(refusals[0] + "\n"):
        return "more lines than one"
    return "moves the cursor" if re.search("[\0-\x08\x0b-\x1f\x7f]", done["out"]) else ""


CONTROL = "the judge is shown ten wrong outcomes, bugs and forged lines among them, and names each"


@pytest.mark.soak
def test_a_hostile_value_is_refused_in_one_line(
    tmp_path: Path, amount: Callable[[int, int], int], record: Record
) -> None:
    calls, environment = amount(750, 5000), {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    running = []
    for seed in ("0", "1"):
        prepare(tmp_path / seed)
        command = [sys.executable, str(SCRIPT), str(tmp_path / seed), seed, str(calls)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    bad = []
    for process in running:
        lines = [json.loads(line) for line in process.communicate()[0].splitlines()]
        assert len(lines) == 2 * calls, f"the process ended in {lines[-1]}"
        bad += [(problem(done), words, done) for words, done in zip(lines[::2], lines[1::2], strict=True)]
    assert [found for found in bad if found[0]] == []
    refused = sum(done["status"] != 0 for _, _, done in bad)
    record("A1", "hostile arguments of commands", injected=len(bad), recovered=len(bad) - refused, refused=refused,
           silent=0, control=CONTROL)  # fmt: skip


CLEAN = {"status": 2, "out": "", "err": "note: --memory is kept\nerror: no.\n"}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, ""),
        ({"err": "Usage: gradstore\n\nError: no\n"}, ""),
        ({"status": 0, "err": ""}, ""),
        ({"status": 1}, "status 1"),
        ({"status": "Hangs()"}, "status Hangs()"),
        ({"err": "bug: no\n"}, "says 'bug:'"),
        ({"err": "x.py:1: RuntimeWarning: overflow\nerror: no.\n"}, "says 'Warning'"),
        ({"err": "note: overflow encountered\nerror: no.\n"}, "says 'note: '"),
        ({"err": "error: \x1b[2J\n"}, "says '\\x1b'"),
        ({"err": ""}, "0 refusals with status 2"),
        ({"status": 0}, "1 refusals with status 0"),
        ({"err": "error: no\nforged\n"}, "more lines than one"),
        ({"status": 0, "err": "", "out": "\x1b[2J"}, "moves the cursor"),
    ],
)
def test_the_judge_sees_what_is_wrong(change: dict[str, Any], found: str) -> None:
    assert problem({**CLEAN, **change}) == found


# What used to be called a bug, or hung, or was accepted; each stands for its kind, which is mended in one place.
ONCE = [
    ("topk train test --memory 1e400", 2, "--memory: not a number of bytes (expected 1 to 1e+18, got '1e400')"),
    ("topk train test --memory AUTO", 2, "(expected for example 2GB or 512MiB, got 'AUTO')"),
    ("check project.py --memory AUTO", 2, "(expected for example 2GB or 512MiB, or auto, got 'AUTO')"),
    ("topk train test --memory ٣GB", 2, "--memory: not a number of bytes"),
    (
        "check project.py --device xpu",
        2,
        "--device: unknown device (expected auto, cpu, cuda or cuda:<index>, got 'xpu')",
    ),
    ("gram train test --out gram.h5 --device meta", 2, "--device: unknown device"),
    ("featurize project.py --out new --batch-size ²", 2, "expected auto or a positive integer, got '²'"),
    ("featurize project.py --out new --workers 2147483648", 2, "is not in the range 1<=x<=1024"),
    ("forensics train test -k " + 400 * "9", 2, "-k: k does not fit the training store"),
    ("evaluate fitted test --bootstrap 2147483648", 2, "is not in the range 0<=x<=1000000"),
    ("import features.npy --out new --tool t --model m --shape -1", 2, "expected sizes like 50000,4096, got '-1'"),
    ("import features.npy --out new --tool t --model m --shape 999999999999999999", 2, "bytes for shape"),
    ("import blank.npy --out new --tool t --model m", 2, "this is no array of features"),
    ("import pipe --out new --tool t --model m", 2, "'pipe': a pipe or a device, not a file"),
    ("import features.npy --out new --tool \udcff --model m", 2, "new: a store cannot hold this"),
    ("featurize project.py --out new --proj-dim 64 -o label=\udcff", 2, "new: a store cannot hold this"),
    ("forensics train test --poisoned /dev/zero", 2, "'/dev/zero': a pipe or a device, not a file"),
    ("forensics train test --poisoned blank.npy", 2, "blank.npy: not a list of poisoned rows"),
    ("topk loop test", 2, "'loop': Too many levels of symbolic links"),
    ("topk train " + 300 * "x", 2, "File name too long"),
    ("topk train test --csv .", 2, ".: the output is a directory"),
    ("topk train test extra\x1b[2J", 2, "Got unexpected extra argument (extra\ufffd[2J)"),
    ("check /proc/self/mem", 3, "/mem: the project file cannot be read"),
]


@pytest.mark.parametrize(("line", "status", "message"), ONCE, ids=list(map(str, range(len(ONCE)))))
def test_what_was_called_a_bug_is_refused(line: str, status: int, message: str, folder: Path, record: Record) -> None:
    result = run(folder, line)
    assert message in result.err
    assert problem({"status": result.status, "out": result.out, "err": result.err}) == ""
    assert result.status == status
    assert not (folder / "new").exists()
    record("A1", "hostile arguments of commands", injected=1, recovered=0, refused=1, silent=0, control=CONTROL)


@pytest.mark.parametrize("line", ["topk|train|", "init|\0", "export|train|a\0.npy", "residual|project.py|train|--csv|"])
def test_a_path_is_a_path(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, record: Record) -> None:
    monkeypatch.chdir(folder)
    done = hostile_calls.call(line.split("|"))
    assert (done["status"], problem(done)) == (2, "")
    record("A1", "hostile arguments of commands", injected=1, recovered=0, refused=1, silent=0, control=CONTROL)


# -- stdout ------------------------------------------------------------------------------------------------------

QUIET = ("demo", "init", "export", "verify", "import", "annotate", "remove")  # whose results are files
PRINTING = [line for line in CALLS if line.split()[0] not in QUIET]


@pytest.mark.parametrize("line", PRINTING)
@pytest.mark.parametrize("more", ["", " --json"], ids=["text", "json"])
def test_results_that_nobody_takes(more: str, line: str, folder: Path, record: Record) -> None:
    """141 where nobody reads any more, 7 where the disk is full."""
    for status, opened in ((141, _closed_pipe), (7, _full)):
        if status == 7 and not FULL.exists():
            continue
        with pytest.MonkeyPatch.context() as patch, opened() as stream:
            patch.setattr(sys, "stdout", stream)
            patch.chdir(folder)
            done = hostile_calls.exit_status((line + more).split())
        assert done == status
        record("E1", "streams that are closed, full, or read by nobody", injected=1, recovered=0, refused=1, silent=0,
               control=STREAMS)  # fmt: skip
        shutil.rmtree(folder / "new", ignore_errors=True)


def _full() -> TextIO:
    return FULL.open("w")


def _closed_pipe() -> TextIO:
    reads, writes = os.pipe()
    os.close(reads)
    return os.fdopen(writes, "w")
