"""Stores that earlier releases wrote stay readable: each format version keeps a small one in `tests/data/archives`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
from small_store import N, files, write, wrong_rows

from gradstore.featurization.settings import Settings
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.disk import Disk
from gradstore.store.files.manifest_file import read_manifest
from gradstore.store.identity import fingerprint_of
from gradstore.store.schema import VERSIONS
from gradstore.store.verify import verify

pytestmark = pytest.mark.numerical

ARCHIVES = sorted((Path(__file__).parents[1] / "data/archives").iterdir())


def test_every_version_has_an_archive() -> None:
    assert [path.name for path in ARCHIVES] == [f"v{version}" for version in VERSIONS]


@pytest.mark.parametrize("path", ARCHIVES, ids=lambda path: path.name)
def test_an_archive_reads_as_it_was_written(path: Path) -> None:
    store = FeatureStore(path)
    assert len(store) == N
    assert wrong_rows(store) == []
    assert verify(path).ok


@pytest.mark.parametrize("path", ARCHIVES, ids=lambda path: path.name)
def test_its_manifest_and_fingerprint_are_the_same_bytes(path: Path) -> None:
    manifest = read_manifest(path, Disk())
    assert manifest.to_bytes() == (path / "store.json").read_bytes()
    assert manifest.fingerprint == fingerprint_of(manifest.identity) == "59f7e1f202ef5968cf75bc40c7c9625c"
    settings = Settings.of(manifest.identity).identity()
    assert {
        **manifest.identity,
        **settings,
        "projection": {**settings["projection"], "version": 1},
    } == manifest.identity


@pytest.mark.parametrize("path", ARCHIVES[-1:], ids=lambda path: path.name)
def test_the_current_version_is_still_written_so(path: Path, tmp_path: Path) -> None:
    write(tmp_path / "store")
    now, then = (read_manifest(folder, Disk()) for folder in (tmp_path / "store", path))
    assert now.schema == then.schema
    for index in range(now.shard_count):
        name = now.file_of(index)
        with h5py.File(tmp_path / "store" / name) as a, h5py.File(path / name) as b:
            assert list(a) == list(b)
            assert {k: str(v) for k, v in a.attrs.items()} == {k: str(v) for k, v in b.attrs.items()}
            for column in a:
                np.testing.assert_array_equal(a[column][:], b[column][:])
                assert dict(a[column].attrs) == dict(b[column].attrs)
    if h5py.version.hdf5_version_tuple[:2] == (2, 0):
        assert files(tmp_path / "store") == files(path)


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="h5dump is not installed")
def test_any_hdf5_tool_reads_a_shard(tmp_path: Path) -> None:
    write(tmp_path / "store")
    shard = tmp_path / "store/shard-00000.h5"
    done = subprocess.run(["h5dump", "-d", "/row", str(shard)], capture_output=True, text=True, check=True)
    assert "(0): 0, 1, 2, 3, 4, 5, 6, 7" in done.stdout
    listed = subprocess.run(["h5ls", str(shard)], capture_output=True, text=True, check=True).stdout
    columns = read_manifest(shard.parent, Disk()).schema.columns
    assert [line.split()[0] for line in listed.splitlines()] == sorted(column.name for column in columns)
