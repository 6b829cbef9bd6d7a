"""F12: every stored row's input is compared before a store goes on; labels and marks may change: annotations."""

from __future__ import annotations

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
from gradstore.errors import MismatchError, ProjectError, UsageError
from gradstore.featurization import plan as planning
from gradstore.model.examples import input_digests, sample_rows

N = 300
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3
UNSAMPLED = [row for row in range(N) if row not in sample_rows(N)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.Plan, "_shard_rows", lambda self, schema, group: 64)


def project(x: Tensor = X, y: Tensor = Y, **more: Any) -> gs.Project:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
    data = TensorDataset(x, y)
    return gs.Project(model=model, splits={"train": data, "test": data}, **more)


def featurize(out: Path, made: gs.Project | None = None, **more: Any) -> Any:
    return gs.featurize(made or project(), split="train", out=out, proj_dim=32, **more)


def begun(out: Path, rows: int = 128) -> dict[str, bytes]:
    """A store that was stopped after some shards."""

    def stop(progress: Any) -> None:
        if progress.computed > rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        featurize(out, progress=stop, batch_size=16)
    return files(out)


def changed(rows: list[int]) -> Tensor:
    x = X.clone()
    x[rows] += 1
    return x


@pytest.mark.parametrize("rows", [[UNSAMPLED[0]], [UNSAMPLED[3], UNSAMPLED[30]], [r for r in UNSAMPLED if r < 128]])
@pytest.mark.parametrize("state", ["stopped", "finished", "to be appended to"])
def test_a_stored_row_whose_input_has_changed_is_found(
    rows: list[int], state: str, tmp_path: Path, record: Record
) -> None:
    out = tmp_path / "s"
    if state == "stopped":
        begun(out)
    else:
        n = N if state == "finished" else 200
        featurize(out, project(X[:n], Y[:n]))
    before = files(out)
    with pytest.raises(MismatchError, match=f"row {rows[0]} of split 'train' has other inputs") as error:
        featurize(out, project(changed(rows)))
    assert error.value.exit_code == 4
    assert f"{len(rows)} of " in str(error.value)
    assert files(out) == before
    control = "64 sampled rows compared: rows beside them change unnoticed"
    what = "another identity on resume, topk, forensics"
    record("F12", what, injected=1, recovered=0, refused=1, silent=0, control=control)


def test_with_sampled_rows_alone_the_change_goes_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control, and how it was: format 2 samples 64 rows."""
    from functools import partial

    monkeypatch.setattr(planning, "Schema", partial(planning.Schema, version=2))
    featurize(tmp_path / "s")
    featurize(tmp_path / "s", project(changed(UNSAMPLED)))
    with pytest.raises(MismatchError, match=r"data\.sampled rows"):
        featurize(tmp_path / "s", project(changed([0])))


def test_a_sample_of_rows_is_compared_and_a_note_says_what_it_misses(tmp_path: Path) -> None:
    notes: list[str] = []
    featurize(tmp_path / "s")
    featurize(tmp_path / "s", data_check="sample", on_note=notes.append)
    assert any(note.startswith("the inputs of 256 of 300 stored rows were compared") for note in notes)
    with pytest.raises(MismatchError, match="has other inputs"):
        featurize(tmp_path / "s", project(changed(list(range(N)))), data_check="sample")
    with pytest.raises(UsageError, match="--data-check"):
        featurize(tmp_path / "s", data_check="some")


def test_progress_of_the_comparison(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    featurize(tmp_path / "s")
    featurize(tmp_path / "s", on_data_check=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (N, N)
    assert seen == sorted(seen)


def test_a_digest_is_of_bytes_names_dtypes_and_shapes() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    digests = [d.tobytes() for d in input_digests(x)]
    assert len(set(digests)) == 3
    others = [x.double(), x.reshape(3, 2, 2), {"a": x}, {"b": x}, {"a": x, "b": x}, x.flip(0)[:, [1, 0, 2, 3]]]
    for other in others:
        assert not set(digests) & {d.tobytes() for d in input_digests(other)}  # type: ignore[arg-type]
    both = {"b": x, "a": x.int()}
    np.testing.assert_array_equal(input_digests(both), input_digests(dict(reversed(both.items()))))
    np.testing.assert_array_equal(input_digests(x)[1:], input_digests(x[1:]))


# -- annotations ---------------------------------------------------------------------------------------------------


def test_labels_and_marks_may_change_and_a_note_says_so(tmp_path: Path) -> None:
    notes: list[str] = []
    featurize(tmp_path / "s", project(poisoned={"train": [1, 2]}))
    before = files(tmp_path / "s")
    other = project(y=(Y + 1) % 3, poisoned={"train": [5]}, classes=["a", "b", "c"])
    store = featurize(tmp_path / "s", other, on_note=notes.append)
    assert files(tmp_path / "s") == before
    assert store.labels.tolist() == Y.tolist()
    assert store.poisoned.nonzero()[0].tolist() == [1, 2]
    assert any("300 stored rows have another label now, row 0 first" in note for note in notes)
    assert any("the project marks other rows as poisoned" in note for note in notes)
    store = gs.annotate_from_project(other, tmp_path / "s")
    assert files(tmp_path / "s") == before
    assert store.labels.tolist() == ((Y + 1) % 3).tolist()
    assert store.poisoned.nonzero()[0].tolist() == [5]
    assert store.classes == ("a", "b", "c")
    notes.clear()
    featurize(tmp_path / "s", other, on_note=notes.append)
    assert not notes


def test_annotations_of_another_split_or_of_changed_inputs_are_refused(tmp_path: Path) -> None:
    featurize(tmp_path / "s")
    with pytest.raises(MismatchError, match="has other inputs"):
        gs.annotate_from_project(project(changed([7])), tmp_path / "s")
    with pytest.raises(MismatchError, match="other rows than the store"):
        gs.annotate_from_project(project(X[:10], Y[:10]), tmp_path / "s")
    with pytest.raises(ProjectError, match="the label of row 4 is no class"):
        gs.annotate_from_project(project(y=Y.where(torch.arange(N) != 4, 99)), tmp_path / "s")
    begun(tmp_path / "half")
    with pytest.raises(UsageError, match="unfinished"):
        gs.annotate_from_project(project(), tmp_path / "half")


def test_appended_rows_bring_their_marks_and_labels(tmp_path: Path) -> None:
    featurize(tmp_path / "s", project(X[:100], Y[:100], poisoned={"train": [1]}))
    gs.annotate(tmp_path / "s", labels=[2] * 100)
    store = featurize(tmp_path / "s", project(poisoned={"train": [1, 150]}))
    assert store.labels.tolist() == [2] * 100 + Y[100:].tolist()
    assert store.poisoned.nonzero()[0].tolist() == [1, 150]


def test_a_query_store_with_marks_and_one_without_are_comparable(tmp_path: Path) -> None:
    train = featurize(tmp_path / "train")
    marked = featurize(tmp_path / "marked", project(X[:50], Y[:50], poisoned={"train": [3]}))
    plain = featurize(tmp_path / "plain", project(X[50:90], Y[50:90], classes=["x", "y", "z"]))
    both = gs.concat([marked, plain])
    np.testing.assert_array_equal(gs.topk(train, both, k=1).indices[:, 0], np.arange(90))
    assert both.poisoned is None
    assert gs.concat([marked, marked]).poisoned.sum() == 2  # type: ignore[union-attr]


def test_forensics_asks_the_annotations(tmp_path: Path) -> None:
    train = featurize(tmp_path / "s")
    assert train.poisoned is None
    found = gs.forensics(gs.annotate(tmp_path / "s", poisoned=np.arange(N) < 150), train, k=5)
    assert found.votes.max() > 0


def test_a_format_2_store_is_annotated_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    with monkeypatch.context() as patch:
        patch.setattr(planning, "Schema", partial(planning.Schema, version=2))
        featurize(tmp_path / "s")
    store = gs.annotate_from_project(project(y=(Y + 1) % 3, poisoned={"train": [9]}), tmp_path / "s")
    assert store.schema.version == 2
    assert store.labels[0] == 1
    assert store.poisoned.nonzero()[0].tolist() == [9]


def test_the_same_inputs_in_training_and_query_rows_are_found(tmp_path: Path) -> None:
    from gradstore.store.shared_inputs import shared_inputs

    train = featurize(tmp_path / "train", project(X[:100], Y[:100]))
    queries = featurize(tmp_path / "q", project(torch.cat([X[200:], X[40:43]]), torch.cat([Y[200:], Y[40:43]])))
    assert shared_inputs(train, queries).tolist() == [100, 101, 102]
    assert shared_inputs(queries, train).tolist() == [40, 41, 42]
    assert train.card()["inputs"] == "no two the same"
    twice = featurize(tmp_path / "twice", project(torch.cat([X[:9], X[:2]]), Y[:11]))
    assert twice.card()["inputs"] == "9 different ones of 11"
