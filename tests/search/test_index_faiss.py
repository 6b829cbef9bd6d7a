"""FAISS as a source of candidates: exact re-ranking, measured recall, files that are checked before they are read."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import clustered, write_store

import gradstore as gs
from gradstore.errors import UsageError
from gradstore.search.index import faiss_index
from gradstore.search.session import Session
from gradstore.store.feature_store import FeatureStore

pytest.importorskip("faiss")
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, FeatureStore]:
    path = tmp_path_factory.mktemp("stores")
    train = write_store(path / "train", clustered(900, 2, 128), shard_rows=300)
    return train, write_store(path / "test", clustered(20, 2, 128, seed=1))


@pytest.mark.parametrize(
    ("factory", "space", "least"),
    [
        ("Flat", "sketch", 0.99),
        ("IVF8,Flat", "sketch", 0.3),
        ("HNSW16", "sketch", 0.9),
        ("RaBitQ", "full", 0.9),
        ("Flat", "full", 1),
    ],
)
@pytest.mark.parametrize("kernel", ["proj-trntk", "proj-pntk"])
def test_candidates_are_scored_again_from_the_store(
    stores: tuple, factory: str, space: str, least: float, kernel: str
) -> None:
    train, queries = stores
    session = Session(train, kernel, faiss=factory, on=space)
    found, truth = session.topk(queries, 10, mode="approx"), gs.topk(train, queries, 10, kernel)
    every = gs.topk(train, queries, len(train), kernel)
    for q in range(20):
        exact = dict(zip(every.indices[q].tolist(), every.similarity[q].tolist(), strict=True))
        assert [exact[i] for i in found.indices[q].tolist()] == found.similarity[q].tolist()
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(truth.indices, found.indices, strict=True)])
    assert recall >= least
    assert abs(found.search.recall - recall) < 0.3
    assert found.search.engine == f"{factory} on the {'sketch' if space == 'sketch' else 'full features'}"


def test_fewer_answers_than_k_are_made_up_from_the_sketch(stores: tuple) -> None:
    train, queries = stores
    found = Session(train, faiss="IVF100,Flat").topk(queries, 60, mode="approx")
    assert (found.indices >= 0).all()
    assert all(len(set(row)) == 60 for row in found.indices.tolist())


def test_a_file_is_opened_again_and_built_again_when_damaged(tmp_path: Path) -> None:
    train = write_store(tmp_path / "t", clustered(300, 2, 64))
    assert Session(train, faiss="Flat").faiss.event == "built: there is none yet"
    assert Session(FeatureStore(train.path), faiss="Flat").faiss.event == "opened"
    (file,) = train.path.glob("*.faiss")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert Session(train, faiss="Flat").faiss.event == "built: it is damaged"
    file.with_suffix(".json").write_text("{}")
    assert Session(train, faiss="Flat").faiss.event == "built: this user has not written it here"


def test_it_is_extended_with_its_store(tmp_path: Path) -> None:
    features = clustered(400, 2, 64)
    small = write_store(tmp_path / "a", features[:250], shard_rows=50)
    Session(small, faiss="Flat")
    grown = write_store(tmp_path / "b", features, shard_rows=50)
    for file in small.path.glob("index-*"):
        (grown.path / file.name).write_bytes(file.read_bytes())
    session = Session(grown, faiss="Flat")
    assert session.faiss.event == "extended by 150 rows"
    assert session.faiss.index.ntotal == 400


def test_what_faiss_refuses_is_one_line(stores: tuple) -> None:
    with pytest.raises(UsageError, match=r"--faiss: FAISS refuses this index .*'Nonsense'"):
        Session(stores[0], faiss="Nonsense")
    with pytest.raises(UsageError, match="--on: unknown space"):
        Session(stores[0], faiss="Flat", on="moon")


def test_the_kind_that_is_silently_wrong_is_refused(tmp_path: Path) -> None:
    train = write_store(tmp_path / "t", clustered(40, 2, 2048))
    with pytest.raises(UsageError, match="returns wrong neighbours at so many dimensions"):
        Session(train, faiss="RaBitQfs", on="full")


def test_missing_and_doubled_wheels_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_index, "version", lambda name: "1.0")
    with pytest.raises(UsageError, match="both installed, and each overwrites files of the other"):
        faiss_index.require_faiss()
    monkeypatch.undo()
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"FAISS is not installed\. Run `pip install gradstore\[cpu\]`"):
        faiss_index.require_faiss()
