"""What commands import before they begin: each in a process of its own, which says what it has imported in the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gradstore_cli.commands import gradstore
from synthetic import clustered, write_store
from terminal import in_terminal

import gradstore as gs

HEAVY = ("torch", "sklearn", "scipy", "faiss", "transformers", "PIL", "jinja2", "h5py", "numpy")
# What stored bytes are read with; whatever else is heavy, no command here may import.
READING = {"numpy", "h5py"}
PROGRAM = f"""
import sys, gradstore_cli
try:
    gradstore_cli.main()
finally:
    print("imported", *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("starting")
    poisoned = np.arange(24) % 5 == 0
    for name in ("train", "changed", "cut"):
        write_store(path / name, clustered(24, 3, 16), shard_rows=8, poisoned=poisoned)
    write_store(path / "test", clustered(6, 3, 16, seed=1), poisoned=poisoned[:6])
    gs.Session(gs.open(path / "train"))
    np.save(path / "other.npy", np.ones((4, 8), np.float32))
    (path / "labels.csv").write_text("row,label\n3,1\n")
    return path


def imported(folder: Path, line: str, status: int = 0) -> set[str]:
    """What a command has imported that is heavy."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM, *line.split()], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == status, ran.stderr
    return set(ran.stderr.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "line",
    [
        "info train",
        "verify train",
        "verify changed --repair",
        "annotate changed --note seen",
        "annotate changed --from labels.csv",
        "annotate changed --exclude 3",
        "remove cut --rows 3 --yes",
        "export train train.npy",
        "export train train.safetensors",
    ],
)
def test_what_reads_or_changes_a_store_needs_no_torch(folder: Path, line: str) -> None:
    assert imported(folder, line) <= READING


def test_the_features_of_a_store_are_read_without_torch(folder: Path) -> None:
    code = (
        "import sys, numpy as np, gradstore as gs\nstore = gs.open('train')\n"
        "np.save('read.npy', store.features[3:5]); store.labels, store.present_at, store.data\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    assert np.array_equal(np.load(folder / "read.npy"), gs.open(folder / "train").features[3:5])


NOWHERE = {
    "info": ("info no", 2),
    "verify": ("verify no", 2),
    "annotate": ("annotate no --note seen", 2),
    "remove": ("remove no --rows 3 --yes", 2),
    "export": ("export no x.npy", 2),
    "index": ("index no", 2),
    "topk": ("topk train no", 2),
    "forensics": ("forensics train no", 2),
    "gram": ("gram train no --out x.h5", 2),
    "fit": ("fit no --out x.safetensors", 2),
    "evaluate": ("evaluate no test", 2),
    "attribute": ("attribute no test --row 0", 2),
    "residual": ("residual no.py no", 2),
    "check": ("check no.py", 3),
    "featurize": ("featurize no.py --out x", 3),
    "import": ("import no.npy --out x --tool trak --model m", 2),
    "init": ("init train/no/project.py --no", 2),
    "doctor": ("doctor --no", 2),
    "demo": ("demo --seed no", 2),
}


def test_every_command_is_refused_something_below() -> None:
    assert set(NOWHERE) == set(gradstore.commands)


@pytest.mark.parametrize("command", sorted(NOWHERE))
def test_what_is_nowhere_is_refused_before_torch_and_hdf5_are_imported(folder: Path, command: str) -> None:
    line, status = NOWHERE[command]
    assert imported(folder, line, status) <= {"numpy"}


@pytest.mark.parametrize("line", ["index train", "topk train test", "forensics train test", "fit train --out x"])
def test_a_kernel_that_is_none_is_refused_at_once(folder: Path, line: str) -> None:
    assert imported(folder, f"{line} --kernel no", 2) == set()


@pytest.mark.parametrize(("line", "status"), [("--version", 0), ("--help", 0), ("inof train", 2), ("init p.py", 0)])
def test_what_needs_no_store_does_not_even_import_numpy(folder: Path, line: str, status: int) -> None:
    assert imported(folder, line, status) == set()


@pytest.mark.parametrize("line", ["topk train test", "forensics train test", "gram train --out gram.h5"])
def test_a_scan_imports_torch_and_nothing_else_that_is_heavy(folder: Path, line: str) -> None:
    assert imported(folder, line) == {*READING, "torch"}


@pytest.mark.parametrize("line", ["topk train test --mode certified", "index train"])
def test_an_index_needs_scipy_besides(folder: Path, line: str) -> None:
    assert imported(folder, line) == {*READING, "torch", "scipy"}


def test_a_terminal_is_told_what_is_waited_for_and_nothing_of_it_is_left(folder: Path) -> None:
    screen = in_terminal(folder, "topk", "train", "test", "-k", "1")
    assert screen.status == 0
    assert screen.written.startswith("loading torch …\r\x1b[K".encode())
    assert "loading" not in screen.text
    assert screen.is_left_in_order


def test_a_terminal_that_cannot_move_its_cursor_is_spared_it(folder: Path) -> None:
    screen = in_terminal(folder, "topk", "train", "test", "-k", "1", TERM="dumb")
    assert screen.status == 0
    assert b"loading" not in screen.written
