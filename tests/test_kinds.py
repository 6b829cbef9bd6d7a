"""`benchmarks/bench_kinds.py`: its residuals are those of dense float64 products, its page is what its tables say."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.data import TensorDataset

import gradstore as gs

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.bench_kinds import DRAWN_K, read, replace
from benchmarks.exactness.explained import compare
from benchmarks.exactness.gradients import BLOCK, KERNELS, block_grams, gradients, kept_grams
from benchmarks.exactness.models import CASES, HARD
from benchmarks.exactness.page import PAGE, TABLES, with_tables
from benchmarks.exactness.statistics import Sample, ratio, sample, spread, standard_error, summary, tail
from benchmarks.setting import RESULTS
from gradstore.model.parameters import parameter_blocks
from gradstore.projection.kinds import KINDS


class Words(nn.Module):
    """A vocabulary of which most words never occur, and a linear layer; 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(200, 5), nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.words(tokens).mean(1).tanh())


@pytest.fixture(scope="module")
def project() -> gs.Project:
    torch.manual_seed(0)
    splits = {"train": TensorDataset(torch.randint(0, 40, (8, 3)), torch.arange(8) % 3)}
    return gs.Project(model=Words().eval(), splits=splits)


def dense_rows(project: gs.Project, inputs: Tensor) -> Tensor:
    """Jacobian rows at their places among P's columns, float64 [n, c, columns]."""
    model = project.model.double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = vmap(jacrev(lambda p, x: functional_call(model, p, (x[None],))[0]), (None, 0))(parameters, inputs)
    blocks = parameter_blocks(model)
    rows = torch.zeros(len(inputs), 3, blocks[-1].stop, dtype=torch.float64)
    for block in blocks:
        rows[..., block.start : block.stop] = jacobian[block.name].flatten(2)
    model.float()
    return rows


def cosines(phi: Tensor) -> np.ndarray:
    unit = phi.flatten(1) / phi.flatten(1).norm(dim=1, keepdim=True)
    return (unit @ unit.T).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_are_those_of_dense_products(project: gs.Project, kind: str) -> None:
    K, n = 2 * BLOCK, 6
    rows = dense_rows(project, project.splits["train"].tensors[0][:n])  # type: ignore[attr-defined]
    P = gs.Projection(kind, K, seed=3).entries(torch.arange(K)[:, None], torch.arange(rows.shape[2]))
    features = rows @ P.T
    found = gradients(project, n)
    assert sum(values.shape[1] for _, values in found.pieces) < rows.shape[2] / 2, (
        "columns of absent words are left out"
    )
    grams = block_grams(found, kind, K, 3)
    i, j = np.triu_indices(n, 1)
    for place, phi, exact in ((0, features, rows), (1, features.sum(1), rows.sum(1))):
        expected = (cosines(phi) - cosines(exact))[i, j]
        both = sample(grams[place], found.exact[KERNELS[place]], 2).plain
        assert both == pytest.approx(expected[None], abs=1e-6)
        first = sample(grams[place], found.exact[KERNELS[place]], 1).plain[0]
        part = phi[..., :BLOCK]
        assert first == pytest.approx((cosines(part) - cosines(exact))[i, j], abs=1e-6)


def test_what_was_drawn_is_kept(project: gs.Project, tmp_path: Path) -> None:
    found = gradients(project, 4)
    before = kept_grams(found, "sjlt", BLOCK, 2, tmp_path)
    assert before.shape == (2, 2, 4, 4)
    assert not np.array_equal(before[:, 0], before[:, 1])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    after = kept_grams(found, "sjlt", BLOCK, 3, tmp_path)
    assert np.array_equal(after[:, :2], before)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def numbered(count: int) -> np.ndarray:
    """Blocks of two examples whose cosine, of any of them together, tells which they are."""
    blocks = np.tile(np.eye(2), (count, 1, 1))
    blocks[:, 0, 1] = blocks[:, 1, 0] = 2.0 ** -np.arange(1, count + 1)
    return blocks


def test_a_projection_is_some_blocks_of_one_batch() -> None:
    found = sample(numbered(40), np.eye(2), 4)
    assert len(found.batches) == 5
    for number, batch in enumerate(found.batches):
        assert len(batch) > 2
        for cosine in 4 * batch[:, 0]:
            members = [k for k in range(40) if int(cosine * 2.0**40) >> (39 - k) & 1]
            assert len(members) == 4
            assert {k // 8 for k in members} == {number}
    assert found.plain[:, 0] == pytest.approx(
        [sum(2.0**-k for k in range(4 * d + 1, 4 * d + 5)) / 4 for d in range(10)]
    )


def test_statistics_of_a_worked_example() -> None:
    common, rare = np.full((98, 1), 0.1), np.array([[1.0], [np.nan]])
    every = np.concatenate([common, rare])
    found = Sample((every[:50], every[50:]), every)
    said = summary(found, np.array([0.15]), 98)
    square, fourth = (98 * 0.1**2 + 1) / 99, (98 * 0.1**4 + 1) / 99
    assert said["mean"] == pytest.approx((98 * 0.1 + 1) / 99)
    assert said["rms"] == pytest.approx(square**0.5)
    assert spread(found) == pytest.approx([square**0.5])
    assert said["kurtosis"] == pytest.approx(fourth / square**2)
    assert said["far_share"] == said["lost_share"] == 0.01
    assert said["max"] == pytest.approx(0.1), "the one beyond the first 98 is not sought"
    assert dict(tail(found))[0.1] == pytest.approx(0.1)


def test_the_error_of_a_ratio_is_its_scatter() -> None:
    rng = np.random.default_rng(0)

    def drawn(scale: float) -> Sample:
        values = scale * rng.standard_normal((12, 30, 2))
        return Sample(tuple(values), values.reshape(-1, 2))

    found = [ratio(drawn(3), drawn(2)) for _ in range(400)]
    values, errors = map(np.array, zip(*found, strict=True))
    assert values.mean() == pytest.approx(1.5, abs=0.02)
    assert errors.mean() == pytest.approx(values.std(), rel=0.1)
    assert np.isnan(standard_error(np.arange(4.0)))


def test_a_sparse_projection_can_lose_an_example_of_two_entries() -> None:
    case = next(case for case in HARD if case.name == "onehot")
    found = gradients(case.project(Path()), 2)
    grams = np.concatenate([block_grams(found, "sjlt", 100 * BLOCK, seed)[0] for seed in range(30)])
    of_first = grams[:, 0, 0]
    assert set(np.round(of_first / BLOCK).tolist()) == {0.0, 2.0, 4.0}, "two entries cancel, stand apart, or add up"
    lost = float((of_first == 0).mean())
    assert lost == pytest.approx(1 / 2048, abs=4 * (1 / 2048 / 3000) ** 0.5)


def test_explanations_are_those_of_the_library(tmp_path: Path) -> None:
    torch.manual_seed(1)
    splits = {name: TensorDataset(torch.randn(n, 6), torch.arange(n) % 3) for name, n in (("train", 30), ("test", 12))}
    poisoned = {"train": torch.arange(30) % 3 == 0, "test": torch.arange(12) % 3 == 0}
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    project = gs.Project(model=model.eval(), splits=splits, poisoned=poisoned)
    rows = {(row["kind"], row["kernel"]): row for row in compare(project, [("sjlt", BLOCK, 0)])}
    train, test = (
        gs.featurize(project, split=split, out=tmp_path / split, proj_dim=BLOCK, projection="sjlt") for split in splits
    )
    for kernel, name in zip(KERNELS, ("trntk", "pntk-cosine"), strict=True):
        row, exact = rows["sjlt", kernel], rows["exact", kernel]
        assert exact["top5"] == 1
        best = np.argsort(-gs.exact_gram(project, "test", "train", name), axis=1)[:, :5]
        near = gs.topk(train, test, 5, kernel).indices
        shared = sum(len(set(a) & set(b)) for a, b in zip(near, best, strict=True))
        assert shared < 5 * len(test), "or else it is not told from the exact kernel"
        assert row["top5"] == pytest.approx(shared / 5 / len(test))
        confusion = gs.forensics(train, test, kernel=kernel).confusion
        assert confusion is not None
        assert confusion.precision is not None
        assert (row["precision"], row["fp"], row["fn"]) == (confusion.precision.value, confusion.fp, confusion.fn)
        surrogate = gs.KernelGLM(kernel, alpha=1e-4, max_iter=600).fit(train)
        assert row["tau"] == pytest.approx(gs.evaluate(surrogate, test, bootstrap=0).tau.value, abs=0.05)


def test_rows_take_the_place_of_those_of_their_case(tmp_path: Path) -> None:
    table = tmp_path / "kinds.csv"
    replace(table, [{"case": "a", "mean": 1}, {"case": "b", "mean": 2}], ("case",))
    replace(table, [{"case": "a", "mean": 3}, {"case": "a", "mean": 4}], ("case",))
    assert [(row["case"], row["mean"]) for row in read(table)] == [("b", "2"), ("a", "3"), ("a", "4")]


def test_the_page_says_what_the_tables_say() -> None:
    tables = {name: read(RESULTS / f"{name}.csv") for name in ("kinds", "kinds_explained", "featurize")}
    assert {row["case"] for row in tables["kinds"]} == set(CASES)
    assert all(row["K"] in {str(k) for k in (1024, 2048, 4096, DRAWN_K)} for row in tables["kinds"])
    page = PAGE.read_text()
    assert with_tables(page, tables) == page, "run `python -m benchmarks.bench_kinds --write`"
    changed = [{**row, "mean": "0.5"} for row in tables["kinds"]]
    assert with_tables(page, {**tables, "kinds": changed}) != page
    with pytest.raises(ValueError, match="has no"):
        with_tables(page.replace(f"<!-- {next(iter(TABLES))} -->", ""), tables)
