"""`gradstore doctor`: what is installed, which ways to multiply by P are right, and which are used."""

from __future__ import annotations

import json
import logging
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from commands import run

from gradstore.native import library
from gradstore.projection import compiled_product, diagnosis, trust, verdicts
from gradstore.projection.verdicts import Verdict

CPU = torch.device("cpu")


class Path:
    """A path of a GPU that is not there."""

    def __init__(self, name: str, absent: str = "") -> None:
        self.name, self.absent = name, absent

    def suits(self, index: int, kind: str) -> bool:
        return kind == "rademacher" or (kind == "gaussian" and self.name != "triton")

    def missing(self, index: int) -> str:
        return self.absent


@pytest.fixture
def card(monkeypatch):
    """A card whose first path gives wrong products, whose second is right, and where the third is not installed."""
    paths = Path("wgmma"), Path("mma"), Path("triton", "Triton is not installed; pip install triton")
    asked = []

    def verdict(path, index, kind, precision, *, again=False):
        asked.append(again)
        fault = "12 values are wrong" if path.name == "wgmma" else ""
        return Verdict(fault, 16, seconds=4.0, at="2026-01-01T00:00:00+00:00")

    monkeypatch.setattr(diagnosis, "PATHS", paths)
    monkeypatch.setattr(trust, "PATHS", paths)
    monkeypatch.setattr(trust, "verdict", verdict)
    monkeypatch.setattr(verdicts, "kept", verdict)
    monkeypatch.setattr(diagnosis.self_check, "on_device", lambda index: lambda: lambda: True)
    monkeypatch.setattr(diagnosis.torch, "device", lambda *_: CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some Card")
    return SimpleNamespace(asked=asked, paths=paths)


def test_a_machine_without_a_gpu_is_well(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    done = run(tmp_path, "doctor")
    assert (done.status, done.err) == (0, "")
    lines = [line for line in done.out.splitlines() if line.startswith("  ")]
    assert [line.split()[:4] for line in lines] == [
        ["ok", library.status().level or "reference", kind, "exact"] for kind in ("rademacher", "gaussian", "sjlt")
    ]
    assert all("in use" in line for line in lines)


def test_without_compiled_code_the_reference_is_checked_and_said_to_be_slow(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(library, "load", lambda: "it was not built")
    done = run(tmp_path, "doctor")
    assert done.status == 0
    assert re.search(r"ok +reference  rademacher exact  in use  11 products right, .* s; it was not built; ", done.out)


def test_a_wrong_path_fails_is_not_used_and_sets_the_exit_status(card, tmp_path):
    done = run(tmp_path, "doctor")
    assert done.status == 4
    after = done.out[done.out.index("Some Card, cuda:0") :].splitlines()
    assert after[1:4] == [
        "  FAILS  wgmma      rademacher fast           12 values are wrong",
        "  ok     mma        rademacher fast   in use  16 products right, 4.0 s on 2026-01-01T00:00:00+00:00",
        "  absent triton     rademacher fast           Triton is not installed; pip install triton",
    ]
    hint = "A GPU does not use what fails; report a wrong product with this output"
    assert done.err == f"error: 4 of 15 checks fail. {hint}.\n"


def test_what_is_only_not_installed_is_no_failure(card, tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosis, "PATHS", card.paths[1:])
    done = run(tmp_path, "doctor")
    assert (done.status, done.err) == (0, "")
    assert "  absent triton " in done.out


def test_where_nothing_works_the_reference_is_used(card, tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosis, "PATHS", card.paths[:1])
    done = run(tmp_path, "doctor")
    assert done.status == 4
    assert re.search(
        r"  ok     reference  gaussian exact    in use  11 products right, .*; in torch, hundreds of", done.out
    )


def test_checks_are_repeated_when_asked(card, tmp_path):
    run(tmp_path, "doctor")
    assert not any(card.asked)
    card.asked.clear()
    run(tmp_path, "doctor --again")
    assert card.asked.count(True) == 8


def test_a_wrong_compiled_product_is_found(tmp_path, monkeypatch):
    if not library.available():
        pytest.skip("no compiled code")
    right = compiled_product.accumulate
    wrong = lambda entries, out, block, start, k: right(entries, out, block, start + 128, k)  # noqa: E731
    monkeypatch.setattr(compiled_product, "accumulate", wrong)
    done = run(tmp_path, "doctor")
    assert done.status == 4
    assert "  FAILS  " in done.out
    assert "values are wrong, first row 0, k 0: " in done.out


def test_json_has_the_same(card, tmp_path):
    done = run(tmp_path, "doctor --json")
    value = json.loads(done.out)
    assert done.status == 4
    assert value["system"]["on cuda:0"] == "mma (checked 2026-01-01T00:00:00+00:00); not wgmma: 12 values are wrong"
    assert {check["device"] for check in value["checks"]} == {"cpu", "Some Card, cuda:0"}
    assert [check["path"] for check in value["checks"] if check["used"] and check["device"] != "cpu"] == [
        *["mma"] * 4,
        *["reference"] * 2,  # no fused code of this card is for a sparse P
    ]


@pytest.mark.parametrize("words", ["doctor now", "doctor --agian"])
def test_a_mistyped_command_is_one_error(words, tmp_path):
    done = run(tmp_path, words)
    assert done.status == 2
    assert "Traceback" not in done.err
    assert "Error:" in done.err


def test_what_the_library_warns_of_or_logs_is_one_line(tmp_path, monkeypatch):
    def diagnose(again):
        logging.getLogger("gradstore.projection.trust").info("checking %s", "wgmma")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("projecting by mma: wgmma: a fault", RuntimeWarning, 2)
        return []

    monkeypatch.setattr(diagnosis, "diagnose", diagnose)
    done = run(tmp_path, "doctor")
    assert done.err == "note: checking wgmma\nnote: projecting by mma: wgmma: a fault\n"
    assert not logging.getLogger("gradstore").handlers
