"""Export and import: the arrays that other tools read and write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_store import N, write

import gradstore as gs
from gradstore.errors import CorruptError, MismatchError, NonFiniteError, NoSpaceError, UsageError
from gradstore.store.export import export
from gradstore.store.feature_store import FeatureStore
from gradstore.store.import_features import Provenance, import_features
from gradstore.store.verify import verify

TRAK = Provenance("trak", "resnet9 epoch 20", "rademacher", 0)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    write(tmp_path / "store")
    return FeatureStore(tmp_path / "store")


@pytest.mark.parametrize("memory", ["1kB", "1MB"])
def test_npy_holds_the_features(store: FeatureStore, memory: str, tmp_path: Path) -> None:
    path = export(store, tmp_path / "features.npy", memory=memory)
    np.testing.assert_array_equal(np.load(path, mmap_mode="r"), store.features[:])


def test_safetensors_holds_every_array(store: FeatureStore, tmp_path: Path) -> None:
    store = gs.annotate(store.path, poisoned=[3, 5])
    arrays = load_file(export(store, tmp_path / "all.safetensors"))
    np.testing.assert_array_equal(arrays["features"], store.features[:])
    for name in ("labels", "logits", "norms", "rows", "sq_norms", "poisoned"):
        np.testing.assert_array_equal(arrays[name], getattr(store, name))


def test_an_export_is_whole_or_absent(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "old.npy").write_text("old")
    shard = tmp_path / "store/shard-00001.h5"
    data = bytearray(shard.read_bytes())
    data[FeatureStore(store.path).manifest.shards[1].offsets["features"]] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptError, match="row 8 does not match its digest"):
        export(FeatureStore(store.path), tmp_path / "old.npy")
    assert (tmp_path / "old.npy").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.npy", "store"]
    with pytest.raises(UsageError, match=r"unknown format \(expected a name that ends in \.npy or \.safetensors\)"):
        export(store, tmp_path / "x.pt")
    assert NoSpaceError.exit_code == 7


@pytest.mark.parametrize("source_dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", [(40, 30), (40, 3, 30)])
@pytest.mark.parametrize("kind", ["npy", "raw"])
def test_memory_maps_become_stores(kind: str, shape: tuple[int, ...], source_dtype: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(source_dtype)
    source = tmp_path / "grads.mmap"
    if kind == "npy":
        mapped = np.lib.format.open_memmap(source, "w+", source_dtype, shape)
        mapped[:] = values
        mapped.flush()
        given: dict[str, object] = {}
    else:
        values.tofile(source)
        given = {"shape": shape, "source_dtype": source_dtype}
    labels = np.arange(40) % 3
    imported = import_features(source, tmp_path / "out", TRAK, labels=labels, dtype="float32", **given)  # type: ignore[arg-type]
    assert imported.shape == (40, 1 if len(shape) == 2 else 3, 30)
    np.testing.assert_array_equal(imported.features[:].reshape(shape), values.astype(np.float32))
    assert imported.identity["layout"] == ("sum" if len(shape) == 2 else "per-class")
    assert imported.labels.tolist() == labels.tolist()
    assert np.isnan(imported.sq_norms).all()
    assert verify(imported.path).ok
    result = gs.topk(imported, imported, 1, "proj-pntk")
    assert result.indices[:, 0].tolist() == list(range(40))


def test_imported_stores_do_not_mix(store: FeatureStore, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((N, 2, 12)).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    imported = import_features(tmp_path / "x.npy", tmp_path / "a", TRAK, classes=["a", "b"])
    with pytest.raises(MismatchError, match="imported"):
        gs.topk(store, imported)
    other = import_features(tmp_path / "x.npy", tmp_path / "b", Provenance("trak", "another model"), classes=["a", "b"])
    with pytest.raises(MismatchError, match=r"imported\.model"):
        gs.topk(imported, other)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_rows_that_a_tool_failed_to_write_are_refused(value: float, tmp_path: Path) -> None:
    values = np.ones((20, 8), np.float32)
    values[17] = value
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(NonFiniteError, match="the features of row 17, class 0 are zero or not finite"):
        import_features(tmp_path / "x.npy", tmp_path / "out", TRAK)


def test_what_is_no_memory_map_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "ints.npy", np.ones((3, 3), int))
    (tmp_path / "raw").write_bytes(bytes(100))
    for name, given in (("objects.npy", {}), ("ints.npy", {}), ("raw", {}), ("raw", {"shape": (5, 6)}), ("none", {})):
        with pytest.raises(UsageError, match="this is no array of features"):
            import_features(tmp_path / name, tmp_path / "out", TRAK, **given)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
