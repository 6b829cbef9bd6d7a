"""S12: mutated and forged Gram files are refused in one line, or hold what was written; none gives other values."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import Record
from mutations import mutated
from synthetic import clustered, write_store

import gradstore as gs
from gradstore.errors import CorruptError, GradstoreError, UnsafeError, UsageError
from gradstore.explain.surrogate.training_gram import TrainingGram
from gradstore.kernels.gram_file import write_tiles
from gradstore.kernels.gram_matrix import Gram, gram_at, open_gram, row_digests_of
from gradstore.kernels.gram_tiles import Tile
from gradstore.store.feature_store import FeatureStore

pytestmark = pytest.mark.soak

EARLIER = Path(__file__).parents[1] / "data/earlier"
NOTE = "is of an earlier version and has no digests, so damage to it is not noticed"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return write_store(tmp_path_factory.mktemp("s") / "train", clustered(24, 2, 12))


@pytest.fixture
def whole(store: FeatureStore, fast: Path) -> Gram:
    return gs.gram(store, out=fast / "gram.h5", arithmetic="float32")


def facts(gram: Gram) -> tuple[Any, ...]:
    return gram.shape, dict(gram.attributes), gram[:].tobytes()


def told(path: Path) -> tuple[Any, ...] | GradstoreError:
    """What a Gram file holds, or the one line in which it is refused."""
    try:
        return facts(open_gram(path))
    except GradstoreError as error:
        return error


def test_mutated_gram_files(whole: Gram, amount: Callable[[int, int], int], record: Record) -> None:
    rng, count, harmless, truth = np.random.default_rng(0), amount(40, 1000), 0, facts(whole)
    content = whole.path.read_bytes()
    for _ in range(count):
        whole.path.write_bytes(mutated(rng, content))
        found = told(whole.path)
        harmless += not isinstance(found, GradstoreError)
        assert found.exit_code in (2, 5, 9) if isinstance(found, GradstoreError) else found == truth
    control = "the highest bit of a value flipped in a file without digests: above 1e30, without an error"
    what = "mutated Gram files"
    record("S12", what, injected=count, recovered=harmless, refused=count - harmless, silent=0, control=control)


@pytest.mark.parametrize("dataset", ["gram", "digest"])
def test_every_flipped_byte_of_values_and_digests_is_found(whole: Gram, dataset: str, record: Record) -> None:
    content, start = whole.path.read_bytes(), whole.offsets[dataset]
    length = {"gram": 4 * 24 * 24, "digest": 16 * 24}[dataset]
    for at in range(start, start + length, 37):
        changed = bytearray(content)
        changed[at] ^= 1 << (at % 8)
        whole.path.write_bytes(changed)
        row = (at - start) * 24 // length
        with pytest.raises(CorruptError, match=f"row {row} of the Gram matrix does not match its digest"):
            whole[row]
        assert whole[(row + 1) % 24].shape == (24,), "the other rows are read"
    found = len(range(start, start + length, 37))
    control = "the highest bit of a value flipped in a file without digests: above 1e30, without an error"
    record("S12", "mutated Gram files", injected=found, recovered=0, refused=found, silent=0, control=control)


def test_what_a_flipped_bit_does_to_a_file_without_digests(fast: Path) -> None:
    """The control: an earlier version's file is read as it stands."""
    shutil.copy(EARLIER / "gram-v1.h5", fast / "gram.h5")
    gram = open_gram(fast / "gram.h5")
    content = bytearray(gram.path.read_bytes())
    content[gram.offsets["gram"] + 4 * 5 + 3] ^= 0x40  # the highest bit of the exponent
    gram.path.write_bytes(content)
    assert abs(open_gram(gram.path)[0, 5]) > 1e30


def test_an_earlier_file_is_read_with_one_note(fast: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FeatureStore(EARLIER / "train")
    shutil.copy(EARLIER / "gram-v1.h5", fast / "gram.h5")
    with caplog.at_level(logging.INFO, "gradstore"):
        gram = open_gram(fast / "gram.h5")
    assert caplog.messages == [f"{fast / 'gram.h5'} {NOTE}"]
    np.testing.assert_allclose(gram[:], gs.gram(store, out=fast / "new.h5", arithmetic="float32")[:], atol=1e-6)
    before = gram.path.stat()
    assert gs.gram(store, out=gram.path, arithmetic="float32") == gram, "it is the one that was asked for"
    assert gram.path.stat().st_mtime_ns == before.st_mtime_ns


def test_an_earlier_part_is_finished_as_it_was_begun(fast: Path) -> None:
    store = FeatureStore(EARLIER / "train")
    shutil.copy(EARLIER / "gram-v1.part", fast / ".gram.h5.part")
    done = gs.gram(store, kernel="proj-pntk", out=fast / "gram.h5", arithmetic="float32")
    assert done.attributes["version"] == 1
    assert open_gram(done.path) == done
    truth = gs.gram(store, kernel="proj-pntk", out=fast / "new.h5", arithmetic="float32")
    np.testing.assert_allclose(done[:], truth[:], atol=1e-6)


def replaced(**options: Any) -> Callable[[h5py.File], None]:
    def build(file: h5py.File) -> None:
        values = file["gram"][:]
        del file["gram"]
        file.create_dataset("gram", **{"data": values, **options})

    return build


def external(file: h5py.File) -> None:
    del file["gram"]
    file.create_dataset("gram", (24, 24), "f4", external=[("/etc/passwd", 0, 4 * 24 * 24)])


def virtual(file: h5py.File) -> None:
    del file["gram"]
    layout = h5py.VirtualLayout((24, 24), "f4")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "x", (24, 24))
    file.create_virtual_dataset("gram", layout)


def linked(target: Any) -> Callable[[h5py.File], None]:
    def build(file: h5py.File) -> None:
        del file["gram"]
        file["gram"] = target

    return build


UNSAFE: dict[str, Callable[[h5py.File], Any]] = {
    "external storage": external,
    "virtual dataset": virtual,
    "external link": linked(h5py.ExternalLink("/etc/other.h5", "/x")),
    "soft link": linked(h5py.SoftLink("/finished")),
    "gzip": replaced(compression="gzip"),
    "chunked": replaced(chunks=(8, 8)),
    "compound type": replaced(data=np.zeros((24, 24), [("a", "f4")])),
    "a group": lambda file: file.create_group("more"),
    "a reference attribute": lambda file: file.attrs.__setitem__("more", file["gram"].ref),
    "text of any length": lambda file: file.attrs.__setitem__("kernel", "proj-trntk"),
    "a list": lambda file: file.attrs.__setitem__("symmetric", [1, 1]),
}
WRONG: dict[str, Callable[[h5py.File], Any]] = {
    "another shape": replaced(data=np.zeros((24, 23), "f4")),
    "another type": replaced(data=np.zeros((24, 24), "f2")),
    "big-endian": replaced(data=np.zeros((24, 24), ">f4")),
    "one axis": replaced(data=np.zeros(24, "f4")),
    "no marks": lambda file: file.__delitem__("finished"),
    "no digests": lambda file: file.__delitem__("digest"),
    "another dataset": lambda file: file.create_dataset("more", data=[1]),
    "another kernel": lambda file: file.attrs.__setitem__("kernel", np.bytes_(b"proj-pntk")),
    "another split": lambda file: file.attrs.__setitem__("split_b", np.bytes_(b"test")),
    "another fingerprint": lambda file: file.attrs.__setitem__("fingerprint", np.bytes_(b"0" * 32)),
    "no data": lambda file: file.attrs.__delitem__("data_a"),
    "a number for text": lambda file: file.attrs.__setitem__("data_a", np.int64(3)),
    "the first version": lambda file: file.attrs.__setitem__("version", np.int64(1)),
    "not symmetric": lambda file: file.attrs.__setitem__("symmetric", np.int64(0)),
    "symmetric seven": lambda file: file.attrs.__setitem__("symmetric", np.int64(7)),
}


@pytest.mark.parametrize("name", [*UNSAFE, *WRONG])
def test_forged_headers_are_refused(name: str, whole: Gram, record: Record) -> None:
    with h5py.File(whole.path, "r+", libver=("v110", "v110")) as file:
        {**UNSAFE, **WRONG}[name](file)
    with pytest.raises(UnsafeError if name in UNSAFE else CorruptError) as error:
        open_gram(whole.path)
    assert "\n" not in error.value.line
    control = "HDF5 alone: external storage returns another file's bytes"
    record("S12", "forged Gram headers", injected=1, recovered=0, refused=1, silent=0, control=control)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused(make: Callable[[Path], object], fast: Path) -> None:
    make(fast / "gram.h5")
    with pytest.raises(UsageError, match="there is no Gram matrix"):
        open_gram(fast / "gram.h5")


def test_a_row_of_another_place_or_matrix_does_not_match(whole: Gram) -> None:
    values = whole[:2]
    mine = row_digests_of(whole.shape, whole.attributes, 0, values)
    assert (row_digests_of(whole.shape, whole.attributes, 1, values) != mine).any(axis=1).all()
    for other in ({**whole.attributes, "kernel": "proj-pntk"}, {**whole.attributes, "split_a": "test"}):
        assert (row_digests_of(whole.shape, other, 0, values) != mine).any(axis=1).all()
    np.testing.assert_array_equal(row_digests_of(whole.shape, whole.attributes, 1, values[1:]), mine[1:])


KEYS: list[Any] = [
    *(3, -1, slice(None), slice(2, 9), slice(20, 3, -4), slice(0, 0), [5, 2, 5], np.arange(24) % 3 == 0, ...),
    *((3, 4), (slice(2, 5), 7), (slice(None), slice(None, None, 2)), ([3, 1], slice(4, 6)), (2, [1, 0]), (-2, -3)),
    *((slice(None), [4, 4]), (..., 3), (3, ...), (np.int64(3), slice(2, None)), (slice(None), slice(None))),
]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_it_is_indexed_as_an_array(key: Any, whole: Gram, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = whole[:]
    monkeypatch.setattr("gradstore.kernels.gram_matrix._PIECE_BYTES", 300)
    np.testing.assert_array_equal(whole[key], truth[key])
    assert whole[key].shape == truth[key].shape
    assert whole[key].dtype == truth.dtype


@pytest.mark.parametrize("key", [24, (0, 24), [24], (0, 0, 0), None, ([1], [2])], ids=str)
def test_an_index_that_is_none_is_an_index_error(key: Any, whole: Gram) -> None:
    with pytest.raises(IndexError):
        whole[key]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_digests_do_not_depend_on_the_cut(dtype: str, fast: Path) -> None:
    values = np.random.default_rng(0).standard_normal((40, 70)).astype(dtype)
    said = dict.fromkeys(("kernel", "formula", "split_a", "split_b", "data_a", "data_b"), "x") | {"symmetric": 0}
    files = []
    for step in (16, 32, 70):
        tiles = [Tile(a, b, values[a : a + step, b : b + step]) for a in range(0, 40, step) for b in range(0, 70, step)]
        made = write_tiles(fast / f"{step}.h5", (40, 70), said, lambda known, tiles=tiles: iter(tiles), dtype=dtype)
        np.testing.assert_array_equal(open_gram(made.path)[:], values)
        assert gram_at(made.path, (40, 70), dtype, said, 2) == open_gram(made.path)
        files.append(made.path.read_bytes())
    assert files[0] == files[1] == files[2]


def test_a_fit_compares_digests_the_first_time(whole: Gram, store: FeatureStore) -> None:
    rows = TrainingGram(whole, 1 << 20)
    first = rows.rows(np.arange(8))
    content = bytearray(whole.path.read_bytes())
    content[whole.offsets["gram"] + 4 * 24 * 10] ^= 1
    whole.path.write_bytes(content)
    np.testing.assert_array_equal(rows.rows(np.arange(8)), first)
    with pytest.raises(CorruptError, match="row 10 of the Gram matrix does not match its digest"):
        rows.rows(np.arange(8, 12))
    with pytest.raises(CorruptError, match="row 10 of the Gram matrix does not match its digest"):
        gs.KernelGLM("precomputed", "sgd").fit(open_gram(whole.path), store.labels)
