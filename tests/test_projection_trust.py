"""A path of a GPU is used only after it has proved itself there: faults are found, and the next path is taken."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from emulated_paths import EmulatedPath

from gradstore.projection import trust

HERE = Path(__file__).parent
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulation with")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A GPU that is not there, whose paths are emulated in processes of their own; counts the checks."""
    checks = []

    def check_apart(arguments):
        checks.append(arguments)
        path = next(path for path in trust.PATHS if path.name == arguments[1])
        program = [str(HERE / "emulated_paths.py")]
        return apart([arguments[0], f"{path.name}:{path.fault}", *arguments[2:]], program)

    apart = trust.check_apart
    monkeypatch.setenv("EMULATED_FOLDER", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trust, "check_apart", check_apart)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Card")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = {"name": "Some Card", "uuid": "1"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Card", (), properties))
    trust.chosen.cache_clear()
    yield checks
    trust.chosen.cache_clear()


def choose(monkeypatch, *paths, kind="rademacher", precision="fast"):
    monkeypatch.setattr(trust, "PATHS", paths)
    return trust.choose(paths, 0, kind, precision)


@needs_compiler
@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("permuted", r"\d+ of 4096 values are wrong, first row 1, k \d+: 0 instead of -?2?1? ?.*one-hot gradients"),
        ("wrong-word", r"values are wrong, first row \d+, k \d+: "),
        ("hangs", r"it did not end within 0 s \(one-hot gradients, 32 x 256"),
        ("raises", r"RuntimeError: launching the projection failed: CUDA_ERROR_LAUNCH_FAILED \(one-hot"),
        ("dies", r"the process that checked it ended with status 9 \(one-hot"),
    ],
)
def test_a_path_with_a_fault_is_passed_over(machine, monkeypatch, fault, found):
    choice = choose(monkeypatch, EmulatedPath("wgmma", fault), EmulatedPath("mma"))
    assert choice.path.name == "mma"
    (reason,) = choice.passed_over
    assert reason.startswith("wgmma: ")
    print(reason)


@needs_compiler
def test_a_path_that_is_right_is_taken(machine, monkeypatch):
    choice = choose(monkeypatch, EmulatedPath("wgmma"), EmulatedPath("mma"))
    assert (choice.path.name, choice.passed_over) == ("wgmma", ())
    assert [check[1] for check in machine] == ["wgmma"]
