"""Rows that are absent, left out or removed, keep their places and count nowhere.

Whatever is computed of a store with absent rows is compared with the same of a store of the others alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import MismatchError, NonFiniteError, UsageError
from gradstore.explain.forensics import forensics_page
from gradstore.explain.linearisation import linearise_store
from gradstore.featurization import plan
from gradstore.featurization.settings import Settings
from gradstore.search.index.store_index import open_index
from gradstore.store.export import export
from gradstore.store.feature_dataset import FeatureDataset
from gradstore.store.feature_store import FeatureStore
from gradstore.store.import_features import Provenance, import_features
from gradstore.store.present_rows import PresentRows, PresentStore
from gradstore.store.schema import EXCLUDED, NOT_FINITE, REMOVED, ZERO
from gradstore.store.shared_inputs import shared_inputs

N, K = 200, 256
GONE = np.array([0, 17, 64, 65, 130, 199])
REASONS = {0: NOT_FINITE, 17: NOT_FINITE, 64: ZERO, 65: ZERO, 130: REMOVED, 199: REMOVED}
THERE = np.setdiff1d(np.arange(N), GONE)


class Net(nn.Module):
    """Whose gradient is zero where the first input is above 50: the rest is not looked at."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)) * (x[:, :1] <= 50))


def data(n: int = N, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def spoilt() -> torch.Tensor:
    x = data()[0].clone()
    x[0, 3], x[17, 5] = torch.nan, torch.inf
    x[64:66, 0] = 100
    return x


def project(x: torch.Tensor, y: torch.Tensor, split: str = "train", marks: np.ndarray | None = None) -> gs.Project:
    poisoned = None if marks is None else {split: marks}
    return gs.Project(model=Net(), splits={split: TensorDataset(x, y)}, poisoned=poisoned)


MARKS = np.arange(N) % 7 == 3


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[gs.Rows, gs.Rows, gs.Rows]:
    """(store with absent rows, store of the others, queries)."""
    folder = tmp_path_factory.mktemp("stores")
    x, y = spoilt(), data()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_SHARD_FLOPS", {"cpu": 1e6})
        some = project(x, y, marks=MARKS)
        gs.featurize(some, split="train", out=folder / "some", proj_dim=K, on_bad_row="skip")
        others = project(x[THERE], y[THERE], marks=MARKS[THERE])
        rest = gs.featurize(others, split="train", out=folder / "rest", proj_dim=K)
    assert len(FeatureStore(folder / "some").manifest.shards) > 2
    queries = gs.featurize(project(*data(40, 1), split="test"), split="test", out=folder / "test", proj_dim=K)
    return gs.remove(folder / "some", [130, 199]), rest, queries


Stores = tuple[FeatureStore, FeatureStore, FeatureStore]


def test_absent_rows_keep_their_places(stores: Stores) -> None:
    some, rest, _ = stores
    assert {int(i): int(some.absent[i]) for i in np.flatnonzero(some.absent)} == REASONS
    np.testing.assert_array_equal(some.rows, np.arange(N))
    np.testing.assert_array_equal(some.present_at, THERE)
    np.testing.assert_allclose(some.features[THERE], rest.features[:], atol=2e-4)
    for values in (some.features[GONE], some.sq_norms[GONE], some.norms[GONE], some.logits[[0, 130, 199]]):
        assert np.isnan(values).all()
    assert np.isfinite(some.logits[[17, 64, 65]]).all()  # as the network has them
    assert some.predicted[[0, 130, 199]].tolist() == [-1] * 3
    np.testing.assert_array_equal(some.labels[GONE], [*data()[1][GONE[:4]], -1, -1])
    assert "2 since its gradient is zero: 64-65" in some.card()["absent"]
    assert "2 since it was removed: 130, 199" in some.card()["absent"]


@pytest.mark.parametrize("kind", [PresentStore, PresentRows])
def test_present_rows_read_as_others_do(kind: type[PresentRows], stores: Stores) -> None:
    some, rest, _ = stores
    view = gs.present_rows(some) if kind is PresentStore else PresentRows(some)
    assert type(view) is kind
    assert len(view) == len(rest) == len(THERE)
    assert gs.present_rows(rest) is rest
    whole = {name: column[THERE] for name, column in some.read(0, N).items()}
    for start, stop in ((0, len(view)), (10, 10), (14, 61), (60, 64), (150, len(view))):
        found = view.read(start, stop)
        for name, column in whole.items():
            np.testing.assert_array_equal(found[name], column[start:stop])
    rows = np.array([3, 16, 17, 62, 63, 190])
    gathered = view.gather(rows, view.schema.empty(len(rows)))
    np.testing.assert_array_equal(gathered["features"], whole["features"][rows])
    columns, room = view.schema.empty(len(view), features=False), np.empty((5, 3, K), np.float16)
    streamed = [(first, features.copy()) for first, features in view.stream(2, 180, columns, room)]
    np.testing.assert_array_equal(np.concatenate([f for _, f in streamed]), whole["features"][2:180])
    assert [first for first, _ in streamed] == list(2 + np.cumsum([0, *[len(f) for _, f in streamed[:-1]]]))
    np.testing.assert_array_equal(view.labels, some.labels[THERE])
    np.testing.assert_array_equal(view.poisoned, some.poisoned[THERE])
    np.testing.assert_array_equal(view.rows, THERE)
    assert view.part(20) == (some, 22)
    assert view == (gs.present_rows(some) if kind is PresentStore else PresentRows(some))
    assert view != some
    assert not view.absent.any()


@pytest.mark.parametrize("kernel", ["proj-trntk", "proj-pntk", "proj-trntk0"])
@pytest.mark.parametrize("mode", ["exact", "certified", "approx"])
def test_they_are_never_neighbours(mode: str, kernel: str, stores: Stores) -> None:
    some, rest, queries = stores
    found, want = (gs.topk(store, queries, 7, kernel, mode=mode) for store in (some, rest))
    np.testing.assert_array_equal(found.indices, THERE[want.indices])
    np.testing.assert_allclose(found.similarity, want.similarity, rtol=1e-6)
    assert found.train is some
    with pytest.raises(UsageError, match=f"expected 1 to {len(THERE)}"):
        gs.topk(some, queries, len(THERE) + 1, mode=mode)


def test_faiss_and_sessions_leave_them_out(stores: Stores) -> None:
    some, rest, queries = stores
    for faiss in ("Flat", "HNSW8"):
        found = gs.Session(some, faiss=faiss).topk(queries, 5, mode="approx", candidates=len(THERE))
        np.testing.assert_array_equal(found.indices, THERE[gs.topk(rest, queries, 5).indices])
    again = open_index(some)
    assert (again.event, len(again.sketch)) == ("opened", len(THERE))


def test_as_queries_they_are_left_out_or_refused(stores: Stores) -> None:
    some, rest, queries = stores
    found = gs.topk(queries, some, 3)
    np.testing.assert_array_equal(found.rows, THERE)
    np.testing.assert_array_equal(found.indices, gs.topk(queries, rest, 3).indices)
    assert [record["row"] for record in found.records()] == THERE.tolist()
    with pytest.raises(UsageError, match="row 17 is absent: its logits or its gradient are not finite"):
        gs.topk(queries, some, 3, rows=[16, 17])
    np.testing.assert_array_equal(gs.topk(some, some, 1).indices[:, 0], THERE)


def test_forensics_counts_without_them(stores: Stores) -> None:
    some, rest, queries = stores
    np.testing.assert_array_equal(gs.forensics(some, queries).votes, gs.forensics(rest, queries).votes)
    both = [gs.forensics(some, store, poisoned=MARKS & (some.absent == 0)) for store in (some, rest)]
    assert both[0].confusion == both[1].confusion
    assert both[0].confusion is not None
    assert both[0].confusion.tp + both[0].confusion.fn == MARKS[THERE].sum()


@pytest.mark.parametrize("arithmetic", ["float32", "int8", "auto"])
def test_of_a_matrix_their_rows_and_columns_are_nan(arithmetic: str, stores: Stores, tmp_path: Path) -> None:
    some, rest, queries = stores
    for kernel in ("proj-trntk", "proj-pntk", "proj-trntk0"):
        found = gs.gram(some, kernel=kernel, arithmetic=arithmetic, out=tmp_path / f"{kernel}.h5")[:]
        want = gs.gram(rest, kernel=kernel, arithmetic=arithmetic, out=tmp_path / f"{kernel}-rest.h5")[:]
        np.testing.assert_allclose(found[np.ix_(THERE, THERE)], want, atol=1e-4 * np.abs(want).max())
        assert np.isnan(found[GONE]).all()
        assert np.isnan(found[:, GONE]).all()
    cross = gs.gram(queries, some, arithmetic=arithmetic, out=tmp_path / "cross.h5")[:]
    assert np.isnan(cross[:, GONE]).all()
    assert np.isfinite(cross[:, THERE]).all()


def test_a_surrogate_of_them_is_one_of_the_others(stores: Stores) -> None:
    some, rest, queries = stores
    for backend, shuffle in (("multinomial", True), ("sgd", False)):
        model, want = (gs.KernelGLM(backend=backend, alpha=0.1, shuffle=shuffle).fit(store) for store in (some, rest))
        assert model.coef_.shape == (3, N)
        assert not model.coef_[:, GONE].any()
        np.testing.assert_allclose(model.coef_[:, THERE], want.coef_, atol=1e-3)
        np.testing.assert_allclose(model.logits(queries), want.logits(queries), atol=1e-2)
    chosen = [gs.KernelGLM(target="predictions", alpha="auto").fit(store).alpha_scores_ for store in (some, rest)]
    assert chosen[0] == pytest.approx(chosen[1], abs=0.02)
    given = gs.KernelGLM(alpha=1e-3).fit(some, np.where(some.labels < 0, 0, some.labels), outputs=some.logits)
    np.testing.assert_allclose(given.coef_, gs.KernelGLM(alpha=1e-3).fit(some).coef_)
    with pytest.raises(UsageError, match="the labels or outputs are not one a row"):
        gs.KernelGLM().fit(some, some.labels[THERE])


def test_an_attribution_gives_them_nothing(stores: Stores, tmp_path: Path) -> None:
    some, rest, queries = stores
    model = gs.KernelGLM.load(gs.KernelGLM(alpha=1e-3).fit(some).save(tmp_path / "m.glm"))
    other = gs.KernelGLM(alpha=1e-3).fit(rest)
    found, want = gs.attribute(model, queries, 3), gs.attribute(other, queries, 3)
    assert not found.values[:, GONE].any()
    np.testing.assert_allclose(found.values.sum(axis=1), found.logits, rtol=1e-9)
    np.testing.assert_allclose(found.values[:, THERE], want.values, atol=1e-3)
    np.testing.assert_allclose(found.class_means(), want.class_means(), atol=1e-4)
    for c in range(3):
        rows, values = found.visual(c)
        assert not np.isin(rows, GONE).any()
        np.testing.assert_allclose(values.sum(), found.logits[c], rtol=1e-9)
    assert not np.isin(found.top(N).contributors, GONE).any()
    with pytest.raises(UsageError, match="row 64 is absent: its gradient is zero"):
        gs.attribute(model, some, 64)


def test_faithfulness_is_over_those_that_are_there(stores: Stores) -> None:
    some, rest, queries = stores
    model = gs.KernelGLM(target="predictions").fit(queries, queries.predicted)
    found, want = (gs.evaluate(model, store, bootstrap=20) for store in (some, rest))
    for name, measure in found.measures().items():
        assert (measure.value, measure.n) == pytest.approx((getattr(want, name).value, len(THERE)), abs=1e-4)
    marked = gs.evaluate(model, some, np.where(some.labels < 0, 0, some.labels), bootstrap=0)
    assert marked.tau.value == pytest.approx(want.tau.value, abs=1e-4)
    curves = zip(linearise_store(model, some, bootstrap=0), linearise_store(model, rest, bootstrap=0), strict=True)
    for ours, theirs in curves:
        assert ours.r2.value == pytest.approx(theirs.r2.value, abs=1e-3)
    with pytest.raises(UsageError, match="row 0 is absent"):
        model.predict(some)
    assert model.predict(gs.present_rows(some)).shape == THERE.shape


def test_a_surrogate_of_their_gram_matrix_is_refused_in_words(stores: Stores, tmp_path: Path) -> None:
    some, rest, _ = stores
    matrix = gs.gram(some, out=tmp_path / "gram.h5")
    labels = np.where(some.labels < 0, 0, some.labels)
    for backend in ("multinomial", "sgd"):
        with pytest.raises(NonFiniteError, match="row 0 of the Gram matrix is not finite"):
            gs.KernelGLM(backend=backend, alpha=1e-3).fit(matrix, labels)
    model = gs.KernelGLM().fit(gs.gram(rest, out=tmp_path / "rest.h5"), rest.labels)
    cross = gs.gram(some, rest, out=tmp_path / "cross.h5")
    for ask in (model.predict, lambda gram: gs.attribute(model, gram, 17)):
        with pytest.raises(NonFiniteError, match="of the Gram matrix is not finite"):
            ask(cross)


def test_pairs_duplicates_and_exports_know_of_them(stores: Stores, tmp_path: Path) -> None:
    some, rest, _ = stores
    found = gs.residual(project(spoilt(), data()[1]), some, pairs=2 * N**2)
    assert not np.isin(np.concatenate([found.rows_a, found.rows_b]), GONE).any()
    np.testing.assert_array_equal(shared_inputs(rest, some), THERE)
    assert some.card()["inputs"] == "no two the same"
    export(some, tmp_path / "some.npy")
    exported = np.load(tmp_path / "some.npy")
    assert np.isnan(exported[GONE]).all()
    np.testing.assert_array_equal(exported[THERE], some.features[THERE])
    dataset = FeatureDataset(some)
    assert len(dataset) == len(THERE)
    assert dataset[1][1] == some.labels[THERE[1]]
    np.testing.assert_array_equal(dataset[1][0], some.features[THERE[1]])


def test_several_stores_together_know_of_theirs(stores: Stores) -> None:
    some, rest, queries = stores
    both = gs.concat([rest, some])
    places = np.concatenate([np.arange(len(rest)), len(rest) + THERE])
    np.testing.assert_array_equal(both.present_at, places)
    found = gs.topk(both, queries, 4)
    want = gs.topk(gs.concat([rest, rest]), queries, 4)
    np.testing.assert_allclose(found.similarity, want.similarity, rtol=1e-6)
    np.testing.assert_array_equal(np.sort(found.indices), np.sort(places[want.indices]))
    model, of_rest = gs.KernelGLM(alpha=1e-2).fit(both), gs.KernelGLM(alpha=1e-2).fit(gs.concat([rest, rest]))
    np.testing.assert_allclose(model.logits(queries), of_rest.logits(queries), atol=2e-2)
    assert gs.attribute(model, queries, 0).values.shape == (3, len(both))


def test_a_store_where_all_are_absent_answers_in_words(tmp_path: Path, stores: Stores) -> None:
    x, y = data(4)
    gs.featurize(project(x * torch.nan, y), split="train", out=tmp_path / "s", proj_dim=K, on_bad_row="skip")
    empty, queries = gs.open(tmp_path / "s"), stores[2]
    assert (empty.absent == NOT_FINITE).all()
    for ask in (lambda: gs.topk(empty, queries, 1), lambda: gs.KernelGLM().fit(empty)):
        with pytest.raises(UsageError):
            ask()
    assert gs.topk(queries, empty, 1).indices.shape == (0, 1)


def test_an_index_of_a_store_whose_rows_went_is_built_again(stores: Stores, tmp_path: Path) -> None:
    shutil.copytree(stores[1].path, tmp_path / "s")
    store = gs.open(tmp_path / "s")
    open_index(store)
    for name in ("proj-trntk", "proj-pntk"):
        gs.Session(store, name, faiss="Flat")
    assert list((tmp_path / "s").glob("index-*"))
    now = gs.remove(tmp_path / "s", [5])
    assert not list((tmp_path / "s").glob("index-*"))
    found = gs.topk(now, stores[2], 3, mode="certified")
    np.testing.assert_array_equal(found.indices, gs.topk(now, stores[2], 3).indices)
    assert 5 not in found.indices
    assert Settings.of(now.identity, where="") == Settings.of(stores[1].identity, where="")


def test_what_was_made_of_a_store_before_rows_went_is_refused(stores: Stores, tmp_path: Path) -> None:
    """A surrogate and a Gram matrix still hold the row; so they are of another store now, also of an imported one."""
    some, rest, queries = stores
    shutil.copytree(rest.path, tmp_path / "s")
    np.save(tmp_path / "f.npy", rest.features[:])
    made = Provenance("trak", "net")
    import_features(tmp_path / "f.npy", tmp_path / "i", made, labels=rest.labels)
    for path, asked in ((tmp_path / "s", queries), (tmp_path / "i", gs.open(tmp_path / "i"))):
        model = gs.KernelGLM(alpha=1e-2).fit(gs.open(path))
        assert np.isfinite(gs.attribute(model, asked, 3).values).all()
        gs.remove(path, [5])
        with pytest.raises(MismatchError, match=r"data\.removed"):
            gs.attribute(model, asked, 3)
    assert "removed" in some.data


def test_excluded_rows_count_nowhere_until_they_are_taken_back(stores: Stores, tmp_path: Path) -> None:
    _, rest, queries = stores
    path = Path(shutil.copytree(rest.path, tmp_path / "s"))
    before, first = gs.open(path), gs.topk(rest, queries, 1).indices[:, 0]
    gone = np.unique(first)
    fitted = gs.KernelGLM(alpha=1e-2).fit(before)
    now = gs.annotate(path, excluded=gone)
    assert np.flatnonzero(now.absent == EXCLUDED).tolist() == gone.tolist()
    assert f"{len(gone)} since it is excluded by annotation" in now.card()["absent"]
    assert now.annotations.history[-1][1] == f"{len(gone)} exclusions"
    second = gs.topk(rest, queries, len(gone) + 1).indices
    want = [next(i for i in row if i not in gone) for row in second]
    for mode in ("exact", "certified", "approx"):
        assert gs.topk(now, queries, 1, mode=mode).indices[:, 0].tolist() == want
    matrix = gs.gram(now, out=tmp_path / "gram.h5")[:]
    assert np.isnan(matrix[gone]).all()
    assert np.isfinite(np.delete(np.delete(matrix, gone, 0), gone, 1)).all()
    assert np.isfinite(now.features[gone]).all()
    assert not gs.KernelGLM(alpha=1e-2).fit(now).coef_[:, gone].any()
    found = gs.attribute(fitted, queries, 3, train=now)  # of a surrogate that learnt from them
    np.testing.assert_allclose(found.logits, fitted.logits(queries)[3], rtol=1e-5)
    np.testing.assert_allclose(found.values.sum(axis=1), found.logits, rtol=1e-9)
    assert gs.annotate(path, excluded=[]).absent.sum() == 0
    np.testing.assert_array_equal(gs.topk(gs.open(path), queries, 1).indices[:, 0], first)


def test_an_index_knows_which_rows_were_excluded(stores: Stores, tmp_path: Path) -> None:
    """As many as before, but others, and of the same shard."""
    path = Path(shutil.copytree(stores[1].path, tmp_path / "s"))
    for excluded in ([3, 9], [3, 10], [4, 9]):
        now = gs.annotate(path, excluded=excluded)
        assert open_index(now).event.startswith("built")
        assert open_index(gs.open(path)).event == "opened"
        found = gs.topk(now, gs.present_rows(now), 1, mode="certified").indices[:, 0]
        np.testing.assert_array_equal(found, now.present_at)
        flat = gs.Session(now, faiss="Flat").topk(gs.present_rows(now), 1, mode="approx").indices[:, 0]
        np.testing.assert_array_equal(flat, now.present_at)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_rows_of_older_stores_may_be_excluded(version: str, tmp_path: Path) -> None:
    archive = Path(__file__).parents[1] / "data/archives" / version
    now = gs.annotate(shutil.copytree(archive, tmp_path / "s"), excluded=[2, 5])
    assert gs.present_rows(now).rows.tolist() == [i for i in range(len(now)) if i not in (2, 5)]
    both = gs.concat([now, gs.open(archive)])
    assert np.flatnonzero(both.absent).tolist() == [2, 5]


def test_pages_count_the_rows_that_are_there(stores: Stores) -> None:
    some, _, queries = stores
    assert gs.topk(some, queries, 2).page().train_size == len(THERE)
    page = forensics_page([gs.forensics(some, queries, poisoned=MARKS)])
    assert (page.train_size, page.train_poisoned) == (len(THERE), MARKS[THERE].sum())
