"""Files that commands write: refused before the work, written to streams, and whole after a kill and another try."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from commands import PROJECT, run
from conftest import Record
from forking import Forks
from test_cli_streams import in_shell

import gradstore as gs
from gradstore.store.annotations import ANNOTATIONS

pytestmark = pytest.mark.soak

COMMANDS = {
    "topk train test -k 2 --csv {}": "x.csv",
    "topk train test -k 2 --html {}": "x.html",
    "forensics train test --html {}": "x.html",
    "residual project.py train test --pairs 9 --csv {}": "x.csv",
    "residual project.py train test --pairs 9 --html {}": "x.html",
    "gram train test --out {}": "x.h5",
    "gram project.py test --kernel ck --out {}": "x.h5",
    "fit train --out {}": "x",
    "export train {}": "x.npy",
}
"""Every command that writes a file, and a name for one."""
FOLDERS = {
    "index {0}/train --rebuild --no-recall": "train",
    "init {0}/project.py": "",
    "featurize project.py --split test --proj-dim 64 --out {0}/new": "new",
    "import a.npy --tool t --model m --out {0}/new": "new",
}
"""Every command that writes into a folder of its own, and that folder; `demo` takes too long to be killed often."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "project.py").write_text(PROJECT)
    for split in ("train", "test"):
        line = f"featurize project.py --split {split} --out {split} --proj-dim 64"
        assert run(folder, line).status == 0
    assert run(folder, "export train a.npy").status == 0
    return folder


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*arguments: object, **settings: object) -> None:
        raise AssertionError("the work has begun")

    for name in ("topk", "forensics", "residual", "gram", "exact_gram", "KernelGLM", "open", "load_project"):
        monkeypatch.setattr(gs, name, worked)
    whole = (folder / "train/store.json").read_bytes()
    for line, name in COMMANDS.items():
        suffix = Path(name).suffix
        (folder / f"taken{suffix}").mkdir(exist_ok=True)
        for place, message in (
            (f"taken{suffix}", "the output is a directory"),
            ("train/store.json", "place of a store's own file"),
            ("train/shard-00007.h5", "place of a store's own file"),
            ("train/.lock", "place of a store's own file"),
            ("project.py/x" + suffix, "the output cannot be used (got Not a directory)"),
        ):
            result = run(folder, line.format(place))
            assert (result.status, result.out) == (2, ""), (line, place, result.err)
            assert message in result.err
            assert result.err.count("\n") == 1
    for line in ("gram train test --out /dev/null", "gram train test --out /dev/stdout"):
        assert "must be a file, not a stream" in run(folder, line).err
    assert (folder / "train/store.json").read_bytes() == whole


def test_an_output_is_no_other_file_of_the_command(folder: Path) -> None:
    before = (folder / "project.py").read_bytes()
    (folder / "rows.txt").write_text("0\n")
    for line in (
        "topk train project.py --rows 0:2 --csv project.py",
        "topk train test --csv both --html ./both",
        "residual project.py train --html project.py",
        "forensics train test --poisoned rows.txt --html rows.txt",
        "gram project.py train --out project.py",
    ):
        result = run(folder, line)
        assert result.status == 2
        assert "the output is another file of this command" in result.err
    assert (folder / "project.py").read_bytes() == before
    assert (folder / "rows.txt").read_text() == "0\n"
    assert not (folder / "both").exists()


def test_tables_and_pages_go_to_streams(folder: Path) -> None:
    line = "gradstore topk train test -k 2 --rows 0:3 --csv /dev/stdout --html >(cat > piped; touch done) --json; "
    status, out, err = in_shell(folder, line + "for i in $(seq 100); do [ -e done ] && break; sleep 0.05; done")
    table, bracket, _ = out.partition("[")
    assert (status, bracket, table.count("\n")) == (0, "[", 7)
    assert err.startswith("wrote /dev/stdout\nwrote /dev/fd/")
    assert (folder / "piped").read_text().endswith("</html>")


# -- the same command after a kill --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks("warm_featurize", OMP_NUM_THREADS="1") as server:
        yield server


def content(path: Path) -> dict[str, bytes]:
    """Every byte that a command leaves, but locks and the log of runs; of annotations what they say, not when."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {
        str(file.relative_to(path)): said(file) if file.name == ANNOTATIONS else file.read_bytes()
        for file in found
        if file.is_file() and file.name not in (".lock", "run.jsonl")
    }


def said(file: Path) -> bytes:
    """What annotations say of the rows of their store."""
    store = gs.open(file.parent)
    return repr((store.classes, store.labels.tolist(), np.asarray(store.poisoned).tolist(), store.note)).encode()


def attempt(forks: Forks, folder: Path, line: str, stderr: Path, killed_after: float | None = None) -> int:
    """Exit status of a command, which is perhaps killed."""
    stderr.unlink(missing_ok=True)
    order = {"job": "run_command", "arguments": line.split(), "folder": str(folder), "stderr": str(stderr)}
    (pid,) = forks.start({**order, "shard_flops": 4e5})
    if killed_after is not None:
        time.sleep(killed_after)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return forks.statuses()[0]


def test_the_same_command_after_a_kill_is_the_way_on(
    forks: Forks, folder: Path, fast: Path, amount: Callable[[int, int], int], record: Record
) -> None:
    chance, kills, err = random.Random(0), 0, fast / "err"
    every = COMMANDS | FOLDERS
    tried = list(every)[-amount(5, len(every)) :]
    for i, line in enumerate(tried):
        name = every[line]
        first, out = fast / f"first{i}", fast / f"out{i}"
        for place in (first, out):
            place.mkdir()
            if line.startswith("index"):
                shutil.copytree(folder / "train", place / "train")
        lines = [line.format(place if line in FOLDERS else place / name) for place in (first, out)]
        began = time.monotonic()
        assert attempt(forks, folder, lines[0], err) == 0, err.read_text()
        seconds = time.monotonic() - began
        for _ in range(amount(2, 10)):
            kills += attempt(forks, folder, lines[1], err, chance.uniform(0, 0.7) * seconds) == -signal.SIGKILL
        status = attempt(forks, folder, lines[1], err)
        # `init` leaves a file alone that is there, and what is there is whole.
        assert status == 0 or (line.startswith("init") and "is left alone" in err.read_text()), err.read_text()
        assert content(out) == content(first), line
    assert kills > 0
    record("F22", "every command that writes, killed and run again", injected=kills, recovered=kills, refused=0,
           silent=0, control="see F19: with one temporary name a file of zeros may be left")  # fmt: skip
