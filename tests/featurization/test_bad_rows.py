"""F25: rows that cannot be stored, as a broken input or a dead network makes them, stop a run or are left out of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Record
from small_store import files
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import MismatchError, NonFiniteError, ProjectError, UsageError
from gradstore.featurization import plan
from gradstore.featurization.plan import Plan
from gradstore.featurization.settings import Settings
from gradstore.featurization.trial import checks
from gradstore.model.examples import sample_rows
from gradstore.store.feature_store import FeatureStore
from gradstore.store.schema import NOT_FINITE, REMOVED, UNREADABLE, ZERO
from gradstore.store.verify import verify

N, K = 120, 64
SPOILT = {3: NOT_FINITE, 40: NOT_FINITE, 41: ZERO, 119: NOT_FINITE}
THERE = np.setdiff1d(np.arange(N), [*SPOILT])


class Net(nn.Module):
    """A convolution, a norm and layers on positions: the routes of most models; a bright first value silences all."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv1d(1, 4, 3), nn.LayerNorm(6)
            self.token, self.last = nn.Linear(6, 5), nn.Linear(20, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.token(self.norm(self.conv(x[:, None]))))
        return self.last(hidden.flatten(1) * (x[:, :1] < 50))


def good() -> Tensor:
    return torch.randn(N, 8, generator=torch.Generator().manual_seed(0))


def spoilt() -> Tensor:
    x = good()
    x[3, 2], x[40, 7], x[119, 0] = torch.nan, torch.inf, -torch.inf
    x[41, 0] = 99
    return x


def project(x: Tensor, model: nn.Module | None = None) -> gs.Project:
    return gs.Project(model=model or Net(), splits={"train": TensorDataset(x, torch.arange(len(x)) % 3)})


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_SHARD_FLOPS", {"cpu": 1e6})


def featurize(x: Tensor, out: Path, **given: object) -> FeatureStore:
    return gs.featurize(project(x), split="train", out=out, memory="64MB", **{"proj_dim": K, **given})  # type: ignore[arg-type]


KINDS = {
    "float16": {},
    "int8": {"dtype": "int8"},
    "sum": {"layout": "sum"},
    "mixed": {"layout": "mixed"},
    "one row at a time": {"alone": True},
    "workers": {"workers": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_bad_rows_are_left_out_and_the_others_are_to_the_bit_as_ever(kind: str, tmp_path: Path, record: Record) -> None:
    """As in a run where the inputs of the bad rows were good."""
    with pytest.raises(NonFiniteError, match=r"row (3|40|41|119)\b"):  # of several workers any may come first
        featurize(spoilt(), tmp_path / "s", **KINDS[kind])
    store = featurize(spoilt(), tmp_path / "s", on_bad_row="skip", **KINDS[kind])
    assert {int(i): int(store.absent[i]) for i in np.flatnonzero(store.absent)} == SPOILT
    assert verify(store.path).ok
    ever = featurize(good(), tmp_path / "ever", **KINDS[kind])
    ours, theirs = (found.read(0, N) for found in (store, ever))
    for name in ours:
        if name != "digest":
            np.testing.assert_array_equal(ours[name][THERE], theirs[name][THERE], err_msg=name)
    for name in ("scale", "norm", "sq_norm"):
        assert np.isnan(ours[name][[*SPOILT]]).all()
    assert not ours["features"][[*SPOILT]].any()
    np.testing.assert_array_equal(ours["label"], np.arange(N) % 3)
    control = "stopped with status 8 at row 3, or stored as NaN before there was a check"
    record("F25", "bad rows left out", injected=4, recovered=4, refused=0, silent=0, control=control)


def test_a_run_that_leaves_rows_out_is_the_same_however_it_came_about(tmp_path: Path) -> None:
    """In one go, after a stop at a bad row, in large batches and one group at a time."""
    whole = featurize(spoilt(), tmp_path / "whole", on_bad_row="skip")
    with pytest.raises(NonFiniteError, match="row 119"):
        featurize(torch.where(torch.arange(N)[:, None] == 119, spoilt(), good()), tmp_path / "begun")
    assert 0 < len(gs.open(tmp_path / "begun")) < N
    again = [featurize(spoilt(), tmp_path / f"{size}", on_bad_row="skip", batch_size=size) for size in (1, 1000)]
    for other in again:
        assert files(other.path) == files(whole.path)


def test_rows_that_were_left_out_are_computed_later(tmp_path: Path, record: Record) -> None:
    """Their inputs were mended; those of rows that are there may not change."""
    store = featurize(spoilt(), tmp_path / "s", on_bad_row="skip")
    ever = featurize(good(), tmp_path / "ever")
    before = files(store.path)
    mended = spoilt()
    mended[40], mended[41] = good()[40], good()[41]
    assert files(featurize(mended, store.path).path) == before
    with pytest.raises(NonFiniteError, match="row 3"):
        featurize(mended, store.path, retry_absent=True)
    assert files(store.path) == before
    now = featurize(mended, store.path, retry_absent=True, on_bad_row="skip")
    assert np.flatnonzero(now.absent).tolist() == [3, 119]
    full = featurize(good(), store.path, retry_absent=True)
    assert not full.absent.any()
    assert verify(full.path).ok
    ours, theirs = full.read(0, N), ever.read(0, N)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert any(".r2.h5" in name for name in files(full.path))
    assert files(featurize(good(), store.path, retry_absent=True).path) == files(full.path)
    changed = good()
    changed[7] += 1
    with pytest.raises(MismatchError, match="row 7 of split 'train' has other inputs"):
        featurize(changed, store.path)
    record("F25", "rows computed later", injected=4, recovered=4, refused=0, silent=0, control="left out for ever")


def test_a_handle_opened_before_says_that_the_store_has_changed(tmp_path: Path) -> None:
    store = featurize(spoilt(), tmp_path / "s", on_bad_row="skip")
    before = gs.open(store.path)
    featurize(good(), store.path, retry_absent=True)
    with pytest.raises(UsageError, match="the store has changed since it was opened"):
        before.read(0, N)


class Files(torch.utils.data.Dataset):
    """Of which some are broken or missing."""

    def __init__(self, errors: dict[int, Exception], targets: list[int] | None = None) -> None:
        self.errors, self.targets = errors, [i % 3 for i in range(N)] if targets is None else targets

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        if row in self.errors:
            raise self.errors[row]
        return good()[row], row % 3


def test_rows_that_cannot_be_read_are_left_out(tmp_path: Path, record: Record) -> None:
    """Such as pictures that are cut short, among the first rows, the sampled ones and others."""
    errors: dict[int, Exception] = {0: OSError("image file is truncated"), 1: FileNotFoundError(2, "no such file")}
    errors |= {50: ValueError("not enough values"), N - 1: KeyError("label")}
    broken = gs.Project(model=Net(), splits={"train": Files(errors)})
    with pytest.raises(ProjectError, match="row 0 cannot be read"):
        gs.featurize(broken, split="train", out=tmp_path / "s", proj_dim=K, memory="64MB")
    store = gs.featurize(broken, split="train", out=tmp_path / "s", proj_dim=K, memory="64MB", on_bad_row="skip")
    assert {int(i): int(store.absent[i]) for i in np.flatnonzero(store.absent)} == dict.fromkeys(errors, UNREADABLE)
    assert store.labels[[*errors]].tolist() == [-1] * 4
    assert not store.input_digests[[*errors]].any()
    ever, there = featurize(good(), tmp_path / "ever"), np.setdiff1d(np.arange(N), [*errors])
    for name, column in store.read(0, N).items():
        np.testing.assert_array_equal(column[there], ever.read(0, N)[name][there], err_msg=name)
    whole = gs.Project(model=Net(), splits={"train": Files({})})
    mended = gs.featurize(
        whole, split="train", out=store.path, proj_dim=K, memory="64MB", on_bad_row="skip", retry_absent=True
    )
    assert not mended.absent.any()
    np.testing.assert_array_equal(mended.features[:], ever.features[:])
    record("F25", "rows that cannot be read", injected=4, recovered=4, refused=0, silent=0, control="status 3 at row 0")


@pytest.mark.parametrize("error", [OSError(24, "too many open files"), OSError(5, "input/output error"), MemoryError()])
def test_what_the_system_lacks_leaves_no_row_out(error: Exception, tmp_path: Path, record: Record) -> None:
    broken = gs.Project(model=Net(), splits={"train": Files({100: error})})
    with pytest.raises(ProjectError, match="row 100 cannot be read"):
        gs.featurize(broken, split="train", out=tmp_path / "s", proj_dim=K, memory="64MB", on_bad_row="skip")
    record("F25", "the system fails", injected=1, recovered=0, refused=1, silent=0, control="rows lost unsaid")


def test_a_table_of_labels_is_still_held_against_rows_that_can_be_read(tmp_path: Path) -> None:
    errors: dict[int, Exception] = {0: ValueError("broken"), 77: ValueError("broken")}
    given = {"split": "train", "proj_dim": K, "memory": "64MB", "on_bad_row": "skip"}
    wrong = [i % 3 for i in range(N)]
    right = gs.Project(model=Net(), splits={"train": Files(errors, wrong)})
    assert gs.featurize(right, out=tmp_path / "right", **given).labels[1:5].tolist() == [1, 2, 0, 1]  # type: ignore[arg-type]
    other = next(i for i in range(1, N) if i not in sample_rows(N))
    wrong = [*wrong[:other], (other + 1) % 3, *wrong[other + 1 :]]
    with pytest.raises(ProjectError, match=f"row {other} has another label than the dataset's own table"):
        gs.featurize(
            gs.Project(model=Net(), splits={"train": Files(errors, wrong)}),
            out=tmp_path / "wrong",
            **given,  # type: ignore[arg-type]
        )


def test_first_rows_that_are_bad_slow_no_run_down() -> None:
    """Layers' rules are tried by the first rows that are good."""
    x = good()
    routes = [Plan(project(x), "train", Settings(proj_dim=K), "cpu", "64MB").engine.describe()]
    x[:2], x[2, 0], x[3, 1] = torch.nan, torch.inf, torch.nan
    routes.append(Plan(project(x), "train", Settings(proj_dim=K), "cpu", "64MB").engine.describe())
    assert routes[0] == routes[1]
    assert not any("loop" in route for _, route in routes[0])


class Spread(Net):
    """Centred over the batch, so that one bad row spoils its neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - (x.mean(0) if len(x) > 3 else 0))


class SilencedTogether(Net):
    """A bright example silences all that are computed with it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (x.abs().max() < 50)


@pytest.mark.parametrize(("model", "what"), [(Spread, "not finite"), (SilencedTogether, "is zero")])
def test_a_row_that_is_bad_only_beside_others_is_refused(
    model: type[Net], what: str, tmp_path: Path, record: Record
) -> None:
    """Left out it would be a right row lost, without a word."""
    x = good()
    x[100] = torch.nan if model is Spread else 99.0
    with pytest.raises(ProjectError, match=rf"{what}, but only beside other rows|beside other rows|alone"):
        gs.featurize(
            project(x, model()), split="train", out=tmp_path / "s", proj_dim=K, memory="64MB", on_bad_row="skip"
        )
    assert not (gs.open(tmp_path / "s").absent > 0).any()
    alone = gs.featurize(
        project(x, model()), split="train", out=tmp_path / "a", proj_dim=K, on_bad_row="skip", alone=True
    )
    assert np.flatnonzero(alone.absent).tolist() == [100]
    record("F25", "bad only beside others", injected=1, recovered=0, refused=1, silent=0, control="rows lost unsaid")


def test_growing_and_appending_know_of_absent_rows(tmp_path: Path) -> None:
    small = featurize(spoilt(), tmp_path / "small", on_bad_row="skip")
    gs.remove(small.path, [10])
    with pytest.raises(NonFiniteError, match="row 3"):
        featurize(spoilt(), tmp_path / "grown", grow_from=small.path, proj_dim=4 * K)
    grown = featurize(spoilt(), tmp_path / "grown", grow_from=small.path, proj_dim=4 * K, on_bad_row="skip")
    featurize(spoilt(), tmp_path / "fresh", proj_dim=4 * K, on_bad_row="skip")
    fresh = gs.remove(tmp_path / "fresh", [10])
    assert {int(i): int(grown.absent[i]) for i in np.flatnonzero(grown.absent)} == {**SPOILT, 10: REMOVED}
    for name, column in grown.read(0, N).items():
        np.testing.assert_array_equal(column, fresh.read(0, N)[name], err_msg=name)
    more = torch.cat([spoilt(), spoilt()[:30]])
    longer = featurize(more, small.path, on_bad_row="skip")
    assert len(longer) == N + 30
    assert np.flatnonzero(longer.absent).tolist() == [3, 10, 40, 41, 119, N + 3]


def test_an_unknown_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--on-bad-row: unknown answer to a bad row"):
        featurize(good(), tmp_path / "s", on_bad_row="ignore")


def test_every_row_may_be_bad(tmp_path: Path) -> None:
    store = featurize(good() * torch.nan, tmp_path / "s", on_bad_row="skip")
    assert (store.absent == NOT_FINITE).all()
    assert featurize(good(), store.path, retry_absent=True).absent.sum() == 0


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    featurize(spoilt(), tmp_path / "s", on_bad_row="skip", on_note=said.append)
    assert said == ["absent, 4 of 120 rows: 3, 40-41, 119; `gradstore info` says why"]


def test_check_tries_a_project_with_bad_rows() -> None:
    x = spoilt()
    x[0] = torch.nan
    failed = [check for check in checks(project(x), proj_dim=16) if check.error is not None]
    assert "featurize --on-bad-row skip leaves such rows out" in failed[0].detail
    found = {check.name: check for check in checks(project(x), proj_dim=16, on_bad_row="skip")}
    assert not any(check.error for check in found.values())
    assert found["Jacobians"].detail.startswith("row 1 equals looped autograd")
    assert found["rows"].detail.endswith("; 2 are left out: 0, 3")
    broken = gs.Project(model=Net(), splits={"train": Files({0: OSError("image file is truncated")})})
    found = {check.name: check for check in checks(broken, proj_dim=16, on_bad_row="skip")}
    assert not any(check.error for check in found.values())
    assert found["inputs"].detail == "119 of 120 inputs read: no two the same"
    assert found["rows"].detail.endswith("; 1 are left out: 0")
    assert found["Jacobians"].detail.startswith("row 1 ")


def test_progress_counts_only_what_is_computed(tmp_path: Path) -> None:
    featurize(spoilt(), tmp_path / "s", on_bad_row="skip")
    seen: list[tuple[int, int, int]] = []
    featurize(good(), tmp_path / "s", retry_absent=True, progress=lambda p: seen.append((p.rows, p.computed, p.total)))
    group = gs.open(tmp_path / "s").manifest.group
    again = sum(len(range(start, min(start + group, N))) for start in {row // group * group for row in SPOILT})
    assert seen[0] == (N - again, 0, N)
    assert seen[-1] == (N, again, N)
    compared: list[tuple[int, int]] = []
    featurize(spoilt(), tmp_path / "t", on_bad_row="skip")
    featurize(spoilt(), tmp_path / "t", on_bad_row="skip", on_data_check=lambda *count: compared.append(count))
    assert compared[-1] == (N - 4, N - 4)


def test_annotations_of_a_project_bring_back_nothing_of_absent_rows(tmp_path: Path) -> None:
    """Labels and marks are taken over, but not of rows that were removed; one that cannot be read is passed over."""
    marks = np.arange(N) % 2 == 0
    given = {"split": "train", "proj_dim": K, "memory": "64MB", "on_bad_row": "skip"}
    broken = gs.Project(model=Net(), splits={"train": Files({9: ValueError("broken")})}, poisoned={"train": marks})
    gs.featurize(broken, out=tmp_path / "s", **given)  # type: ignore[arg-type]
    gs.remove(tmp_path / "s", [4, 5])
    now = gs.annotate_from_project(broken, tmp_path / "s")
    assert now.labels[[3, 4, 5, 6, 9]].tolist() == [0, -1, -1, 0, -1]
    assert now.poisoned is not None
    assert now.poisoned[[2, 4, 5, 6]].tolist() == [True, False, False, True]
    said: list[str] = []
    gs.featurize(broken, out=tmp_path / "s", on_note=said.append, **given)  # type: ignore[arg-type]
    assert said == ["absent, 3 of 120 rows: 4-5, 9; `gradstore info` says why"]
