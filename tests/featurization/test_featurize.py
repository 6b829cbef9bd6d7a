"""From a model to the rows of a store, against a dense float64 reference that forms J and P in full."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case, project_of
from small_store import files as files_of
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import MismatchError, NonFiniteError, ProjectError, UsageError
from gradstore.featurization import plan as planning
from gradstore.featurization.settings import Settings
from gradstore.model.parameters import parameter_blocks
from gradstore.projection import Projection
from gradstore.projection.block_routes import accumulate_block

pytestmark = pytest.mark.numerical

MAIN = CASES[:5]  # MLP, CNN with BatchNorm, transformer with dict input, one logit, tied weights


def dense_jacobian(case: Case, n: int = 5) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """Logits, and (start, J float64 [n, c, size]) of every parameter, one backward pass a row and class."""
    model = case.model(dtype=torch.float64)
    inputs = case.batch(n, dtype=torch.float64)
    named = dict(model.named_parameters())
    blocks = parameter_blocks(model, case.parameters)
    logits = case.logits(model, inputs)
    per_block: list[list[Tensor]] = [[] for _ in blocks]
    for i in range(n):
        for c in range(case.classes):
            grads = torch.autograd.grad(
                logits[i, c], [named[b.name] for b in blocks], retain_graph=True, allow_unused=True
            )
            for column, grad, block in zip(per_block, grads, blocks, strict=True):
                column.append(torch.zeros(block.size, dtype=torch.float64) if grad is None else grad.flatten())
    jacobians = [torch.stack(column).reshape(n, case.classes, -1) for column in per_block]
    return logits.detach(), [(b.start, j) for b, j in zip(blocks, jacobians, strict=True)]


def dense_features(case: Case, projection: Projection, n: int = 5) -> Tensor:
    """P g / sqrt(K) with P written out from its entries, float64 [n, c, K]."""
    k = torch.arange(projection.dim)[:, None]
    parts = [
        j @ projection.entries(k, start + torch.arange(j.shape[-1])[None]).double().T
        for start, j in dense_jacobian(case, n)[1]
    ]
    return sum(parts) / projection.dim**0.5  # type: ignore[return-value]


@pytest.mark.parametrize("case", MAIN, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_rows_of_a_store_are_the_projected_jacobians(case: Case, kind: str, tmp_path: Path) -> None:
    projection = Projection(kind, 96, seed=3)
    store = gs.featurize(
        project_of(case), split="train", out=tmp_path / "s", projection=kind, proj_dim=96, seed=3, dtype="float32"
    )
    expected = dense_features(case, projection)
    error = (torch.from_numpy(store.features[:]).double() - expected).norm() / expected.norm()
    assert error < 1e-5
    logits, jacobians = dense_jacobian(case)
    sq_norm = sum(j.square().sum(-1) for _, j in jacobians)
    np.testing.assert_allclose(store.sq_norms, sq_norm, rtol=1e-5)
    np.testing.assert_allclose(store.logits, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(store.labels, np.arange(5) % case.classes)
    np.testing.assert_array_equal(store.rows, np.arange(5))


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_rounding_of_each_dtype_is_far_below_the_projection_noise(dtype: str, tmp_path: Path) -> None:
    project = project_of(MAIN[0])
    exact = gs.featurize(project, split="train", out=tmp_path / "f", proj_dim=512, dtype="float32").features[:]
    store = gs.featurize(project, split="train", out=tmp_path / dtype, proj_dim=512, dtype=dtype)
    got = store.features[:]
    assert (
        np.linalg.norm(got - exact) / np.linalg.norm(exact) < {"float16": 5e-4, "float32": 1e-12, "int8": 2e-2}[dtype]
    )
    np.testing.assert_allclose(store.norms, np.linalg.norm(got.astype(np.float64), axis=-1), rtol=1e-6)


def test_layout_sum_stores_the_sum_over_classes(tmp_path: Path) -> None:
    project = project_of(MAIN[0])
    per_class = gs.featurize(project, split="train", out=tmp_path / "a", proj_dim=64, dtype="float32")
    summed = gs.featurize(project, split="train", out=tmp_path / "b", proj_dim=64, dtype="float32", layout="sum")
    assert summed.shape == (5, 1, 64)
    np.testing.assert_allclose(summed.features[:][:, 0], per_class.features[:].sum(1), rtol=1e-4, atol=1e-5)


def test_inner_products_are_unbiased_over_seeds(tmp_path: Path) -> None:
    """Mean over 60 seeds of ⟨Pg, Pg'⟩ within four standard errors of ⟨g, g'⟩, for every pair of rows."""
    case = MAIN[0]
    jacobian = torch.cat([j for _, j in dense_jacobian(case)[1]], dim=-1).flatten(1)
    exact = (jacobian @ jacobian.T).numpy()
    grams = []
    for seed in range(60):
        store = gs.featurize(
            project_of(case), split="train", out=tmp_path / str(seed), proj_dim=64, seed=seed, dtype="float32"
        )
        phi = store.features[:].reshape(5, -1).astype(np.float64)
        grams.append(phi @ phi.T)
    error = np.std(grams, axis=0, ddof=1) / np.sqrt(len(grams))
    z = (np.mean(grams, axis=0) - exact) / error
    assert np.abs(z).max() < 4
    assert np.abs(np.std(grams, axis=0)).min() > 0  # the seeds do differ


def test_a_smaller_projection_is_a_prefix_of_a_larger_one(tmp_path: Path) -> None:
    project = project_of(MAIN[0])
    small = gs.featurize(project, split="train", out=tmp_path / "a", proj_dim=32, dtype="float32").features[:]
    large = gs.featurize(project, split="train", out=tmp_path / "b", proj_dim=128, dtype="float32").features[:]
    np.testing.assert_allclose(small * np.sqrt(32), large[..., :32] * np.sqrt(128), rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def digits() -> gs.Project:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    data = TensorDataset(torch.randn(40, 1, 8, 8), torch.arange(40) % 3)
    return gs.Project(model=model, splits={"train": data, "test": data}, show=gs.image(), poisoned={"train": [1, 5]})


@pytest.mark.parametrize("batch_size", [1, 7, 32, 96])
def test_the_bits_do_not_depend_on_the_batch_size(digits: gs.Project, batch_size: int, tmp_path: Path) -> None:
    reference = gs.featurize(digits, split="train", out=tmp_path / "a", proj_dim=64)
    other = gs.featurize(digits, split="train", out=tmp_path / "b", proj_dim=64, batch_size=batch_size)
    assert files_of(reference.path) == files_of(other.path)


def test_an_interrupted_run_continues_to_the_same_bytes(
    digits: gs.Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstore.featurization.plan.SHARD_BYTES", 1)  # one group a shard
    whole = gs.featurize(digits, split="train", out=tmp_path / "a", proj_dim=64)
    assert len(whole.manifest.shards) == 3

    def stop(state: Any) -> None:
        if state.rows >= 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gs.featurize(digits, split="train", out=tmp_path / "b", proj_dim=64, progress=stop)
    partial = gs.open(tmp_path / "b")
    assert not partial.complete
    assert len(partial) in (16, 32)
    with pytest.raises(UsageError, match=r"the store is unfinished \(expected 40 rows, got rows .* missing\)"):
        partial.require_complete()
    gs.featurize(digits, split="train", out=tmp_path / "b", proj_dim=64)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_finished_store_is_left_alone(digits: gs.Project, tmp_path: Path) -> None:
    gs.featurize(digits, split="train", out=tmp_path / "a", proj_dim=64)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "a").glob("*.h5")}
    called: list[Any] = []
    gs.featurize(digits, split="train", out=tmp_path / "a", proj_dim=64, progress=called.append)
    assert not called
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "a").glob("*.h5")}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"proj_dim": 65},
        {"projection": "gaussian"},
        {"layout": "sum"},
        {"dtype": "int8"},
        {"split": "test"},
    ],
)
def test_other_settings_do_not_continue_a_store(digits: gs.Project, change: dict[str, Any], tmp_path: Path) -> None:
    gs.featurize(digits, split="train", out=tmp_path / "a", proj_dim=64)
    if "split" in change:  # the same data under another name is the same data
        return
    with pytest.raises(MismatchError, match="differ in 1 field"):
        gs.featurize(digits, **{"split": "train", "out": tmp_path / "a", "proj_dim": 64, **change})


def test_code_that_computes_something_else_does_not_continue_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstore.featurization.plan.SHARD_BYTES", 1)
    data = TensorDataset(torch.randn(40, 3), torch.zeros(40).long())
    torch.manual_seed(0)
    model = nn.Linear(3, 2)

    def stop(state: Any) -> None:
        if state.rows >= 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gs.featurize(
            gs.Project(model=model, splits={"train": data}),
            split="train",
            out=tmp_path / "a",
            proj_dim=32,
            progress=stop,
        )
    changed = gs.Project(model=model, splits={"train": data}, forward=lambda m, x: 2 * m(x))
    with pytest.raises(MismatchError, match="the model computes other logits for row 0"):
        gs.featurize(changed, split="train", out=tmp_path / "a", proj_dim=32)


class Root(nn.Module):
    """Logits sqrt(w · x) and w · x: finite at zero, where the slope of the first is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x @ self.weight
        return torch.stack([h.sqrt(), h], dim=1)


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [0.0, 1.0, 1.0]], ids=["nan", "inf"])
def test_a_gradient_that_is_not_finite_names_row_class_and_parameter(row: list[float], tmp_path: Path) -> None:
    x = torch.ones(20, 3)
    x[17] = torch.tensor(row)
    project = gs.Project(model=Root(), splits={"train": TensorDataset(x, torch.zeros(20).long())})
    with pytest.raises(
        NonFiniteError, match=r"split 'train', parameter weight: the gradient of row 17, class 0 is not finite"
    ):
        gs.featurize(project, split="train", out=tmp_path / "a", proj_dim=32)
    assert not list((tmp_path / "a").glob("*.h5"))


def test_a_zero_gradient_is_refused(tmp_path: Path) -> None:
    x = torch.ones(20, 3)
    x[5] = 0
    project = gs.Project(
        model=nn.Linear(3, 2), splits={"train": TensorDataset(x, torch.zeros(20).long())}, parameters="weight"
    )
    with pytest.raises(NonFiniteError, match="the gradient of row 5 is zero for every class"):
        gs.featurize(project, split="train", out=tmp_path / "a", proj_dim=32)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_a_projection_that_is_silently_wrong_is_refused(
    digits: gs.Project, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(projection: Projection, out: Tensor, block: Any, first_k: int) -> None:
        accumulate_block(projection, out, block, first_k=first_k)
        out.mul_(factor)

    monkeypatch.setattr(sys.modules["gradstore.projection.block_sums"], "accumulate_block", wrong)
    with pytest.raises(NonFiniteError, match="the projection of row 0, class 0 did not keep its norm"):
        gs.featurize(digits, split="train", out=tmp_path / "a", proj_dim=2048)


@pytest.mark.parametrize("labels", [[0, 1, 3], [0, 1, -2]])
def test_labels_out_of_range_are_refused(labels: list[int], tmp_path: Path) -> None:
    project = gs.Project(model=nn.Linear(3, 3), splits={"train": TensorDataset(torch.ones(3, 3), torch.tensor(labels))})
    with pytest.raises(ProjectError, match=r"the label of row 2 is no class \(expected 0 to 2, or -1 for none"):
        gs.featurize(project, split="train", out=tmp_path / "a", proj_dim=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, "unknown dtype"),
        ({"layout": "classes"}, "unknown layout"),
        ({"projection": "sparse"}, "unknown projection"),
        ({"device": "tpu9"}, "unknown device"),
        ({"memory": "lots"}, "not a number of bytes"),
        ({"memory": "10KB"}, "one example does not fit the memory budget"),
        ({"batch_size": 0}, "unusable batch size"),
        ({"split": "val"}, "unknown split"),
    ],
)
def test_unusable_arguments_are_one_line(
    digits: gs.Project, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        gs.featurize(digits, **{"split": "train", "out": tmp_path / "a", "proj_dim": 64, **change})
    assert "\n" not in str(caught.value)


def test_an_output_that_is_not_a_store_is_left_alone(digits: gs.Project, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"exists and is not a gradstore store \(got it contains thesis.txt\)"):
        gs.featurize(digits, split="train", out=tmp_path, proj_dim=64)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_users_model_is_left_as_it_was(digits: gs.Project, tmp_path: Path) -> None:
    model = digits.model
    next(model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    gs.featurize(digits, split="train", out=tmp_path / "a", proj_dim=64)
    assert torch.equal(random, torch.get_rng_state())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    next(model.parameters()).requires_grad_(True)


def test_a_store_never_has_more_shards_than_a_manifest_bears() -> None:
    """Work decides how long a shard is, but not of 10^7 rows: 16 rows each would be 625,000 of them."""

    class Many(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10**7

        def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
            return torch.full((3,), float(row + 1)), row % 2

    project = gs.Project(model=nn.Linear(3, 2), splits={"train": Many()})
    plan = planning.Plan(project, "train", Settings(proj_dim=4), "cpu", "1GB")
    assert plan.manifest.shard_count <= planning.MOST_SHARDS
    plan._shard_flops = lambda: 1.0  # type: ignore[method-assign]
    rows = plan._shard_rows(plan.manifest.schema, 16)
    assert rows % 16 == 0
    assert 10**7 / rows <= planning.MOST_SHARDS
