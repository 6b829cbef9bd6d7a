"""Layout "sketched": P_j v_j of random combinations v_j of the classes; what it estimates, and how well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import SmallCNN
from torch import Tensor
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import MismatchError, NonFiniteError, UsageError
from gradstore.featurization.row_audit import require_draws_preserved
from gradstore.featurization.trial import checks
from gradstore.jacobians import JacobianEngine
from gradstore.kernels.sketched_error import sketched_errors
from gradstore.model.parameters import parameter_blocks
from gradstore.projection.class_signs import STREAM, class_signs
from gradstore.projection.projection_audit import AuditSchedule, Comparison

pytestmark = pytest.mark.numerical
N, C, K, DRAWS = 20, 4, 480, 16
OPTIONS = {"proj_dim": K, "layout": "sketched", "class_draws": DRAWS, "seed": 3}


@pytest.fixture(scope="module")
def project() -> gs.Project:
    torch.manual_seed(0)
    x = torch.randn(N, 1, 8, 8)
    return gs.Project(model=SmallCNN(), splits={"train": TensorDataset(x, torch.arange(N) % C)})


def test_signs_are_entries_of_the_last_stream():
    signs = class_signs(2**63 + 1, 5, 300)
    last = replace(gs.Projection(dim=5, seed=2**63 + 1), stream=STREAM)
    assert torch.equal(signs, last.entries(torch.arange(5)[:, None], torch.arange(300)).float())
    assert signs.abs().eq(1).all()
    assert torch.equal(class_signs(2**63 + 1, 9, 200)[:5], signs[:, :200])  # of fewer draws or classes, the first
    assert not torch.equal(class_signs(2**63, 5, 300), signs)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_a_row_is_each_combination_under_a_projection_of_its_own(
    project: gs.Project, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    margins: list[float] = []
    require = Comparison.require

    def measured(self: Comparison, sq_norm: Tensor, split: str) -> None:
        margins.append(float((self.want - self.got).abs().max()) / self.tolerance(sq_norm))
        require(self, sq_norm, split)

    monkeypatch.setattr(Comparison, "require", measured)
    monkeypatch.setattr(AuditSchedule, "due", True)
    store = gs.featurize(
        project, split="train", out=tmp_path / "s", projection=kind, dtype="float32", memory="30MB", **OPTIONS
    )
    other = gs.featurize(
        project, split="train", out=tmp_path / "o", projection=kind, dtype="float32", memory="30MB", batch_size=1,
        **OPTIONS,
    )  # fmt: skip
    assert margins
    assert max(margins) < 0.3
    inputs = project.splits["train"].tensors[0]
    expected, square = torch.zeros(N, DRAWS, K // DRAWS, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    signs = class_signs(3, DRAWS, C).double()
    for block in JacobianEngine(project.model, parameter_blocks(project.model), example=inputs)(inputs):
        drawn = torch.einsum("jc,ncp->njp", signs, block.dense().double())
        columns = torch.arange(block.start, block.start + block.size)
        for j in range(DRAWS):
            P = replace(gs.Projection(kind, K, 3), stream=j).entries(torch.arange(K // DRAWS)[:, None], columns)
            expected[:, j] += drawn[:, j] @ P.double().T / np.sqrt(K)
        square += drawn.square().sum((1, 2)) / DRAWS
    assert store.shape == (N, 1, K)
    np.testing.assert_allclose(store.features[:][:, 0], expected.flatten(1), atol=1e-5 * expected.abs().max())
    np.testing.assert_allclose(store.sq_norms[:, 0], square, rtol=1e-5)
    assert np.array_equal(store.features[:], other.features[:])


def test_it_serves_trace_kernels_and_nothing_else(project: gs.Project, tmp_path: Path) -> None:
    store = gs.featurize(project, split="train", out=tmp_path / "s", **OPTIONS)
    assert gs.topk(store, store, 1).indices[:, 0].tolist() == list(range(N))
    with pytest.raises(
        UsageError, match=r"proj-pntk needs P Σ_c g\^c, .*got layout sketched\)\. Use --kernel proj-trntk"
    ):
        gs.gram(store, kernel="proj-pntk")
    with pytest.raises(UsageError, match=r"a combination of classes needs the features of each.*got layout sketched"):
        gs.topk(store, store, 1, classes="1")
    with pytest.raises(UsageError, match="combinations of classes cannot be grown"):
        gs.featurize(project, split="train", out=tmp_path / "g", grow_from=store.path, **{**OPTIONS, "proj_dim": 2 * K})
    more = gs.featurize(project, split="train", out=tmp_path / "m", **{**OPTIONS, "class_draws": 8})
    with pytest.raises(MismatchError, match="class_draws"):
        gs.topk(store, more, 1)
    assert [c.error for c in checks(project, **OPTIONS)] == [None] * 9


@pytest.mark.parametrize(("K", "draws"), [(100, 16), (64, 1), (16, 32)])
def test_draws_that_do_not_divide_the_columns_are_refused(project: gs.Project, K: int, draws: int, tmp_path: Path):
    with pytest.raises(UsageError, match=rf"--class-draws: bad class draws .*K = {K} is a multiple, got {draws}"):
        gs.featurize(project, split="train", out=tmp_path / "s", layout="sketched", proj_dim=K, class_draws=draws)


@pytest.mark.parametrize("layout", ["per-class", "sum", "mixed"])
def test_draws_of_a_layout_that_has_none_are_refused(project: gs.Project, layout: str, tmp_path: Path):
    """They were put in the store's identity, so that a store without them did not fit beside it."""
    with pytest.raises(UsageError, match=rf"only the layout sketched draws .*got --layout {layout}"):
        gs.featurize(project, split="train", out=tmp_path / "s", layout=layout, proj_dim=64, class_draws=8)
    assert not (tmp_path / "s").exists()


def test_a_draw_that_did_not_keep_its_norm_is_refused() -> None:
    features = torch.ones(2, 1, 4 * 600)
    scaled = {"w": torch.ones(2, 4, dtype=torch.float64)}
    require_draws_preserved(features, scaled, [0, 1], "train", 4)
    features[1, 0, 600:1200] *= 2
    with pytest.raises(NonFiniteError, match="row 1, class 1 did not keep its norm"):
        require_draws_preserved(features, scaled, [0, 1], "train", 4)


# -- the estimator -------------------------------------------------------------------------------------------------


def example(rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gradients g, h [classes, p] of a few directions."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, 60, generator=draw, dtype=torch.float64)
    g = torch.randn(12, rank, generator=draw, dtype=torch.float64) @ basis
    return g, g + 0.7 * torch.randn(12, rank, generator=draw, dtype=torch.float64) @ basis


def drawn_features(g: Tensor, h: Tensor, draws: int, columns: int, times: int, kind: str) -> tuple[Tensor, Tensor]:
    """Features [times, 1, K] of both, each time of other signs and another P."""
    draw = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (times, draws, len(g)), generator=draw).double() * 2 - 1
    shape = (times, draws, columns, g.shape[1])
    P = torch.randn(shape, generator=draw, dtype=torch.float64)
    P = P.sign() if kind == "rademacher" else P
    K = draws * columns
    both = [torch.einsum("tjkp,tjp->tjk", P, signs @ x).reshape(times, 1, K) / K**0.5 for x in (g, h)]
    return both[0], both[1]


def predicted(g: Tensor, h: Tensor, draws: int, K: int) -> tuple[float, float]:
    """Mean and variance by hand; an upper bound of the variance for Rademacher entries."""
    M, A, B = g @ h.T, g @ g.T, h @ h.T
    S = (M + M.T) / 2

    def q(X: Tensor, Y: Tensor) -> Tensor:
        return 2 * ((X * Y).sum() - (X.diagonal() * Y.diagonal()).sum())

    trace, hutchinson = M.trace(), q(S, S)
    projection = A.trace() * B.trace() + q(A, B) + trace**2 + hutchinson
    return float(trace), float(hutchinson / draws + projection / K)


@pytest.mark.parametrize("rank", [1, 3, 12])
@pytest.mark.parametrize(("draws", "columns"), [(4, 10), (10, 4)])
def test_mean_and_variance_are_those_derived(rank: int, draws: int, columns: int) -> None:
    g, h = example(rank)
    times = 6000
    mean, variance = predicted(g, h, draws, draws * columns)
    a, b = drawn_features(g, h, draws, columns, times, "gaussian")
    values = (a * b).sum((1, 2))
    assert float(values.mean()) == pytest.approx(mean, abs=5 * (variance / times) ** 0.5)
    assert float(values.var()) == pytest.approx(variance, rel=0.15)
    a, b = drawn_features(g, h, draws, columns, 2000, "rademacher")
    assert float((a * b).sum((1, 2)).var()) < 1.15 * variance


def test_one_gradient_of_all_classes_is_the_worst_case() -> None:
    g = torch.ones(50, 1, dtype=torch.float64) @ torch.randn(1, 60, dtype=torch.float64)
    trace, variance = predicted(g, g, 8, 10**12)
    assert variance == pytest.approx(2 * trace**2 / 8, rel=0.03)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("rank", [2, 12])
def test_error_bars_cover_the_exact_value(rank: int, normalised: bool) -> None:
    g, h = example(rank, seed=3)
    draws, times = 32, 1500
    a, b = drawn_features(g, h, draws, 8, times, "rademacher")
    values, exact = (a * b).sum((1, 2)), (g * h).sum()
    if normalised:
        values = values / (a.square().sum((1, 2)) * b.square().sum((1, 2))).sqrt()
        exact = exact / (g.square().sum() * h.square().sum()).sqrt()
    errors = sketched_errors(a, b, draws, normalised=normalised)
    away = (values - exact).abs() / errors
    assert 0.62 < float((away < 1).double().mean()) < 0.72  # 0.68 of a normal variable
    assert 0.91 < float((away < 2).double().mean()) < 0.97
    assert float(errors.square().mean().sqrt()) == pytest.approx(
        float((values - exact).square().mean().sqrt()), rel=0.12
    )


def test_a_row_with_itself_has_no_error_and_searches_say_the_error(project: gs.Project, tmp_path: Path) -> None:
    store = gs.featurize(project, split="train", out=tmp_path / "s", dtype="float32", **OPTIONS)
    features = torch.from_numpy(store.features[:])
    assert float(sketched_errors(features, features, DRAWS, normalised=True).max()) < 1e-8
    found = gs.topk(store, store, 3, error_bars=True)
    a, b = features[:1].expand(3, -1, -1), features[found.indices[0].tolist()]
    np.testing.assert_allclose(
        found.standard_error[0], sketched_errors(a, b, DRAWS, normalised=True), rtol=1e-6, atol=1e-9
    )
    exact = gs.exact_gram(project, kernel="trntk")
    projected = gs.gram(store, out=tmp_path / "gram.h5")[:]
    pairs = np.triu_indices(N, 1)
    errors = sketched_errors(features[pairs[0]], features[pairs[1]], DRAWS, normalised=True).numpy()
    away = np.abs(projected[pairs] - exact[pairs]) / errors
    assert np.mean(away < 2) > 0.8  # pairs share draws, so they miss together
    assert len(gs.residual(project, store, store, "proj-trntk", pairs=16).exact) == 16
