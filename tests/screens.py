"""Every command as a person runs it, and the screens that they leave, kept in `data/screens`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gradstore as gs

GOLDEN = Path(__file__).parent / "data" / "screens"
WRITE = "GRADSTORE_WRITE_SCREENS"
NARROW, WIDE = (40, 80), (40, 80, 160)
LONG = "a/rather/long/path/to/the/place/where/somebody/keeps/very/many/stores/of/gradients"


def damage(folder: Path) -> None:
    """Flip a bit of the training store's features."""
    (shard,) = (folder / "train").glob("shard-*.h5")
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)


def lose_rows(folder: Path) -> None:
    """Remove rows of the training store."""
    gs.remove(folder / "train", [3, 10, 11])


@dataclass(frozen=True)
class Case:
    """A command.

    Attributes:
        name: of the case, and of its files.
        line: what is typed after `gradstore`.
        columns: widths at which it is tried.
        status: exit status.
        stable: whether its screen is the same everywhere.
        prepare: what happens to the folder before.
    """

    name: str
    line: str
    columns: tuple[int, ...] = (80,)
    status: int = 0
    stable: bool = True
    prepare: Callable[[Path], object] | None = None


_FEATURIZE = "featurize project.py --split train --proj-dim 256 --out "

CASES = [
    Case("help", "--help", NARROW),
    Case("help-topk", "topk --help", NARROW),
    Case("unknown-command", "topc train test", status=2),
    Case("missing-argument", "topk train", NARROW, status=2),
    Case("init", "init mine.py", NARROW),
    Case("init-again", "init project.py", status=2),
    Case("check", "check project.py --proj-dim 256", NARROW, stable=False),  # says how long it will take
    Case("check-fails", "check project.py -o size=3", status=3),
    Case("doctor", "doctor", NARROW, stable=False),
    Case("info", "info train", NARROW),
    Case("info-system", "info --system", NARROW, stable=False),
    Case("featurize", _FEATURIZE + "new", WIDE),
    Case("featurize-workers", _FEATURIZE + "new --workers 2"),
    Case("featurize-finished", _FEATURIZE + "train"),
    Case("featurize-appends", _FEATURIZE + "train -o n=60 --json"),
    Case("featurize-grows", _FEATURIZE.replace("256", "512") + "new --grow-from train"),
    Case("featurize-mends", _FEATURIZE + "train", NARROW, prepare=damage),
    Case("featurize-long-path", _FEATURIZE + LONG, NARROW),
    Case("featurize-mismatch", _FEATURIZE.replace("train", "test") + "train", NARROW, status=4),
    Case("featurize-not-finite", _FEATURIZE + "new -o bad=5", NARROW, status=8),
    Case("featurize-skips", _FEATURIZE + "new -o bad=5 --on-bad-row skip", NARROW),
    Case("featurize-warns", _FEATURIZE + "new -o warn=20", NARROW),
    Case("featurize-odd-split", "featurize project.py --split [/b] --proj-dim 256 --out new -o split=[/b]"),
    Case(
        "featurize-long-split", f"featurize project.py --split {LONG} --proj-dim 256 --out new -o split={LONG}", NARROW
    ),
    Case("index", "index train --rebuild", NARROW),
    Case("topk", "topk train test --rows 0:3", WIDE),
    Case("topk-error-bars", "topk train test --rows 0:3 --error-bars", WIDE),
    Case("topk-certified", "topk train test -k 3 --mode certified"),
    Case("topk-of-a-project", "topk train project.py --split test --rows 0:3 --html topk.html --csv topk.csv"),
    Case("topk-nowhere", f"topk train {LONG}", NARROW, status=2),
    Case("forensics", "forensics train test --votes 2", WIDE),
    Case("gram", "gram train test --arithmetic float32 --out gram.h5", NARROW),
    Case("gram-of-a-project", "gram project.py train test --out gram.h5"),
    Case("gram-nowhere", "gram nowhere --out gram.h5", status=2),
    Case("residual", "residual project.py train test --pairs 36 --html residual.html", NARROW),
    Case("fit", "fit train --out new.safetensors --alpha auto", NARROW),
    Case("attribute", "attribute fitted.safetensors test --row 3", NARROW),
    Case("attribute-rows", "attribute fitted.safetensors test --rows 3:5 -k 1", WIDE),
    Case("evaluate", "evaluate fitted.safetensors test --bootstrap 20", WIDE),
    Case("verify", "verify train", NARROW),
    Case("verify-damaged", "verify train", NARROW, status=5, prepare=damage),
    Case("annotate", "annotate train --note mended"),
    Case("remove", "remove train --rows 3,10:12 --yes", NARROW),
    Case("info-absent", "info train", NARROW, prepare=lose_rows),
    Case("topk-absent", "topk test train --rows 3", NARROW, status=2, prepare=lose_rows),
    Case("export", "export train features.npy"),
    Case("import", "import features.npy --out imported --tool trak --model resnet9"),
    Case("demo", "demo there --proj-dim 64", stable=False),  # trains a network
]


def require_golden(name: str, columns: int, text: str, *, keep: bool = False) -> None:
    """Compare a screen with the one that is kept; with `keep`, keep it first where that is asked for."""
    path, found = GOLDEN / f"{name}.{columns}.txt", masked(text) + "\n"
    if keep and os.environ.get(WRITE):
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert found == path.read_text(), (
        f"if this is how it should look: {WRITE}=1 pytest tests/cli/test_terminal.py -k test_screen"
    )


def masked(text: str) -> str:
    """The text without what differs from run to run and from machine to machine; columns stay where they are."""
    text = re.sub("[━╸╺]+", "━━━", text)
    text = re.sub(r"[\d.,]+ rows/s", "#.# rows/s", text)
    text = re.sub(r"^\d+ seconds: .*", "# seconds: …", text, flags=re.MULTILINE)
    text = re.sub(r"(?<=iterations  )\d+", "##", text)
    text = re.sub(r"\d+(?= rows read)", "##", text)  # by bounds, which rest on the arithmetic
    text = re.sub(r"\d+:\d\d:\d\d|\d+\.\d+|\b(?=[a-f]*\d)[0-9a-f]{5,}\b", lambda m: _hidden(m[0]), text)
    return text


def _hidden(text: str) -> str:
    return re.sub("[0-9a-f]", "#", text)
