"""F10, F11, F12, S1, S7: what a model, its data, its machine and its files may do to a store."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Record
from small_store import files
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import MismatchError, NonFiniteError, UnsafeError
from gradstore.featurization import plan as planning
from gradstore.model.weights import load_weights
from gradstore.store.feature_store import FeatureStore

pytestmark = pytest.mark.soak
N = 100
X = torch.randn(N, 1, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.Plan, "_shard_rows", lambda self, schema, group: 32)


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))


def project(x: Tensor = X, y: Tensor = Y, model: nn.Module | None = None, **more: Any) -> gs.Project:
    data = TensorDataset(x, y)
    return gs.Project(model=model or network(), splits={"train": data, "test": data}, **more)


def featurize(out: Path, made: gs.Project | None = None, **settings: Any) -> FeatureStore:
    return gs.featurize(made or project(), split="train", out=out, **{"proj_dim": 128, **settings})


# -- F10 -----------------------------------------------------------------------------------------------------------


def poisoned_input(value: float, row: int) -> gs.Project:
    x = X.clone()
    x[row, 0, 2, 2] = value
    return project(x)


@pytest.mark.parametrize("row", [0, 17, 50, 99])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_stop_the_run(value: float, row: int, tmp_path: Path, record: Record) -> None:
    with pytest.raises(NonFiniteError, match=rf"logit \d of row {row} is not finite") as error:
        featurize(tmp_path / "store", poisoned_input(value, row))
    assert error.value.exit_code == 8
    control = "norms not checked: NaN or infinite features stored"
    record("F10", "NaN, infinity, zero", injected=1, recovered=0, refused=1, silent=0, control=control)


@pytest.mark.parametrize("row", [0, 17, 50, 99])
def test_gradients_too_large_for_their_sums_stop_the_run(row: int, tmp_path: Path, record: Record) -> None:
    with pytest.raises(NonFiniteError, match=rf"row {row}, class \d did not keep its norm .* got nan") as error:
        featurize(tmp_path / "store", poisoned_input(3e38, row))
    assert error.value.exit_code == 8
    record("F10", "NaN, infinity, zero", injected=1, recovered=0, refused=1, silent=0, control="as above")


@pytest.mark.parametrize("row", [0, 31, 32, 99])
def test_a_row_without_gradient_stops_the_run(row: int, tmp_path: Path, record: Record) -> None:
    x = X.clone()
    x[row] = 0
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3, bias=False))
    with pytest.raises(NonFiniteError, match=f"the gradient of row {row} is zero for every class") as error:
        featurize(tmp_path / "store", project(x, model=model))
    assert error.value.exit_code == 8
    assert len(FeatureStore(tmp_path / "store")) == row // 32 * 32
    record("F10", "NaN, infinity, zero", injected=1, recovered=0, refused=1, silent=0, control="as above")


def featurize_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    monkeypatch.undo()
    return featurize(tmp_path / "right")


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0, float("nan")])
def test_a_projector_that_is_wrong_stops_the_run(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    module, batch = (sys.modules[f"gradstore.{name}"] for name in ("projection.block_sums", "featurization.batch"))
    accumulate = module.accumulate_block

    def wrong(projection: Any, out: Tensor, block: Any, *, first_k: int = 0) -> str:
        route = accumulate(projection, out, block, first_k=first_k)
        out[1, 2] *= factor
        return str(route)

    monkeypatch.setattr(module, "accumulate_block", wrong)
    with pytest.raises(NonFiniteError, match="row 1, class 2 did not keep its norm"):
        featurize(tmp_path / "store")
    monkeypatch.setattr(batch, "require_preserved", lambda *arguments, **more: None)
    wrong_row = featurize(tmp_path / "control").features[1]  # the control: stored without an error
    assert not np.array_equal(wrong_row, featurize_right(tmp_path, monkeypatch).features[1])
    record("F10", "NaN, infinity, zero", injected=1, recovered=0, refused=1, silent=0, control="as above")


# -- F11 -----------------------------------------------------------------------------------------------------------

CELLS = [(b, w, t, i) for b in (1, 7, 32, 96) for w in (1, 2) for t in (1, 2) for i in (False, True)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    patch = pytest.MonkeyPatch()
    patch.setattr(planning.Plan, "_shard_rows", lambda self, schema, group: 32)
    path = tmp_path_factory.mktemp("reference") / "store"
    featurize(path)
    patch.undo()
    return files(path)


class StopError(Exception):
    """The run is interrupted here."""


@pytest.mark.parametrize(("batch", "workers", "threads", "interrupted"), CELLS)
def test_bits_do_not_depend_on_batches_workers_threads_or_interruptions(
    batch: int,
    workers: int,
    threads: int,
    interrupted: bool,
    reference: dict[str, bytes],
    tmp_path: Path,
    record: Record,
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)

    def stop(progress: Any) -> None:
        if progress.computed >= 50:
            raise StopError

    try:
        if interrupted:
            with pytest.raises(StopError):
                featurize(tmp_path / "store", batch_size=batch, workers=workers, progress=stop)
            assert 0 < len(FeatureStore(tmp_path / "store").manifest.shards) < 4
        featurize(tmp_path / "store", batch_size=batch, workers=workers)
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path / "store") == reference
    control = "another seed: other bytes"
    record(
        "F11", "batch × workers × threads × interrupted", injected=1, recovered=1, refused=0, silent=0, control=control
    )


def test_another_seed_gives_other_bytes(reference: dict[str, bytes], tmp_path: Path) -> None:
    featurize(tmp_path / "store", seed=1)
    assert files(tmp_path / "store") != reference


# -- F12 -----------------------------------------------------------------------------------------------------------


def one_ulp(model: nn.Module) -> nn.Module:
    weight = next(model.parameters())
    with torch.no_grad():
        flat = weight.flatten()
        flat[0] = torch.nextafter(flat[0], torch.tensor(float("inf")))
    return model


def other_inputs() -> Tensor:
    x = X.clone()
    x[0] += 1
    return x


TRUTH = {"poisoned": {"train": [1, 2]}}
CHANGES: dict[str, tuple[Callable[[], gs.Project], dict[str, Any], str]] = {
    "K": (lambda: project(**TRUTH), {"proj_dim": 129}, r"projection\.K +128 +129"),
    "seed": (lambda: project(**TRUTH), {"seed": 1}, r"projection\.seed +0 +1"),
    "kind": (lambda: project(**TRUTH), {"projection": "gaussian"}, r"projection\.kind +rademacher +gaussian"),
    "exact": (lambda: project(**TRUTH), {"precision": "exact"}, r"projection\.precision +— +exact"),
    "layout": (lambda: project(**TRUTH), {"layout": "sum"}, r"layout +per-class +sum"),
    "dtype": (lambda: project(**TRUTH), {"dtype": "float32"}, r"dtype +float16 +float32"),
    "weights": (lambda: project(model=one_ulp(network()), **TRUTH), {}, r"weights +"),
    "parameters": (lambda: project(parameters="3.*", **TRUTH), {}, r"parameters\.count +"),
    "inputs": (lambda: project(other_inputs(), **TRUTH), {}, "row 0 of split 'train' has other inputs"),
    "length": (lambda: project(X[:90], Y[:90], **TRUTH), {}, r"data\.length +100 +90"),
    "precision": (lambda: project(X.double(), model=network().double(), **TRUTH), {}, r"precision +float32 +float64"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_continues_under_another_identity(name: str, tmp_path: Path, record: Record) -> None:
    make, settings, message = CHANGES[name]
    featurize(tmp_path / "store", project(**TRUTH))
    before = files(tmp_path / "store")
    with pytest.raises(MismatchError, match=message) as error:
        featurize(tmp_path / "store", make(), **settings)
    assert error.value.exit_code == 4
    assert files(tmp_path / "store") == before
    injected = 1
    if name not in ("inputs", "length"):  # of which training and query stores differ anyhow
        other = featurize(tmp_path / "other", make(), **settings)
        for compare in (gs.topk, gs.forensics):
            with pytest.raises(MismatchError, match=message):
                compare(FeatureStore(tmp_path / "store"), other)
            injected += 1
    control = "identity not compared: rows of both in one file"
    what = "another identity on resume, topk, forensics"
    record("F12", what, injected=injected, recovered=0, refused=injected, silent=0, control=control)


@pytest.mark.parametrize("field", ["device", "torch", "projection_backend"])
def test_another_environment_needs_permission(field: str, tmp_path: Path) -> None:
    featurize(tmp_path / "store", project(X[:40], Y[:40]))
    log = tmp_path / "store/run.jsonl"
    start, *rest = log.read_text().splitlines()
    log.write_text("\n".join([json.dumps({**json.loads(start), field: "other"}), "torn line", *rest]) + "\n")
    with pytest.raises(MismatchError, match=rf"begun in another environment.*\(got {field} other → "):
        featurize(tmp_path / "store")
    featurize(tmp_path / "store", allow_other_versions=True)
    events = [json.loads(line) for line in log.read_text().splitlines() if line != "torn line"]
    assert [event["event"] for event in events] == ["start", "finish", "start", "finish"]


def test_harmless_changes_are_accepted(tmp_path: Path) -> None:
    featurize(tmp_path / "store", project(X[:40], Y[:40]))
    featurize(tmp_path / "store", project(classes=["a", "b", "c"]), batch_size=5, memory="1GB", device="cpu")
    assert FeatureStore(tmp_path / "store").complete


# -- S1, S7 --------------------------------------------------------------------------------------------------------


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def raw_pickle(path: Path, content: Any, protocol: int) -> None:
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def zipped_pickle(path: Path, content: Any) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")


FORMATS: dict[str, Callable[[Path, Any], None]] = {
    "torch.save": lambda path, content: torch.save(content, path),
    "legacy torch.save": lambda path, content: torch.save(content, path, _use_new_zipfile_serialization=False),
    "state_dict with a payload": lambda path, content: torch.save({"weight": torch.ones(1), "x": content}, path),
    "pickle 0": lambda path, content: raw_pickle(path, content, 0),
    "pickle 2": lambda path, content: raw_pickle(path, content, 2),
    "pickle 4": lambda path, content: raw_pickle(path, {"weight": content}, 4),
    "zipped pickle": zipped_pickle,
    "whole module": lambda path, content: torch.save(nn.Linear(2, 2), path),
}


@pytest.mark.parametrize("forced", [None, "1", "true"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_pickled_checkpoint_is_refused_and_nothing_of_it_runs(
    name: str, forced: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    if forced is not None:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    made = tmp_path / "made"
    FORMATS[name](tmp_path / "weights.pt", Payload(made))
    with pytest.raises(UnsafeError, match="loading it could run code") as error:
        load_weights(nn.Linear(2, 2), tmp_path / "weights.pt")
    assert error.value.exit_code == 9
    assert not made.exists()
    if name == "torch.save":  # the control
        torch.load(tmp_path / "weights.pt", weights_only=False)
        assert made.exists()
    control = "torch.load(weights_only=False): the payload runs"
    record("S1", "pickled checkpoints", injected=1, recovered=0, refused=1, silent=0, control=control)


OFFLINE = """
import socket, sys
def refuse(*arguments, **options):
    raise OSError("the network was used")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
sys.path.insert(0, "tests")
import warm_featurize
"""


def test_no_network_is_used(record: Record) -> None:
    assert run_python(OFFLINE) == 0
    assert run_python(OFFLINE + "socket.create_connection(('localhost', 9))") != 0
    what, control = "import and featurize without a network", "a connection fails"
    record("S7", what, injected=1, recovered=1, refused=0, silent=0, control=control)


def run_python(code: str) -> int:
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=False).returncode
