"""Annotations: what is said of rows is whole, under a digest, of this store, and changes no feature."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_store import N, files, write

import gradstore as gs
from gradstore.errors import CorruptError, GradstoreError, LockedError, UsageError
from gradstore.store.annotation_table import read_annotation_table
from gradstore.store.annotations import ANNOTATIONS
from gradstore.store.feature_store import FeatureStore
from gradstore.store.store_writer import open_for_repair
from gradstore.store.verify import verify


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    write(tmp_path / "store")
    return FeatureStore(tmp_path / "store")


def test_what_is_given_changes_and_what_is_not_stays(store: FeatureStore) -> None:
    before = files(store.path)
    labels = np.ones(N, np.int64)
    now = gs.annotate(store.path, labels=labels, note="by hand")
    assert now.labels.tolist() == [1] * N
    assert now.poisoned is None
    assert now.classes == ("a", "b")
    now = gs.annotate(store.path, poisoned=[2, 5])
    assert now.labels.tolist() == [1] * N
    assert now.poisoned.nonzero()[0].tolist() == [2, 5]
    now = gs.annotate(store.path, classes=["cat", "dog"])
    assert now.classes == ("cat", "dog")
    assert now.annotations.note == "by hand"
    assert [what for _, what in now.annotations.history] == ["11 labels, note", "2 poison marks", "names of classes"]
    assert files(store.path) == before
    assert now.fingerprint == store.fingerprint
    assert verify(store.path).ok


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "nothing to annotate"),
    ({"labels": [0] * (N - 1)}, "labels of other rows"),
    ({"labels": [0] * (N - 1) + [7]}, "the label of row 21 is no class"),
    ({"labels": [0] * (N - 1) + [-2]}, "the label of row 21 is no class"),
    ({"labels": [0.5] * N}, "labels are no indices of classes"),
    ({"poisoned": [N]}, "no such row"),
    ({"poisoned": np.ones(3, bool)}, "the mask is for another number of rows"),
    ({"classes": ["a"]}, "class names do not match"),
    ({"classes": ["a", "b" * 5000]}, "a name cannot be stored"),
    ({"classes": ["a", "\ud800"]}, "a name cannot be stored"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str, store: FeatureStore) -> None:
    with pytest.raises(UsageError, match=message):
        gs.annotate(store.path, **given)
    assert not (store.path / ANNOTATIONS).exists()


def test_a_flipped_bit_anywhere_is_found(store: FeatureStore) -> None:
    gs.annotate(store.path, labels=[1] * N, poisoned=[1], classes=["x", "y"], note="n")
    file = store.path / ANNOTATIONS
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.choice(len(data), 200, replace=False):
        broken = bytearray(data)
        broken[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(broken)
        with pytest.raises(CorruptError) as error:
            FeatureStore(store.path).labels  # noqa: B018
        assert error.value.exit_code == 5


def test_annotations_of_another_store_a_pipe_and_a_link_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    from small_store import fill, plan

    from gradstore.store.store_writer import open_writer

    with open_writer(tmp_path / "other", plan(seed=1)) as writer:
        fill(writer)
    gs.annotate(tmp_path / "other", poisoned=[1])
    (store.path / ANNOTATIONS).write_bytes((tmp_path / "other" / ANNOTATIONS).read_bytes())
    with pytest.raises(CorruptError, match="annotations of another store"):
        FeatureStore(store.path).poisoned  # noqa: B018
    (store.path / ANNOTATIONS).unlink()
    os.mkfifo(store.path / ANNOTATIONS)
    with pytest.raises(GradstoreError):
        FeatureStore(store.path).labels  # noqa: B018
    (store.path / ANNOTATIONS).unlink()
    (store.path / ANNOTATIONS).symlink_to("/dev/zero")
    with pytest.raises(GradstoreError):
        FeatureStore(store.path).labels  # noqa: B018


def test_two_cannot_annotate_at_once(store: FeatureStore) -> None:
    with open_for_repair(store.path), pytest.raises(LockedError):
        gs.annotate(store.path, note="x")


def test_a_table_says_some_rows(store: FeatureStore, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("row,label,poisoned\n3,b,1\n4,0,no\n21,-1,\n")
    found = read_annotation_table(table, store)
    now = gs.annotate(store.path, **found)
    assert now.labels[[3, 4, 21]].tolist() == [1, 0, -1]
    assert now.poisoned.nonzero()[0].tolist() == [3]
    others = [i for i in range(N) if i not in (3, 4, 21)]
    assert now.labels[others].tolist() == store.labels[others].tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "unknown columns"),
        ("row\n1\n", "unknown columns"),
        ("row,label\n99,0\n", "line 2 cannot be read"),
        ("row,label\n1,zebra\n", "line 2 cannot be read"),
        ("row,label\n1,9\n", "line 2 cannot be read"),
        ("row,poisoned\n1,1\n2,perhaps\n", "line 3 cannot be read"),
        ('row,label\n1,"0\n', "cannot be read|no CSV"),
        ("row,label\n1\n", "line 2 cannot be read .got 1 cells under 2 columns"),
        ("row,label,poisoned\n1,0,1\n2,1", "line 3 cannot be read .got 2 cells under 3 columns"),  # cut short
        ("row,poisoned\n1,0,1\n", "line 2 cannot be read .got 3 cells under 2 columns"),
        ("row,label,label\n1,0,1\n", "unknown columns"),
        ("row,label\n1_0,0\n", "line 2 cannot be read .got '1_0' is no whole number"),
        ("row,label\n٣,0\n", "line 2 cannot be read .got '٣' is no whole number"),
        ('row,label\n1,"0\n1"\n', "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_read_names_its_line(
    text: str, message: str, store: FeatureStore, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_annotation_table(tmp_path / "t.csv", store)
