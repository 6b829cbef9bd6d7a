"""Features where there are more classes than inputs of the last layer: the same features, from fewer rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import NonFiniteError
from gradstore.featurization.lowered_features import LoweredFeatures
from gradstore.featurization.on_the_spot import featurize_queries
from gradstore.featurization.plan import Plan
from gradstore.featurization.row_audit import require_preserved
from gradstore.featurization.settings import Settings
from gradstore.featurization.trial import checks
from gradstore.jacobians import DenseBlock, JacobianBlock, JacobianEngine, LoweredBlock, OwnRowBlock, through_head
from gradstore.machine.byte_counts import PROMISED
from gradstore.machine.cuda_streams import Beside
from gradstore.model.parameters import parameter_blocks
from gradstore.native import library
from gradstore.projection import block_sums
from gradstore.projection.projection_audit import AuditSchedule, Comparison

pytestmark = pytest.mark.numerical
N, C, D, K = 40, 40, 5, 300


class Texts(nn.Module):
    """An embedding, a layer used at every token, a convolution, a layer on one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lift = nn.Embedding(400, 6, padding_idx=0), nn.Linear(6, 8)
        self.convolution, self.norm = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.out, self.head = nn.Linear(8, D), nn.Linear(D, C)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.lift(self.embed(ids))).transpose(1, 2)
        return self.head(torch.tanh(self.out(torch.relu(self.norm(self.convolution(hidden))).mean(2))))


class Falls(nn.Module):
    """Takes another way for a batch with a large value, which a group then computes by looped autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.head = nn.Linear(4, D), nn.Linear(4, D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        big = (x.abs().amax(1, keepdim=True) > 10).to(x.dtype)
        hidden = self.first(x)
        return self.head((hidden + big * self.other(x) if big.any() else hidden).tanh())


@pytest.fixture(scope="module")
def project() -> gs.Project:
    torch.manual_seed(0)
    ids = torch.randint(1, 400, (N, 7))
    return gs.Project(model=Texts(), splits={"train": TensorDataset(ids, torch.arange(N) % C)})


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Every batch is audited; the largest difference of each audit, in tolerances."""
    found: list[float] = []
    require = Comparison.require

    def measured(self: Comparison, sq_norm: Tensor, split: str) -> None:
        found.append(float((self.want - self.got).abs().max()) / self.tolerance(sq_norm))
        require(self, sq_norm, split)

    monkeypatch.setattr(Comparison, "require", measured)
    monkeypatch.setattr(AuditSchedule, "due", True)
    yield found
    assert found
    assert max(found) < 0.3


def inputs_of(project: gs.Project) -> Tensor:
    return project.splits["train"].tensors[0]


def jacobians(project: gs.Project, names: str = ".*") -> dict[int, Tensor]:
    """By the flat index where a parameter begins, looped autograd in float64, [n, c, size]."""
    model, inputs = project.model, inputs_of(project)
    model.double()
    try:
        blocks = parameter_blocks(model, names)
        wanted = [dict(model.named_parameters())[block.name] for block in blocks]
        found = {block.start: torch.zeros(len(inputs), C, block.size, dtype=torch.float64) for block in blocks}
        for i in range(len(inputs)):
            wide = inputs[i : i + 1]
            logits = model(wide.double() if wide.is_floating_point() else wide)[0]
            for c in range(C):
                gradients = torch.autograd.grad(logits[c], wanted, retain_graph=True, materialize_grads=True)
                for block, gradient in zip(blocks, gradients, strict=True):
                    found[block.start][i, c] = gradient.flatten()
    finally:
        model.float()
    return found


def expected(project: gs.Project, kind: str, layout: str, names: str = ".*") -> tuple[Tensor, Tensor]:
    """Features and squared norms by the definition of P, float64."""
    rows = C if layout == "per-class" else 1
    features, squares = torch.zeros(N, rows, K, dtype=torch.float64), torch.zeros(N, C, dtype=torch.float64)
    for start, values in jacobians(project, names).items():
        columns, k = torch.arange(start, start + values.shape[2]), torch.arange(K)[:, None]
        squares += values.square().sum(2)
        if layout == "per-class":
            features += values @ gs.Projection(kind, K, 3).entries(k, columns).T / K**0.5
            continue
        for c in range(C):
            P = replace(gs.Projection(kind, K, 3), stream=c).entries(k, columns)
            features[:, 0] += values[:, c] @ P.T / K**0.5
    return features, squares if layout == "per-class" else squares.sum(1, keepdim=True)


@pytest.mark.parametrize("layout", ["per-class", "mixed"])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_features_are_those_of_the_definition(
    project: gs.Project, kind: str, layout: str, audited: list[float], tmp_path: Path
) -> None:
    options = {"proj_dim": K, "projection": kind, "layout": layout, "dtype": "float32", "seed": 3}
    store = gs.featurize(project, split="train", out=tmp_path / "s", **options)
    features, squares = expected(project, kind, layout)
    np.testing.assert_allclose(store.features[:], features, atol=1e-6 * features.abs().max())
    np.testing.assert_allclose(store.sq_norms, squares, rtol=1e-5)


@pytest.mark.parametrize("names", [r"head\..*", r"(embed|lift|out)\..*", r"head\.bias|norm\.weight"])
def test_some_parameters(project: gs.Project, names: str, audited: list[float], tmp_path: Path) -> None:
    some = gs.Project(model=project.model, splits=project.splits, parameters=names)
    store = gs.featurize(some, split="train", out=tmp_path / "s", proj_dim=K, dtype="float32", seed=3)
    features, squares = expected(project, "rademacher", "per-class", names)
    np.testing.assert_allclose(store.features[:], features, atol=1e-6 * features.abs().max())
    np.testing.assert_allclose(store.sq_norms, squares, rtol=1e-5)


@pytest.mark.parametrize("layout", ["per-class", "mixed"])
def test_with_and_without(project: gs.Project, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"split": "train", "proj_dim": K, "layout": layout, "dtype": "float32"}
    seen: list[int] = []
    monkeypatch.setattr(LoweredFeatures, "raise_into", _counted(LoweredFeatures.raise_into, seen))
    fewer = gs.featurize(project, out=tmp_path / "fewer", **options)
    assert sum(seen) == (N if layout == "per-class" else 0)
    seen.clear()
    monkeypatch.setattr(through_head, "pays", lambda *_: False)
    usual = gs.featurize(project, out=tmp_path / "usual", **options)
    assert not sum(seen)
    assert fewer.fingerprint == usual.fingerprint
    np.testing.assert_allclose(fewer.features[:], usual.features[:], atol=2e-6 * np.abs(usual.features[:]).max())
    np.testing.assert_allclose(fewer.sq_norms, usual.sq_norms, rtol=1e-5)


def _counted(method, seen: list[int]):
    def counted(self, *args):
        seen.append(0 if self._sums is None else len(self._sums))
        method(self, *args)

    return counted


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", ["per-class", "mixed"])
def test_bits_do_not_depend_on_the_batch_nor_on_threads(
    project: gs.Project, layout: str, threads: int, tmp_path: Path
) -> None:
    options = {"split": "train", "proj_dim": K, "layout": layout, "dtype": "float32", "memory": "20MB"}
    before = torch.get_num_threads()
    stores = []
    try:
        for batch_size, count in [(16, 1), (64, threads)]:
            torch.set_num_threads(count)
            stores.append(gs.featurize(project, out=tmp_path / str(batch_size), batch_size=batch_size, **options))
    finally:
        torch.set_num_threads(before)
    one, other = stores
    assert one.manifest.group < N
    assert np.array_equal(one.features[:], other.features[:])
    assert np.array_equal(one.sq_norms, other.sq_norms)


def test_a_group_that_falls_back_changes_no_neighbour(audited: list[float], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(N, 4)
    x[20] *= 40
    project = gs.Project(model=Falls(), splits={"train": TensorDataset(x, torch.arange(N) % C)})
    options = {"split": "train", "proj_dim": K, "dtype": "float32", "memory": "10MB", "seed": 3}
    one = gs.featurize(project, out=tmp_path / "one", batch_size=1, **options)
    other = gs.featurize(project, out=tmp_path / "other", batch_size=64, **options)
    assert 1 < one.manifest.group < 20
    assert np.array_equal(one.features[:], other.features[:])
    blocks = list(JacobianEngine(project.model, parameter_blocks(project.model), example=x[:3], proj_dim=K)(x[20:22]))
    assert not any(isinstance(block, (LoweredBlock, OwnRowBlock)) for block in blocks)
    features, squares = expected(_without_large(project, 20), "rademacher", "per-class")
    kept = np.arange(N) != 20
    np.testing.assert_allclose(one.features[:][kept], features[kept], atol=1e-5 * features[kept].abs().max())
    np.testing.assert_allclose(one.sq_norms[kept], squares[kept], rtol=1e-5)


def _without_large(project: gs.Project, row: int) -> gs.Project:
    x = inputs_of(project).clone()
    x[row] /= 40
    return gs.Project(model=project.model, splits={"train": TensorDataset(x, torch.arange(N) % C)})


def test_k_grows_to_the_bits_of_a_fresh_run(project: gs.Project, tmp_path: Path) -> None:
    options = {"split": "train", "dtype": "float32", "memory": "64MB"}
    for layout in ("per-class", "mixed"):
        small = gs.featurize(project, out=tmp_path / f"{layout}-small", proj_dim=100, layout=layout, **options)
        grown = gs.featurize(
            project, out=tmp_path / f"{layout}-grown", proj_dim=K, layout=layout, grow_from=small.path, **options
        )
        group = {"memory": "64MB"} if small.manifest.group == grown.manifest.group else {}
        fresh = gs.featurize(
            project, out=tmp_path / f"{layout}-fresh", proj_dim=K, layout=layout, **{**options, **group}
        )
        if fresh.manifest.group == grown.manifest.group:
            assert np.array_equal(grown.features[:], fresh.features[:])


def test_queries_on_the_spot_have_the_bits_of_a_store(project: gs.Project, tmp_path: Path) -> None:
    store = gs.featurize(project, split="train", out=tmp_path / "s", proj_dim=K)
    queries = featurize_queries(project, store, split="train", rows=[3, 30])
    assert np.array_equal(queries.read(0, 2)["features"], store.read(0, N)["features"][[3, 30]])


def test_check_says_it(project: gs.Project) -> None:
    found = {check.name: check for check in checks(project, split="train", proj_dim=K)}
    assert not [check.error for check in found.values() if check.error]
    assert "convolution, 5 rows for 40 classes × 2" in found["parameters"].detail
    assert "linear, own row a class × 2" in found["parameters"].detail


def test_the_plan_counts_what_is_multiplied(project: gs.Project, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {block.name: block.size for block in parameter_blocks(project.model)}
    own = sizes["head.weight"] + sizes["head.bias"]
    below = sum(sizes.values()) - own
    plans = {layout: Plan(project, "train", Settings(proj_dim=K, layout=layout), "cpu", "1GB") for layout in LAYOUTS}
    assert plans["per-class"].flops == 2 * K * N * (D * below + own + C * D)
    assert plans["mixed"].flops == 2 * K * N * (C * below + own)
    assert plans["sum"].flops == 2 * K * N * (below + own)
    needed = plans["per-class"].engine.bytes_needed(16)
    monkeypatch.setattr(through_head, "pays", lambda *_: False)
    assert Plan(project, "train", Settings(proj_dim=K), "cpu", "1GB").engine.bytes_needed(16) > 3 * needed
    for layout, rows in zip(LAYOUTS, (C, C, 1), strict=True):
        assert Plan(project, "train", Settings(proj_dim=K, layout=layout), "cpu", "1GB").flops == 2 * K * N * rows * (
            below + own
        )


LAYOUTS = ["per-class", "mixed", "sum"]


def test_a_row_at_another_place_is_seen(project: gs.Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AuditSchedule, "due", True)
    start, picked = OwnRowBlock.own_start, OwnRowBlock.picked
    monkeypatch.setattr(OwnRowBlock, "own_start", lambda self, c: start(self, c) + 1)

    def right(self: OwnRowBlock, i: int, c: int, *, formed: bool) -> JacobianBlock:
        part = picked(self, i, c, formed=formed)
        part.start -= self.first <= c < self.last
        return part

    monkeypatch.setattr(OwnRowBlock, "picked", right)
    with pytest.raises(NonFiniteError, match=r"projection of row .* is wrong"):
        gs.featurize(project, split="train", out=tmp_path / "s", proj_dim=K)


def test_rows_below_are_multiplied_exactly_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr(block_sums, "accumulate_block", lambda projection, *_, **__: taken.append(projection.precision))
    block = LoweredBlock(DenseBlock("p", 0, torch.ones(1, 2, 3)), torch.ones(4, 2))
    with Beside(torch.device("cpu")) as beside:
        LoweredFeatures(gs.Projection(dim=8), torch.zeros(1, 4, 8), 0).add(slice(0, 1), block, beside)
    assert taken == ["exact"]


def test_classes_that_are_small_differences(audited: list[float], tmp_path: Path) -> None:
    """Rows below that are alike to a hundredth, classes that are their differences: right to rounding of the rows."""
    torch.manual_seed(0)
    model, x = Texts(), torch.randint(1, 400, (N, 7))
    with torch.no_grad():
        for parameter in (model.out.weight, model.out.bias):
            parameter.copy_(parameter[:1] + 0.01 * parameter)
        model.head.weight -= model.head.weight.mean(1, keepdim=True)
    names = r"(embed|lift|convolution|norm|out)\..*"
    project = gs.Project(model=model, splits={"train": TensorDataset(x, torch.arange(N) % C)}, parameters=names)
    some = gs.Project(model=model, splits=project.splits, parameters=r"(embed|lift|convolution|norm)\..*")
    store = gs.featurize(some, split="train", out=tmp_path / "s", proj_dim=K, dtype="float32", seed=3)
    features, squares = expected(some, "rademacher", "per-class", some.parameters)
    whole = gs.featurize(project, split="train", out=tmp_path / "w", proj_dim=K, dtype="float32", seed=3)
    terms = whole.sq_norms.mean() ** 0.5
    assert squares.mean() ** 0.5 < 0.03 * terms
    np.testing.assert_allclose(store.features[:], features, atol=1e-6 * terms)
    np.testing.assert_allclose(store.sq_norms, squares, rtol=1e-4)


def test_a_class_that_is_all_rounding_is_not_taken_for_a_wrong_projection() -> None:
    features, terms = torch.full((1, 1, 100), 1e-8), torch.ones(1, 1, dtype=torch.float64)
    sq_norm = torch.full((1, 1), 1e-15, dtype=torch.float64)
    require_preserved(features, sq_norm, [0], "train", 1.0, terms)
    with pytest.raises(NonFiniteError, match="did not keep its norm"):
        require_preserved(features, sq_norm, [0], "train", 1.0, 1e-5 * terms)
    with pytest.raises(NonFiniteError, match="did not keep its norm"):
        require_preserved(1e5 * features, sq_norm, [0], "train", 1.0, terms)


CHILD = """
import json, sys, tempfile, torch
from pathlib import Path
from torch import nn
from torch.utils.data import TensorDataset
import gradstore as gs
memory, layout, K, rows = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(2)

def featurize(rows, memory, width=64, on_plan=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                          nn.Linear(256, width), nn.ReLU(), nn.Linear(width, 1000))
    data = TensorDataset(torch.randn(rows, 1, 8, 8), torch.randint(0, 1000, (rows,)))
    seen = {"parameters": 4 * sum(p.numel() for p in model.parameters())}
    def planned(plan):
        seen.update(group=plan.manifest.group, below=plan.engine.below)
        reset()
        seen["begins"] = kilobytes("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        gs.featurize(gs.Project(model=model, splits={"train": data}), split="train", out=Path(folder) / "s",
                     proj_dim=K, layout=layout, memory=memory, on_plan=planned)
    return seen | {"run": kilobytes("VmHWM") - seen.pop("begins")}

def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def reset():
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")

featurize(2, "1GB", width=4)  # libraries load what they need once
print(json.dumps(featurize(rows, memory)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as Linux reports it")
@pytest.mark.parametrize(
    ("layout", "K", "rows", "megabytes"),
    [("per-class", 512, 24, 100), ("per-class", 4096, 24, 300), ("mixed", 16, 4, 600)],
)
def test_peak_memory_stays_within_the_budget(layout: str, K: int, rows: int, megabytes: int) -> None:
    if not library.available():
        megabytes = max(megabytes, PROMISED // 10**6)  # torch's own projection needs more beside a small budget
    command = [sys.executable, "-c", CHILD, f"{megabytes}MB", layout, str(K), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["below"] == 64
    assert found["run"] < megabytes * 10**6
