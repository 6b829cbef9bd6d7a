"""Forensics against a case worked by hand: who votes, who is flagged, and how precision and recall are counted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from synthetic import write_store

import gradstore as gs
from gradstore.errors import UsageError
from gradstore.explain.forensics import wilson
from gradstore.store.feature_store import FeatureStore
from gradstore.store.row_list import read_row_list

TRAIN = (0, 1, 2, 3, 4, 60, 61, 62, 63, 64)
POISONED = (0, 2, 3, 60, 64)  # three of the first five directions, two of the last
QUERIES = (2, 62, 3, 61)
TRUTH = (True, True, False, False)


def at(degrees: tuple[int, ...]) -> np.ndarray:
    """Features of one class and two dimensions that point in these directions, whose cosines follow the angles."""
    angle = np.deg2rad(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)[:, None]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, FeatureStore]:
    folder = tmp_path_factory.mktemp("stores")
    mask = np.isin(TRAIN, POISONED)
    return (
        write_store(folder / "train", at(TRAIN), dtype="float32", poisoned=mask),
        write_store(folder / "test", at(QUERIES), dtype="float32", poisoned=np.array(TRUTH)),
    )


def test_flags_follow_from_the_votes(stores: tuple) -> None:
    found = gs.forensics(*stores)
    assert found.votes.tolist() == [3, 2, 3, 2]
    assert found.flagged.tolist() == [True, False, True, False]
    assert gs.forensics(*stores, votes=2).flagged.all()
    # of three neighbours, 1, 2, 3 vote for the query at 2, and 2, 3, 4 for that at 3
    assert gs.forensics(*stores, k=3, votes=2).votes.tolist() == [2, 0, 2, 1]


def test_precision_and_recall_are_counted(stores: tuple) -> None:
    """One flagged rightly, one wrongly, one missed: 1/2 and 1/2."""
    found = gs.forensics(*stores).confusion
    assert (found.tp, found.fp, found.fn, found.tn) == (1, 1, 1, 1)
    assert (found.precision.value, found.recall.value) == (0.5, 0.5)


def test_intervals_are_wilsons() -> None:
    """8 of 10: (0.8 + z²/20 ± z √(0.016 + z²/400)) / (1 + z²/10), with z = 1.96."""
    found = wilson(8, 10)
    assert (round(found.low, 4), round(found.high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 0) is None


def test_a_mask_given_takes_the_place_of_the_stores(stores: tuple) -> None:
    assert gs.forensics(*stores, poisoned=np.zeros(10, bool)).votes.tolist() == [0, 0, 0, 0]
    assert gs.forensics(*stores, poisoned=[5, 6, 7]).votes.tolist() == [0, 3, 0, 3]
    with pytest.raises(UsageError, match="votes cannot be reached"):
        gs.forensics(*stores, votes=6)


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


LISTS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "directory": os.mkdir,
    "huge": huge,
    "bytes that are no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "text in rows": lambda path: path.write_text("one\ntwo"),
    "archive": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "empty archive": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("suffix", [".txt", ".npy"])
@pytest.mark.parametrize("kind", LISTS)
def test_what_is_no_list_of_poisoned_rows_is_refused(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"poisoned{suffix}"
    LISTS[kind](path)
    with pytest.raises(UsageError, match="not a list of poisoned rows") as error:
        read_row_list(path, 10, what="poisoned rows")
    assert "\n" not in error.value.line
