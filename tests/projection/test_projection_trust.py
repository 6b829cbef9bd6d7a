"""A path of a GPU is used only after it has proved itself there: faults are found, and the next path is taken."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulated_paths import EmulatedPath

from gradstore.errors import GradstoreError
from gradstore.featurization import environment
from gradstore.projection import Projection, self_check, trust, verdicts
from gradstore.projection.check_apart import check_apart
from gradstore.projection.entries import Entries
from gradstore.projection.trust import Choice
from gradstore.projection.verdicts import Verdict

HERE = Path(__file__).parents[1]
GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulation with")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Where the emulations are compiled, each once for all tests; which fault a folder has is in its name."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def machine(tmp_path, compiled, monkeypatch):
    """A GPU that is not there, whose paths are emulated in processes of their own; lists the checks that were made."""
    checks = []

    def apart(arguments):
        checks.append(" ".join(arguments))
        path = next(path for path in trust.PATHS if path.name == arguments[1])
        program = [str(HERE / "emulated_paths.py")]
        return check_apart([arguments[0], f"{path.name}:{path.fault}", *arguments[2:]], program)

    monkeypatch.setenv("EMULATED_FOLDER", str(compiled))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trust, "check_apart", apart)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Card")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="Some Card", uuid="1"))
    trust._chosen.cache_clear()
    yield checks
    trust._chosen.cache_clear()


def choose(monkeypatch, *paths, kind="rademacher", precision="fast"):
    monkeypatch.setattr(trust, "PATHS", paths)
    return trust.choose(paths, 0, kind, precision, trust.verdict)


# ---- what a check finds --------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (
            "permuted",
            r"512 of 4096 values are wrong, first row 1, k 0: 2 instead of 1 \(one-hot float32 gradients, 32 x 256",
        ),
        ("wrong-word", r"\d+ of 4096 values are wrong, first row 26, k 1: 3 instead of 1 \(one-hot float32 gradients"),
        ("hangs", r"it did not end within 0 s \(one-hot float32 gradients, 32 x 256"),
        ("raises", r"RuntimeError: launching the projection failed: CUDA_ERROR_LAUNCH_FAILED \(one-hot"),
        ("dies", r"the process that checked it ended with status 9 \(one-hot"),
        ("killed", r"the process that checked it ended with status -9 \(one-hot"),
        ("memory", r"OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB \(one-hot"),
        ("no-start", r"the process that checked it ended with status 1: ImportError: .* \(before the first problem\)"),
    ],
)
def test_a_path_with_a_fault_is_passed_over(machine, monkeypatch, fault, found):
    choice = choose(monkeypatch, EmulatedPath("wgmma", fault), EmulatedPath("mma"))
    assert choice.path.name == "mma"
    (reason,) = choice.passed_over
    assert re.match(f"wgmma: {found}", reason), reason


@needs_compiler
@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("another-block", r"\d+ of 65536 values are wrong, first row 1, k \d+: .* \(one-hot float32 gradients, 32 x"),
        ("unsynchronised", r"\d+ of \d+ values are wrong, first row \d+, k \d+: "),
        ("rows-of-another-scale", r"\d+ of \d+ values are wrong, .* \(uneven float32 gradients, 33 x 9000"),
        ("raises", r"RuntimeError: launching the projection failed: CUDA_ERROR_LAUNCH_FAILED \(one-hot"),
    ],
)
def test_sums_with_a_fault_are_passed_over(machine, monkeypatch, fault, found):
    choice = choose(monkeypatch, EmulatedPath("wgmma"), EmulatedPath("sums", fault), kind="sjlt")
    assert choice.path is None
    (reason,) = choice.passed_over
    assert re.match(f"sums: {found}", reason), reason


@needs_compiler
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_sums_that_are_right_are_taken_for_a_sparse_p(machine, monkeypatch, precision):
    paths = EmulatedPath("wgmma"), EmulatedPath("sums")
    choice = choose(monkeypatch, *paths, kind="sjlt", precision=precision)
    assert (choice.path.name, choice.passed_over) == ("sums", ())
    assert machine == [f"0 sums sjlt {precision}"]


@needs_compiler
def test_the_other_path_is_checked_alike(machine, monkeypatch):
    choice = choose(monkeypatch, EmulatedPath("mma", "permuted"), EmulatedPath("wgmma"))
    assert choice.path.name == "wgmma"
    assert re.match("mma: 512 of 4096 values are wrong, first row 1, k 0: 2 instead of 1", choice.passed_over[0])


@needs_compiler
def test_a_path_that_is_right_is_taken_and_asked_once(machine, monkeypatch):
    paths = EmulatedPath("wgmma"), EmulatedPath("mma")
    for _ in range(2):
        choice = choose(monkeypatch, *paths)
        assert (choice.path.name, choice.passed_over) == ("wgmma", ())
    assert machine == ["0 wgmma rademacher fast"]
    assert choose(monkeypatch, *paths, kind="gaussian").path.name == "wgmma"
    assert machine[1:] == ["0 wgmma gaussian fast"]


@needs_compiler
def test_where_both_forms_of_the_source_fail_the_second_implementation_is_taken(machine, monkeypatch):
    pytest.importorskip("triton")
    paths = EmulatedPath("wgmma", "permuted"), EmulatedPath("mma", "permuted"), EmulatedPath("triton")
    choice = choose(monkeypatch, *paths)
    assert choice.path.name == "triton"
    assert [reason.split(":")[0] for reason in choice.passed_over] == ["wgmma", "mma"]


def test_where_every_path_fails_the_reference_is_left(machine, monkeypatch):
    choice = choose(monkeypatch, EmulatedPath("wgmma", "raises"), EmulatedPath("mma", absent="NVRTC is missing"))
    assert choice.path is None
    assert choice.passed_over[1] == "mma: NVRTC is missing"


def test_a_fault_is_kept_and_found_again_without_a_check(machine, monkeypatch):
    path = EmulatedPath("wgmma", "raises")
    for _ in range(2):
        assert choose(monkeypatch, path).path is None
    assert len(machine) == 1
    assert trust.verdict(path, 0, "rademacher", "fast", again=True).fault
    assert len(machine) == 2


@needs_compiler
@pytest.mark.parametrize("fault", ["hangs", "memory", "killed", "dies", "no-start"])
def test_what_may_pass_is_not_kept(machine, monkeypatch, fault):
    """A busy device looks like one that hangs; memory runs out; processes are killed."""
    for _ in range(2):
        assert choose(monkeypatch, EmulatedPath("wgmma", fault)).path is None
    assert len(machine) == 2
    assert trust.outlook(0) == "wgmma (its first use checks it)"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"fault": ""}'])
def test_a_damaged_verdict_is_found_anew(machine, monkeypatch, damage):
    path = EmulatedPath("wgmma", "raises")
    choose(monkeypatch, path)
    verdicts.file_of(path, 0, "rademacher", "fast").write_bytes(damage)
    assert choose(monkeypatch, path).path is None
    assert len(machine) == 2


def test_another_driver_torch_or_source_asks_for_another_check(machine, monkeypatch):
    path = EmulatedPath("wgmma", "raises")
    files = {verdicts.file_of(path, 0, "rademacher", "fast")}
    monkeypatch.setattr(verdicts, "_driver_version", lambda: "another")
    files.add(verdicts.file_of(path, 0, "rademacher", "fast"))
    monkeypatch.setattr(torch, "__version__", "9.9")
    files.add(verdicts.file_of(path, 0, "rademacher", "fast"))
    files |= {verdicts.file_of(path, 0, kind, "exact") for kind in ("rademacher", "gaussian")}
    files.add(verdicts.file_of(EmulatedPath("mma", "raises"), 0, "rademacher", "fast"))
    assert len(files) == 6


def test_a_cache_that_cannot_be_written_costs_time_only(machine, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        assert choose(monkeypatch, EmulatedPath("wgmma", "raises")).path is None
    assert len(machine) == 2


@pytest.fixture
def here(machine, monkeypatch, tmp_path):
    """The device is for one process alone, so that this one has to check."""
    (tmp_path / "right").mkdir()
    monkeypatch.setattr(self_check, "on_device", lambda index: lambda: lambda: True)
    monkeypatch.setattr(self_check, "problems", lambda tiles, **_: [self_check.Problem("integers", 3, 300, 40, 0, 0)])
    monkeypatch.setattr(trust.torch, "device", lambda *_: CPU)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(trust, "check_apart", lambda arguments: None)


@needs_compiler
def test_where_no_other_process_can_have_the_device_this_one_checks(here, monkeypatch):
    assert choose(monkeypatch, EmulatedPath("mma")).path.name == "mma"
    assert choose(monkeypatch, EmulatedPath("wgmma", "raises")).path is None


def test_a_device_that_this_process_has_hung_is_not_used_further(here, monkeypatch):
    monkeypatch.setattr(self_check, "FINISH_SECONDS", 0.1)
    monkeypatch.setattr(self_check, "on_device", lambda index: lambda: lambda: False)
    monkeypatch.setattr(EmulatedPath, "accumulate", lambda self, *_, **__: None)
    path = EmulatedPath("mma")
    with pytest.raises(GradstoreError, match="cuda:0: mma hung the device when it was checked"):
        choose(monkeypatch, path, EmulatedPath("triton"))
    assert trust.verdict(path, 0, "rademacher", "fast").fault.startswith("it did not end")


def test_a_process_that_cannot_have_the_device_gives_no_verdict(machine, monkeypatch):
    monkeypatch.setattr(trust, "_check_here", lambda *_: Verdict("checked here"))
    assert choose(monkeypatch, EmulatedPath("mma", "no-device")).passed_over == ("mma: checked here",)


@pytest.mark.parametrize("executable", [None, "", "/nowhere/python"])
def test_without_an_interpreter_there_is_no_verdict(monkeypatch, executable):
    monkeypatch.setattr(sys, "executable", executable)
    assert check_apart([]) is None


def test_a_frozen_application_is_not_started_again(monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert check_apart([]) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_modules_in_the_working_directory_are_not_taken_for_those_of_the_interpreter(monkeypatch, tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    assert check_apart(["0", "mma", "rademacher", "fast"]) is None  # no device, and so it got there


def test_a_check_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr("gradstore.projection.check_apart.CHECK_SECONDS", 0.5)
    say = 'print(\'{"ready": true}\\n{"problem": "the first"}\', flush=True); import time; time.sleep(60)'
    found = check_apart([], ["-c", say])
    assert (found.fault, found.lasting) == ("the process that checked it did not end within 0 s (the first)", False)


def test_every_problem_is_solved_in_the_stated_order_and_counted():
    solved = []

    def right(entries, out, block, start, first_k, precision, **more):
        k = first_k + torch.arange(out.shape[1])
        out += (block.double() @ entries.columns(k, start, start + block.shape[1]).T).float()

    tiles, finished = (32, 64), lambda: lambda: True
    count = self_check.check(
        right, "gaussian", "exact", tiles, CPU, finished=finished, begin=solved.append, crowd=False
    )
    assert count == len(solved) == 11
    assert {problem.gradients for problem in solved} == {"one-hot", "integers", "uneven"}
    assert max(problem.start for problem in solved) > 2**39
    assert max(problem.first_k + problem.count for problem in solved) == 2**31
    assert {problem.dtype for problem in solved} == {torch.float32, torch.float16, torch.bfloat16}
    assert any(problem.workspace for problem in solved)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "sjlt"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda out, block: out[3].neg_(),  # the signs of one row
        lambda out, block: out.copy_(out.roll(1, 1)),  # rows of P exchanged
        lambda out, block: out.copy_(out.roll(1, 0)),  # rows of gradients exchanged
        lambda out, block: out[-1, -1].add_(1.0),
        lambda out, block: out[0, 0].fill_(torch.nan),
        lambda out, block: out.zero_(),
    ],
)
def test_any_wrong_output_is_a_failure(kind, spoil):
    def wrong(entries, out, block, start, first_k, precision, **more):
        out += self_check.expected(entries, block, start, first_k + torch.arange(out.shape[1])).float()
        spoil(out, block)

    with pytest.raises(self_check.CheckError, match=r"values are wrong|relative error"):
        self_check.check(wrong, kind, "exact", (32,), CPU, finished=lambda: lambda: True, crowd=False)


def test_what_is_expected_of_a_sparse_p_is_the_dense_product():
    entries, block = Entries("sjlt", 2**63 + 5, 3), torch.randint(-8, 9, (3, 700)).float()
    for first_k, count in ((0, 1), (9, 2000), (2**31 - 1100, 1100)):
        k = first_k + torch.arange(count)
        want = block.double() @ entries.at(k[:, None], 77 + torch.arange(700)).T
        assert torch.equal(self_check.expected(entries, block, 77, k), want)


def test_of_a_sparse_p_problems_have_non_zeros_in_every_column():
    dense_ones, sparse_ones = (self_check.problems((32,), crowd=True, sparse=is_so) for is_so in (False, True))
    for dense, sparse in zip(dense_ones, sparse_ones, strict=True):
        assert sparse.count == 16 * dense.count
        assert sparse.first_k + sparse.count <= 2**31
        assert sparse.count >= 1024 or dense.columns * dense.count < 10**5


def test_the_program_says_what_it_finds_line_by_line(tmp_path, monkeypatch):
    monkeypatch.setenv("EMULATED_FOLDER", str(tmp_path))
    command = [sys.executable, str(HERE / "emulated_paths.py"), "0", "wgmma:raises", "rademacher", "fast"]
    environment_ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment_, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [next(iter(line)) for line in lines] == ["ready", "problem", "fault"]


def test_a_check_is_announced_since_it_takes_seconds(machine, monkeypatch, caplog):
    caplog.set_level("INFO", "gradstore")
    choose(monkeypatch, EmulatedPath("wgmma", "raises"))
    said = "checking wgmma for rademacher fast products on Some Card, once"
    assert [record.getMessage() for record in caplog.records] == [said]


# ---- what is said of it --------------------------------------------------------------------------------------------


@pytest.fixture
def fallen_back(machine, monkeypatch):
    """A machine whose first path fails, and whose second is taken for right."""
    monkeypatch.setattr(trust, "verdict", lambda path, *_, **__: Verdict("a fault" if path.fault else ""))
    monkeypatch.setattr(trust, "PATHS", (EmulatedPath("wgmma", "raises"), EmulatedPath("mma")))


def test_a_fallback_is_one_warning_and_the_log_says_it(fallen_back):
    projection = Projection(dim=8)
    with pytest.warns(
        RuntimeWarning, match="projecting by mma on Some Card: wgmma: a fault; `gradstore doctor --again`"
    ):
        assert projection.path(GPU) == "mma fast"
    for device in (GPU, torch.device("cuda")):  # a second warning would be an error
        assert projection.path(device) == "mma fast"
    found = environment.environment(GPU, projection)
    assert found["projection_backend"] == "mma fast"
    assert found["projection_passed_over"] == "wgmma: a fault"
    assert "projection_passed_over" not in environment.environment(CPU, projection)


def test_without_any_path_the_warning_says_that_it_is_slow(fallen_back, monkeypatch):
    monkeypatch.setattr(trust, "PATHS", (EmulatedPath("wgmma", "raises"),))
    with pytest.warns(RuntimeWarning, match="projecting with the slow reference on Some Card: wgmma: a fault"):
        assert Projection().path(GPU) == "reference"
    assert not Projection().fused(GPU)


def test_the_reference_asks_for_no_check(machine):
    assert Projection(backend="reference").path(GPU) == "reference"
    assert Projection(backend="reference").passed_over(GPU) == ()
    assert machine == []


def test_the_outlook_checks_nothing(machine, monkeypatch):
    monkeypatch.setattr(trust, "PATHS", (EmulatedPath("wgmma", absent="not installed"), EmulatedPath("mma", "raises")))
    assert trust.outlook(0) == "mma (its first use checks it); not wgmma: not installed"
    assert machine == []
    choose(monkeypatch, EmulatedPath("wgmma", absent="not installed"), EmulatedPath("mma", "raises"))
    assert trust.outlook(0).startswith("the slow reference in torch; not wgmma: not installed; not mma: RuntimeError")


def test_where_no_path_is_for_a_device_that_is_said(machine, monkeypatch):
    monkeypatch.setattr(trust, "PATHS", (EmulatedPath("triton"),))
    with pytest.warns(RuntimeWarning, match="slow reference on Some Card: no path is for gaussian products on such a"):
        assert Projection("gaussian").path(GPU) == "reference"


def test_tensors_on_a_gpu_take_the_chosen_path(fallen_back, monkeypatch):
    taken = []
    monkeypatch.setattr(EmulatedPath, "accumulate", lambda self, *given: taken.append((self.name, given[3:])))
    monkeypatch.setattr(Projection, "_choice", lambda self, device: Choice(trust.PATHS[1], ()))
    Projection(dim=8).project(torch.ones(2, 300), 128)
    assert taken == [("mma", (128, 0, "fast"))]


# ---- a product that gives up ---------------------------------------------------------------------------------------


def test_a_device_that_gave_up_is_explained_and_its_path_trusted_no_more(fallen_back, monkeypatch):
    monkeypatch.setattr(EmulatedPath, "gave_up", lambda self, index: "its turn to add to the output")
    monkeypatch.setattr(trust, "chosen", lambda *_: Choice(trust.PATHS[1], ()))
    with pytest.raises(GradstoreError) as caught, Projection().explained(GPU):
        raise RuntimeError("CUDA error: unspecified launch failure")
    assert str(caught.value).startswith(
        "cuda:0: the projection does not go on (got mma gave up waiting for its turn to add to the output). "
    )
    assert "--allow-other-versions" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)
    kept = verdicts.kept(trust.PATHS[1], 0, "rademacher", "fast")
    assert kept.fault == "it gave up waiting for its turn to add to the output in a run"


def test_other_errors_stay_what_they_are(fallen_back, monkeypatch):
    monkeypatch.setattr(trust, "chosen", lambda *_: Choice(trust.PATHS[1], ()))
    with pytest.raises(RuntimeError, match="out of memory"), Projection().explained(GPU):
        raise RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="on the host"), Projection().explained(CPU):
        raise RuntimeError("on the host")


def test_entries_at_rows_of_any_kind_agree():
    entries = Entries("rademacher", 3, 1)
    k = torch.tensor([5, 0, 2**31 - 1])
    assert torch.equal(entries.columns(k, 100, 400), entries.at(k[:, None], torch.arange(100, 400)))
