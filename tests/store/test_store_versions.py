"""Format versions beside one another: old stores go on as they began, and mean the same rows as new ones."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
from blake3 import blake3
from small_store import GROUP, N, columns, data, files, plan, row, write
from synthetic import clustered, write_store
from test_store_growth import project

import gradstore as gs
from gradstore.errors import CorruptError
from gradstore.featurization import plan as planning
from gradstore.store.feature_store import FeatureStore
from gradstore.store.store_writer import open_writer
from gradstore.store.verify import verify

pytestmark = pytest.mark.numerical

ARCHIVES = Path(__file__).parents[1] / "data/archives"


def begin(path: Path, version: int, n: int = N) -> None:
    """The store of a format version with its first shard only."""
    planned = plan(n)
    schema = replace(planned.schema, version=version, truth=version < 3)
    identity = {**planned.identity, "data": data(schema, n)}
    with open_writer(path, replace(planned, schema=schema, identity=identity)) as writer:
        rows = writer.manifest.rows_of(0)
        with writer.shard(0) as shard:
            for start in range(rows.start, rows.stop, GROUP):
                shard.write(columns(range(start, min(start + GROUP, rows.stop))))


@pytest.mark.parametrize(("version", "hashed"), [(1, hashlib.sha256), (2, blake3), (3, blake3)])
def test_a_digest_is_the_hash_of_the_row(version: int, hashed: object, tmp_path: Path) -> None:
    begin(tmp_path / "store", version)
    store = FeatureStore(tmp_path / "store")
    with h5py.File(tmp_path / "store/shard-00000.h5") as file:
        assert file.attrs["version"] == version
        for i in range(8):
            names = [column.name for column in store.schema.columns if column.name != "digest"]
            content = b"".join(row(i)[name].tobytes() for name in names)
            assert file["digest"][i].tobytes() == hashed(content).digest()[:16]  # type: ignore[operator]
    norms = np.stack([row(i)["norm"] for i in range(8)]).tobytes()
    assert store.manifest.shards[0].columns["norm"] == hashed(norms).hexdigest()  # type: ignore[operator]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_store_is_continued_appended_to_and_repaired_in_its_own_version(version: int, tmp_path: Path) -> None:
    path = tmp_path / "store"
    begin(path, version, n=12)
    write(path, n=12)
    write(path, n=N)
    assert FeatureStore(path).schema.version == version
    assert h5py.version.hdf5_version_tuple[:2] != (2, 0) or files(path) == files(ARCHIVES / f"v{version}")
    whole = files(path)
    shard = path / "shard-00001.h5"
    content = bytearray(shard.read_bytes())
    content[FeatureStore(path).manifest.shards[1].offsets["features"]] ^= 1
    shard.write_bytes(content)
    assert verify(path, repair=True).damaged_rows == (8,)
    write(path)
    assert files(path) == whole


def test_rows_of_both_versions_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.Plan, "_shard_rows", lambda self, schema, group: 32)
    with monkeypatch.context() as hidden:
        hidden.setattr(planning, "Schema", partial(planning.Schema, version=1))
        old = gs.featurize(project(), split="train", out=tmp_path / "old", proj_dim=64)
    new = gs.featurize(project(40), split="train", out=tmp_path / "new", proj_dim=64)
    assert (old.schema.version, new.schema.version) == (1, 3)
    assert old.fingerprint == new.fingerprint
    again = gs.featurize(project(), split="train", out=tmp_path / "again", proj_dim=64)
    mixed, plain = gs.topk(old, new, k=3), gs.topk(again, new, k=3)
    assert (mixed.indices.tolist(), mixed.similarity.tolist()) == (plain.indices.tolist(), plain.similarity.tolist())
    grown = gs.featurize(project(), split="train", out=tmp_path / "grown", proj_dim=96, grow_from=tmp_path / "old")
    whole = gs.featurize(project(), split="train", out=tmp_path / "whole", proj_dim=96)
    assert files(grown.path) == files(whole.path)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_scattered_rows_are_those_that_are_read_and_each_is_checked(dtype: str, tmp_path: Path) -> None:
    store = write_store(tmp_path / "a", clustered(50, 2, 30), dtype=dtype, shard_rows=20)
    rows = np.array([0, 3, 4, 5, 19, 20, 41, 49])
    found = store.gather(rows, store.schema.empty(11))
    whole = store.read(0, 50)
    for name, column in found.items():
        np.testing.assert_array_equal(column, whole[name][rows], err_msg=name)
    assert len(store.gather(rows[:0], store.schema.empty(1))["row"]) == 0
    file = store.shard_file(1)
    for name in ("features", "scale", "norm", "label"):
        good = file.path.read_bytes()
        at = file.shard.offsets[name] + store.schema.column(name).row_bytes  # of row 21
        file.path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        store.gather(rows, store.schema.empty(8))
        with pytest.raises(CorruptError, match=r"row 21 does not match its digest .*1 damaged of 3 rows read"):
            store.gather(np.array([3, 20, 21, 39]), store.schema.empty(4))
        file.path.write_bytes(good)


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_streamed_rows_are_those_that_are_read_and_each_is_checked(piece: int, tmp_path: Path) -> None:
    store = write_store(tmp_path / "a", clustered(50, 2, 30), shard_rows=20)
    columns, room = store.schema.empty(46, features=False), np.empty((piece, 2, 30), np.float16)
    whole, seen = store.read(3, 49), []
    for first, features in store.stream(3, 49, columns, room):
        at = slice(first - 3, first - 3 + len(features))
        np.testing.assert_array_equal(features, whole["features"][at])
        for name, column in columns.items():
            np.testing.assert_array_equal(column[at], whole[name][at], err_msg=name)
        seen += range(first, first + len(features))
    assert seen == list(range(3, 49))
    file = store.shard_file(1)
    for name in ("features", "scale", "norm", "label"):
        good = file.path.read_bytes()
        at = file.shard.offsets[name] + store.schema.column(name).row_bytes  # of row 21
        file.path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(CorruptError, match="row 21 does not match its digest"):
            list(store.stream(3, 49, columns, room))
        file.path.write_bytes(good)
