"""The commands as a user types them: what they print, where, and with which exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gradstore_cli
import numpy as np
import pytest
from commands import PROJECT, run
from gradstore_cli import output
from gradstore_cli.commands import gradstore
from gradstore_cli.output import on_one_line, printable

import gradstore as gs
from gradstore.errors import MismatchError
from gradstore.store.identity import require_same

NARROW = ["  classes[0]", "    on  disk: cat  dog", "    asked for: a lynx"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a project file and its two stores."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "project.py").write_text(PROJECT)
    (folder / "mask.txt").write_text("0\n1\n1\n" * 16)
    for split in ("train", "test"):
        result = run(folder, "featurize project.py --split", split, "--out", split, "--proj-dim 256")
        assert result.status == 0, result.err
    return folder


# -- the three commands ------------------------------------------------------------------------------------------


def test_featurize_prints_the_path_and_says_when_nothing_is_left(folder: Path) -> None:
    again = run(folder, "featurize project.py --split train --out train --proj-dim 256")
    assert (again.status, again.out) == (0, "train\n")
    assert "was finished before; nothing to do" in again.err


def test_topk_finds_each_query_beside_itself(folder: Path) -> None:
    result = run(folder, "topk train test -k 3 --rows 0:4,9 --json")
    records = json.loads(result.out)
    assert [record["row"] for record in records] == [0, 1, 2, 3, 9]
    assert [record["neighbours"][0]["row"] for record in records] == [0, 1, 2, 3, 9]
    assert all(len(record["neighbours"]) == 3 for record in records)


def test_topk_writes_tables_csv_and_html(folder: Path) -> None:
    result = run(folder, "topk train test --csv near.csv --html near.html")
    assert "#5" in result.out
    lines = (folder / "near.csv").read_text().splitlines()
    assert lines[0] == "query_row,rank,train_row,similarity"
    assert len(lines) == 1 + 10 * 5
    assert "data:image/png;base64" in (folder / "near.html").read_text()


def test_forensics_counts_against_the_truth(folder: Path) -> None:
    result = run(folder, "forensics train test -k 1 --votes 1 --json")
    value = json.loads(result.out)
    assert {flagged["row"] for flagged in value["flagged"]} == {0, 3, 6, 9}
    found = value["confusion"]
    assert (found["tp"], found["fp"], found["fn"], found["tn"]) == (2, 2, 0, 6)
    assert (found["precision"], found["recall"]) == (0.5, 1.0)
    assert found["recall_interval"][0] == pytest.approx(0.3424, abs=1e-4)  # Wilson 95 % for 2 of 2


def test_forensics_says_not_applicable_where_nothing_is_flagged(folder: Path) -> None:
    np.save(folder / "none.npy", np.zeros(48, bool))
    result = run(folder, "forensics train test --poisoned none.npy")
    assert "precision      n/a" in result.out


@pytest.mark.parametrize("kernel", ["proj-trntk", "proj-pntk", "proj-trntk0"])
def test_every_kernel_has_the_same_name_everywhere(folder: Path, kernel: str) -> None:
    assert run(folder, "topk train test --json --kernel", kernel).status == 0
    assert json.loads(run(folder, "forensics train test --json --kernel", kernel).out)["kernel"] == kernel


def test_init_check_info(folder: Path) -> None:
    assert run(folder, "init mine.py").status == 0
    assert run(folder, "init mine.py").status == 2
    checked = json.loads(run(folder, "check mine.py --proj-dim 64 --json").out)
    assert all(item["ok"] for item in checked)
    assert [item["name"] for item in checked][-1] == "time"
    assert json.loads(run(folder, "info train --json").out)["split"] == "train, 48 rows"
    assert "projection" in run(folder, "info --system").out


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("topk train nowhere", 2, "nowhere: this is not a gradstore store (expected a directory with store.json)"),
        ("topk train test -k 49", 2, "-k: k does not fit the training store (expected 1 to 48, got 49)"),
        ("topk train test --kernel ntk", 2, "--kernel: unknown kernel (expected one of proj-trntk"),
        ("topk train test --rows 8:12", 2, "--rows: no such query row (expected 0 to 9, got 10)"),
        ("topk train test --rows 0:99999999999999", 2, "--rows: no such query row (expected 0 to 9, got 10)"),
        ("topk train test --rows 1,0:99999999999999", 2, "more rows than any split has"),
        ("topk train test --rows 5:5", 2, "there are no rows in '5:5'"),
        ("topk train test --rows 3,7:2", 2, "there are no rows in '7:2'"),
        ("topk train test --rows -1", 2, "expected rows such as 0:100 or 3,5,8, got '-1'"),
        ("topk train test --rows 0,1,0,1,1,0,0,0,0,0", 2, "10 zeros and ones are likelier a mask"),
        ("forensics train test --poisoned mask.txt", 2, "mask.txt: 48 zeros and ones are likelier a mask"),
        ("topk train test --rows x", 2, "expected rows such as 0:100 or 3,5,8, got 'x'"),
        ("topk train test --memory 1KB", 2, "--memory: too little memory (expected at least"),
        ("forensics train test --votes 6", 2, "--votes: the votes cannot be reached (expected 1 to k = 5, got 6)"),
        ("forensics train test --poisoned gone.txt", 2, "gone.txt: not a list of poisoned rows"),
        ("check gone.py", 3, "gone.py: the project file does not exist"),
        ("check project.py -o size=3", 3, "-o size: unknown project option (expected seed, n, label, got size)"),
        ("check project.py --split val", 2, "--split: unknown split (expected one of train, test, got 'val')"),
        ("featurize project.py --split train --out train --proj-dim 128", 4, "differ in 1 field(s)"),
        (
            "featurize project.py --split train --out train --proj-dim 256 -o seed=1",
            4,
            "has other inputs than when it was stored",
        ),
        ("featurize project.py --split train --out . --proj-dim 128", 2, "exists and is not a gradstore store"),
        ("info", 2, "name a store, or give --system"),
        ("frobnicate", 2, "No such command"),
    ],
)
def test_bad_input_is_one_clear_line(folder: Path, command: str, status: int, message: str) -> None:
    result = run(folder, command)
    assert result.status == status
    assert message in result.err
    assert "Traceback" not in result.err
    assert result.out == "" or command.startswith("check")


def test_a_budget_that_is_less_than_is_promised_is_said_and_used(folder: Path) -> None:
    small, usual = (run(folder, f"topk train test -k 3 --json --memory {memory}") for memory in ("255MB", "256MB"))
    said = "note: --memory is kept from 256.0 MB up; with 255MB, tens of megabytes more may be taken, for the C library"
    assert (small.status, usual.status) == (0, 0)
    assert small.err.count("note:") == 1
    assert said in small.err
    assert "note:" not in usual.err
    assert small.out == usual.out


def test_stores_of_other_weights_are_shown_side_by_side(folder: Path) -> None:
    (folder / "other.py").write_text(PROJECT.replace("manual_seed(0)", "manual_seed(1)", 1))
    run(folder, "featurize other.py --split test --out other --proj-dim 256")
    result = run(folder, "topk train other")
    assert result.status == 4
    rows = [line.split() for line in result.err.splitlines()[1:]]
    assert rows[0] == ["train", "other"]
    assert rows[1][0] == "weights"


def test_stores_of_other_class_names_are_compared(folder: Path) -> None:
    run(folder, "featurize project.py --split test --out lynx --proj-dim 256 -o label=lynx")
    result = run(folder, "topk train lynx")
    assert result.status == 0
    assert "lynx" in result.out


def test_labels_marks_and_names_are_annotated(folder: Path) -> None:
    run(folder, "featurize project.py --split test --out annotated --proj-dim 256")
    before = gs.open(folder / "annotated").labels
    other = (before[[0, 2]] + 1) % 3
    (folder / "table.csv").write_text(f"row,label,poisoned\n0,{other[0]},0\n2,{other[1]},1\n")
    done = run(folder, "annotate annotated --from table.csv --note mended")
    assert done.status == 0
    assert done.err.splitlines()[-1].startswith("annotated: 2 labels, ")
    store = gs.open(folder / "annotated")
    assert store.labels[[0, 2]].tolist() == other.tolist()
    assert store.poisoned[[0, 2]].tolist() == [False, True]
    card = json.loads(run(folder, "info annotated --json").out)
    assert (card["note"], card["poisoned"]) == ("mended", f"{store.poisoned.sum()} rows")
    assert run(folder, "annotate annotated --from project.py").status == 0
    assert gs.open(folder / "annotated").labels.tolist() == before.tolist()
    assert run(folder, "annotate annotated --exclude 0:3").err.splitlines()[-1] == "annotated: 3 exclusions changed"
    assert gs.open(folder / "annotated").present_at[0] == 3
    (folder / "left.txt").write_text("5\n")
    assert run(folder, "annotate annotated --exclude left.txt").status == 0
    assert gs.open(folder / "annotated").absent.nonzero()[0].tolist() == [5]
    assert run(folder, "annotate annotated --exclude none").status == 0
    assert not gs.open(folder / "annotated").absent.any()
    for wrong in (
        "",
        "--exclude 5000",
        "--exclude gone.txt",
        "--from nothing.csv",
        "--classes a",
        "--from project.py --split no",
    ):
        assert run(folder, f"annotate annotated {wrong}").status == 2, wrong


def test_rows_are_removed_by_a_person_who_is_asked_or_says_yes(folder: Path) -> None:
    run(folder, "featurize project.py --split test --out fewer --proj-dim 256")
    assert run(folder, "remove fewer --rows 3").err == (
        "error: --yes: removing rows cannot be undone (expected --yes, since nobody can be asked).\n"
    )
    assert not gs.open(folder / "fewer").absent.any()
    assert json.loads(run(folder, "remove fewer --rows 3,5:7 --yes --json").out)["removed"] == 3
    (folder / "rows.txt").write_text("9\n3\n")
    assert run(folder, "remove fewer --rows rows.txt --yes").err.splitlines()[-1] == "fewer: 2 rows removed"
    assert gs.open(folder / "fewer").absent.nonzero()[0].tolist() == [3, 5, 6, 9]
    card = run(folder, "info fewer").out
    assert "absent       4 since it was removed: 3, 5-6, 9" in card
    said = run(folder, "remove fewer --rows 5-9").err
    assert "expected rows such as 0:100 (100 not among them) or 3,5,8, or a file that is there, got '5-9'" in said
    for wrong in ("", "--rows nothing.txt --yes", "--rows 3:3 --yes", "--rows 1000 --yes", "--rows rows.npy --yes"):
        assert run(folder, f"remove fewer {wrong}").status == 2, wrong


@pytest.mark.parametrize(("columns", "shown"), [(1000, ["  classes[0]  cat  dog  a lynx"]), (20, NARROW)])
def test_values_in_which_spaces_stand_are_shown_whole(
    columns: int, shown: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "_columns", lambda stream: columns)
    with pytest.raises(MismatchError) as refused:
        require_same(
            {"classes[0]": "cat  dog"}, {"classes[0]": "a lynx"}, where="s", theirs="on  disk", ours="asked\nfor"
        )
    output.say_error(refused.value)
    assert capsys.readouterr().err.splitlines()[-len(shown) :] == shown


def test_a_traceback_is_shown_when_asked_for(folder: Path) -> None:
    with pytest.raises(Exception, match="not a gradstore store"):
        gradstore_cli.main(["--traceback", "info", str(folder / "nowhere")])


def test_labels_cannot_move_the_cursor(folder: Path) -> None:
    assert printable("\x1b[2Jcat\r\x07") == "\ufffd[2Jcat\ufffd\ufffd"


def test_labels_that_need_joiners_stay_whole() -> None:
    for label in ("\N{WOMAN}\u200d\N{PERSONAL COMPUTER}", "می\u200cخواهم"):
        assert printable(label) == on_one_line(label) == label


def test_a_label_forges_no_line(folder: Path, tmp_path: Path) -> None:
    label = "cat\nforged: line"
    (tmp_path / "project.py").write_text(PROJECT.replace('label: str = "cat"', f"label: str = {label!r}"))
    for split in ("train", "test"):
        assert run(tmp_path, "featurize project.py --split", split, "--out", split, "--proj-dim 64").status == 0
    assert run(tmp_path, "fit train --out fitted").status == 0
    result = run(tmp_path, "attribute fitted test --row 0 --rather-than dog")
    assert result.out.startswith(
        "query row 0, cat forged: line by the surrogate: why cat forged: line rather than dog?"
    )
    result = run(tmp_path, "attribute fitted test --row 0 --class lynx")
    assert (result.status, len(result.err.splitlines())) == (2, 1)
    result = run(tmp_path, f"topk {folder}/train test")
    assert (result.status, [line for line in result.err.splitlines() if line.startswith("forged")]) == (4, [])


# -- help and signals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", sorted(gradstore.commands))
def test_help_shows_defaults_and_an_example(folder: Path, command: str) -> None:
    result = run(folder, command, "--help")
    assert result.status == 0
    assert f"gradstore {command}" in result.out
    assert "Example" in result.out
    assert "--json" in result.out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_continue(tmp_path: Path, number: signal.Signals, status: int) -> None:
    (tmp_path / "project.py").write_text(PROJECT)
    words = ["featurize", "project.py", "--split", "train", "--out", "s", "--proj-dim", "4096", "-o", "n=4000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gradstore_cli", *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("s/.shard-*.tmp")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert f"gradstore {' '.join(words)}" in err
    assert "rows are stored in s" in err
    assert not list(tmp_path.glob("s/.shard-*.tmp"))


def test_json_everywhere(folder: Path) -> None:
    commands: list[Any] = list(gradstore.commands.values())
    assert all("--json" in {o for p in c.params for o in p.opts} for c in commands)


def test_places_that_cannot_be_written_get_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for words in (
        ("topk train test -k 1 --csv", f"{tmp_path}/file/x.csv"),
        ("topk train test -k 1 --html", f"{tmp_path}/file/x.html"),
        ("demo", f"{tmp_path}/file"),
    ):
        result = run(folder, *words)
        assert result.status == 2
        assert [line for line in result.err.splitlines() if line.startswith("error: ")]
        assert "bug" not in result.err
    assert (tmp_path / "file").read_text() == "mine"


def test_the_first_help_keeps_its_lines(folder: Path) -> None:
    assert "\n  A first look:       gradstore demo\n" in run(folder, "--help").out


# -- JSON --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        [{"row": 1, "label": "a\nb", "near": [{"s": 0.5}, []]}, {"row": 2, "label": None, "near": []}],
        {"kernel": "größe", "flagged": [{"row": 1}, {"row": 2}], "none": [], "nested": {"a": [1, 2]}},
        [{"flagged": [1, 2], "k": 3}, {"flagged": [], "k": 4}],
        "text",
    ],
)
def test_streamed_json_is_what_json_writes(value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def streamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: streamed(held) for name, held in value.items()}
        return map(streamed, value) if isinstance(value, list) else value

    output.print_json(streamed(value))
    assert capsys.readouterr().out == json.dumps(value, indent=2) + "\n"
    output.print_json(value)
    assert capsys.readouterr().out == json.dumps(value, indent=2) + "\n"


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        output.print_json(iter([{"similarity": float("nan")}]))


def test_streamed_results_are_those_of_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gradstore as gs

    monkeypatch.chdir(folder)
    train, test = gs.open("train"), gs.open("test")
    expected = json.dumps(gs.topk(train, test, 3).records(), indent=2)
    assert run(folder, "topk train test -k 3 --json").out == expected + "\n"
    expected = json.dumps(gs.forensics(train, [test], k=3, votes=1).as_dict(), indent=2)
    assert run(folder, "forensics train test -k 3 --votes 1 --json").out == expected + "\n"
