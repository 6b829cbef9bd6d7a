"""Names of classes, splits, files and folders that forge lines, move the cursor or are markup, wherever shown."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from commands import PROJECT
from gradstore_cli import output
from gradstore_cli.commands import gradstore
from hostile_calls import exit_status
from terminal import Terminals

LABEL = "cat\x1b[2J\x1b]0;owned\x07[/red]\nforged label\r\u202e→ü"
SPLIT = "split\x1b[31m[/b]\nforged split\r→ü"
PLACE = "dir\x1b[1A[red]\nforged folder→ü"
CLASSES = PROJECT.replace('label: str = "cat"', f"label: str = {LABEL!r}").replace('"train": ', f"{SPLIT!r}: ")

# {p}: the hostile folder; a word is what stands between bars.
FEATURIZE = f"featurize|{{p}}/project.py|--proj-dim|64|--split|{SPLIT}|--out"
LINES = [
    f"{FEATURIZE}|{{p}}/new",
    f"{FEATURIZE}|{{p}}/new|--workers|2",
    f"{FEATURIZE}|{{p}}/train",
    f"check|{{p}}/project.py|--proj-dim|64|--split|{SPLIT}",
    "check|{p}/gone.py",
    f"check|{{p}}/project.py|--split|{LABEL}",
    f"check|{{p}}/project.py|-o|{LABEL}=1",
    "check|{p}/fails.py",
    "init|{p}/mine.py",
    "info|{p}/train",
    "info|{p}/gone",
    "index|{p}/train|--rebuild",
    "topk|{p}/train|{p}/test",
    "topk|{p}/train|{p}/test|--csv|{p}/a.csv|--html|{p}/a.html",
    "topk|{p}/train|{p}/project.py|--rows|0:3|--error-bars",
    f"topk|{{p}}/train|{{p}}/test|--classes|{LABEL} - dog",
    f"topk|{{p}}/train|{{p}}/test|--mode|{LABEL}",
    "topk|{p}/train|{p}/other",
    "forensics|{p}/train|{p}/test|-k|1|--votes|1|--html|{p}/b.html",
    "gram|{p}/train|{p}/test|--out|{p}/g.h5",
    f"gram|{{p}}/project.py|{SPLIT}|--out|{{p}}/e.h5",
    "residual|{p}/project.py|{p}/train|{p}/test|--pairs|9|--csv|{p}/r.csv|--html|{p}/r.html",
    "fit|{p}/train|--out|{p}/fit|--max-iter|9",
    "attribute|{p}/fitted|{p}/test|--row|0|--rather-than|dog",
    f"attribute|{{p}}/fitted|{{p}}/test|--row|0|--class|{SPLIT}",
    "evaluate|{p}/fitted|{p}/test|--bootstrap|2",
    "verify|{p}/train",
    "verify|{p}/damaged",
    f"annotate|{{p}}/copy|--classes|{LABEL},dog,cat|--note|{LABEL}",
    "remove|{p}/copy|--rows|3|--yes",
    "remove|{p}/copy|--rows|{p}/gone",
    "export|{p}/train|{p}/x.npy",
    f"import|{{p}}/features.npy|--out|{{p}}/i|--tool|{LABEL}|--model|{LABEL}|--split|{SPLIT}",
    "import|{p}/fitted|--out|{p}/i|--tool|t|--model|m",
    "demo|{p}/project.py",
    f"{LABEL}",
]
ASIDE = ("doctor",)  # shows no name


def words(line: str) -> list[str]:
    return [word.replace("{p}", PLACE) for word in line.split("|")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("user")
    place = root / PLACE
    place.mkdir()
    (place / "project.py").write_text(CLASSES)
    (place / "fails.py").write_text(f"def project():\n    raise ValueError({LABEL!r})\n")
    (place / "others.py").write_text(CLASSES.replace("manual_seed(0)", "manual_seed(1)", 1))
    shown = None
    for name, file, split in (("train", "project", SPLIT), ("test", "project", "test"), ("other", "others", "test")):
        line = f"featurize|{{p}}/{file}.py|--proj-dim|64|--split|{split}|--out|{{p}}/{name}"
        shown = outcome(root, line, "utf-8")
        assert shown[0] == 0, shown
    for line in ("fit|{p}/train|--out|{p}/fitted", "export|{p}/train|{p}/features.npy"):
        assert outcome(root, line, "utf-8")[0] == 0
    shutil.copytree(place / "train", place / "damaged")
    (shard,) = (place / "damaged").glob("shard-*.h5")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "user"))


def outcome(root: Path, line: str, encoding: str) -> tuple[object, bytes, bytes]:
    """Status, stdout and stderr of a command whose streams have an encoding, strict as Python makes them."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2)]
    before = Path.cwd()
    os.chdir(root)
    try:
        with patch.object(sys, "stdout", streams[0]), patch.object(sys, "stderr", streams[1]):
            status = exit_status(words(line))
    finally:
        os.chdir(before)
    out, err = (stream.buffer.getvalue() for stream in streams)  # type: ignore[attr-defined]
    return status, out, err


def require_harmless(text: str) -> None:
    assert "bug:" not in text
    assert "Traceback" not in text
    assert re.search("[\0-\x08\x0b-\x1f\x7f\u202e]", text) is None
    assert [row for row in text.split("\n") if row.startswith("forged")] == []


@pytest.mark.parametrize(
    "line", LINES, ids=[f"{i}-{line.split('|')[0]}"[:14] for i, line in enumerate(LINES[:-1])] + ["x"]
)
def test_no_name_forges_a_line(line: str, root: Path) -> None:
    """In a pipe, of every encoding that a locale may bring."""
    known = None
    for encoding in ("ascii", "latin-1"):  # the former is taken for a mistake, and UTF-8 written
        for name in ("new", "i", "fit"):
            shutil.rmtree(root / PLACE / name, ignore_errors=True)
        for name in ("mine.py", "g.h5", "e.h5"):
            (root / PLACE / name).unlink(missing_ok=True)
        status, out, err = outcome(root, line, encoding)
        assert status in (0, *range(2, 10))
        assert known in (None, status)
        known = status
        shown = "utf-8" if encoding == "ascii" else encoding
        if line.startswith("featurize"):  # a path for another program, to the letter
            assert out.decode(shown).encode("utf-8", "replace")
            out = b""
        require_harmless(out.decode(shown) + err.decode(shown))


@pytest.mark.parametrize("command", sorted(set(gradstore.commands) - set(ASIDE)))
def test_every_command_is_tried(command: str) -> None:
    assert any(line.split("|")[0] == command for line in LINES)


@pytest.mark.parametrize(
    "line",
    [
        line
        for line in LINES
        if "--json" not in line and line.split("|")[0] in ("topk", "info", "forensics", "attribute")
    ],
)
def test_json_holds_names_as_they_are(line: str, root: Path) -> None:
    status, out, _ = outcome(root, f"{line}|--json", "ascii")
    if status == 0:
        assert "forged" in json.dumps(json.loads(out)) or "forensics" in line
        assert out.isascii()


def test_pages_show_names_as_text(root: Path) -> None:
    for line in LINES:
        if "--html" in line:
            assert outcome(root, line.replace("|--csv|{p}/a.csv", ""), "utf-8")[0] == 0
    pages = [path.read_text() for path in (root / PLACE).glob("*.html")]
    assert len(pages) == 3
    for page in pages:
        assert re.search("[\0-\x08\x0b-\x1f\x7f\u202e]", page) is None


# -- terminals ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def terminals() -> Iterator[Terminals]:
    opened = Terminals()
    yield opened
    opened.close()


@pytest.mark.parametrize("place", [0, 1, 3, 9, 11, 12, 14, 19, 23, 27])
def test_no_name_moves_a_terminals_cursor(place: int, terminals: Terminals, root: Path) -> None:
    screen = terminals.run(root, *words(LINES[place]), columns=40 if place % 2 else 200)
    assert screen.status in (0, 5)
    assert screen.is_left_in_order
    for sequence in (b"\x1b[2J", b"\x1b]0", b"\x07", b"\x1b[1A[red]", b"\x1b[31m[/b]", "\u202e".encode()):
        assert sequence not in screen.written
    assert [row for row in screen.text.split("\n") if row.startswith("forged")] == []


def test_the_old_way_forged_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """The control: text that is printed as it is."""
    print(f"wrote {PLACE}", LABEL)
    shown = capsys.readouterr().out
    with pytest.raises(AssertionError):
        require_harmless(shown)
    output.say(f"wrote {PLACE} {LABEL}")
    require_harmless(capsys.readouterr().err)
