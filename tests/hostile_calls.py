"""Calls commands with hostile values, thousands in one process; `cli/test_hostile_arguments.py` judges what they did.

Run with a folder made by `prepare`, a seed and a number of calls. It prints a line of JSON before each call and one
after it, so that a call that ends the process is known too.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
from commands import PROJECT, run
from gradstore_cli import main
from gradstore_cli.commands import gradstore
from hostile_values import TEXTS, values_of

SECONDS = 20  # after which a call hangs
_ROOM = 3 << 30  # bytes that a call may take beside what is loaded

# What each command is called with where nothing is hostile; the demo takes a minute, and gets as far as its folder.
CALLS = [
    *("demo project.py", "init mine.py", "check project.py --proj-dim 16", "info train"),
    *("featurize project.py --proj-dim 64 --out new", "index train", "topk train test", "forensics train test"),
    *("topk train project.py --rows 0:2", "gram train test --out gram.h5", "gram project.py test --out exact.h5"),
    *("residual project.py train test --pairs 4", "fit train --out surrogate", "attribute fitted test --row 0"),
    *("evaluate fitted test --bootstrap 2", "verify train", "export train out.npy"),
    *("import features.npy --out new --tool t --model m", "annotate spare --note n", "remove spare --rows 0 --yes"),
]
_COSTLY = ("check", "residual")  # and called less often
_LEFT_OUT = {"--help", "--again", "--faiss"}  # whose factories are FAISS's own to judge


def prepare(folder: Path) -> None:
    """A project, its stores and what is made of them; and things that are none of these."""
    folder.mkdir(exist_ok=True)
    (folder / "project.py").write_text(PROJECT)
    made = [f"featurize project.py --split {split} --out {split} --proj-dim 64" for split in ("train", "test")]
    for line in (*made, "fit train --out fitted", "export train features.npy"):
        result = run(folder, line)
        assert result.status == 0, result.err
    shutil.copytree(folder / "train", folder / "spare")
    noise = np.random.default_rng(0)
    for name in ("noise", "noise.npy", "noise.h5", "noise.safetensors", "hostile.py"):
        (folder / name).write_bytes(noise.bytes(3000))
    for name in ("blank", "blank.npy"):
        (folder / name).touch()
    np.save(folder / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(folder / "many.npy", np.arange(100_000))
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "empty").mkdir()


def a_call(draw: random.Random) -> list[str]:
    """One command line, in which a word or two are hostile."""
    line = draw.choice([line for line in CALLS for _ in range(2 if line.split()[0] in _COSTLY else 10)])
    name, *words = line.split()
    if draw.random() < 0.04:
        return draw.choice([[name, *words, draw.choice(TEXTS)], [name, *words, "--" + draw.choice(TEXTS)], [name[:-1]]])
    options = [
        p for p in gradstore.commands[name].params if isinstance(p, click.Option) and not _LEFT_OUT & set(p.opts)
    ]
    arguments = [p for p in gradstore.commands[name].params if isinstance(p, click.Argument)]
    for _ in range(draw.choice([1, 1, 1, 2])):
        places = len(line.split(" --")[0].split()) - 1
        if places and draw.random() < 0.25:
            place = draw.randrange(places)
            words[place] = draw.choice(values_of(arguments[min(place, len(arguments) - 1)]))
            continue
        option = draw.choice(options)
        flag = draw.choice([*option.opts, *option.secondary_opts])
        words += [flag] if option.is_flag else [flag, draw.choice(values_of(option))]
    return [name, *words]


def call(words: list[str]) -> dict[str, Any]:
    """What a command did: its status, what it printed, and for how long it ran."""
    began = time.monotonic()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as err,
        patch.object(sys, "stdout", out),
        patch.object(sys, "stderr", err),
    ):
        status = exit_status(words)
        said = [(stream.seek(0), stream.read(20_000))[1] for stream in (out, err)]
    return {"status": status, "out": said[0], "err": said[1], "seconds": time.monotonic() - began}


def exit_status(words: list[str]) -> object:
    """How a command ends in this process; anything but its own exit as text."""
    handler = signal.getsignal(signal.SIGTERM)
    signal.alarm(SECONDS)
    try:
        main(words)
    except SystemExit as stop:
        return stop.code or 0
    except BaseException as error:  # which is for the judge to see
        return repr(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGTERM, handler)
    return "returned"


class Hangs(BaseException):
    """The time is up."""


def _hang(*_: object) -> None:
    raise Hangs


def _tidy(folder: Path, kept: set[str]) -> None:
    for entry in folder.iterdir():
        if entry.name not in kept:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def serve(folder: Path, seed: int, count: int) -> None:
    """Make so many calls, and say what came of each."""
    os.chdir(folder)
    signal.signal(signal.SIGALRM, _hang)
    kept, draw = {entry.name for entry in folder.iterdir()}, random.Random(seed)
    lines = os.fdopen(os.dup(1), "w")
    if sys.platform == "linux":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + _ROOM,) * 2)
    for _ in range(count):
        words = a_call(draw)
        print(json.dumps(words), file=lines, flush=True)
        print(json.dumps(call(words)), file=lines, flush=True)
        _tidy(folder, kept)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
