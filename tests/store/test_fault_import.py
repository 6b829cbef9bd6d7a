"""S14: hostile imports are right or refused in one line; no label, logit or feature becomes another."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Record
from mutations import mutated

from gradstore.errors import CorruptError, GradstoreError, UsageError
from gradstore.store import import_features as module
from gradstore.store.array_file import ArrayFile, open_array, read_array
from gradstore.store.feature_store import FeatureStore
from gradstore.store.import_features import Provenance, import_features

pytestmark = pytest.mark.soak

TRAK = Provenance("trak", "resnet9")
N, C, K = 40, 3, 8
VALUES = np.random.default_rng(0).standard_normal((N, C, K)).astype(np.float32)
LABELS = np.arange(N) % C
CONTROL = "np.asarray(labels, int64): 0.9 is 0, NaN is -2**63, and a complex number loses its imaginary part"


def imported(folder: Path, values: np.ndarray = VALUES, **given: Any) -> FeatureStore:
    np.save(folder / "x.npy", values)
    return import_features(folder / "x.npy", folder / "out", TRAK, **{"dtype": "float32", **given})


def with_label(value: Any, row: int = 5) -> np.ndarray:
    labels = LABELS.astype(type(value) if not isinstance(value, int) else np.int64)
    labels[row] = value
    return labels


def masked(array: np.ndarray) -> np.ma.MaskedArray:
    return np.ma.array(array, mask=np.arange(array.size).reshape(array.shape) % 7 == 0)


BAD_LABELS: dict[str, tuple[Any, str]] = {
    "halves": (with_label(0.9), "labels are no indices of classes .*got 0.9"),
    "NaN": (with_label(np.nan), "labels are no indices of classes .*got nan"),
    "infinite": (with_label(np.inf), "labels are no indices of classes .*got inf"),
    "complex": (with_label(1 + 2j), "labels are no indices of classes"),
    "-7": (with_label(-7), "the label of row 5 is no class .*got -7"),
    "99": (with_label(99), "the label of row 5 is no class .*got 99"),
    "one too many": (with_label(C, row=39), "the label of row 39 is no class .*a class below 3.*got 3"),
    "too large for int64": (np.full(N, 2**64 - 1, np.uint64), "labels are no indices of classes"),
    "text": (np.full(N, "cat"), "labels are no indices of classes"),
    "objects": (np.array([{}] * N, object), "labels are no indices of classes"),
    "structured": (np.zeros(N, [("a", "i8")]), "labels are no indices of classes"),
    "dates": (np.zeros(N, "M8[s]"), "labels are no indices of classes"),
    "masked": (masked(LABELS), "labels are masked"),
    "0-d": (np.array(1), "labels or logits do not fit"),
    "a table": (LABELS[:, None], "labels or logits do not fit"),
    "too few": (LABELS[:-1], "labels or logits do not fit"),
    "ragged": ([[1], [1, 2]], "labels are no indices of classes"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_labels_that_are_no_classes_are_refused(name: str, fast: Path, record: Record) -> None:
    labels, message = BAD_LABELS[name]
    with pytest.raises(UsageError, match=message) as error:
        imported(fast, labels=labels)
    assert "\n" not in error.value.line
    assert not (fast / "out").exists()
    record("S14", "hostile imports", injected=1, recovered=0, refused=1, silent=0, control=CONTROL)


GOOD_LABELS: dict[str, Any] = {
    "int8": LABELS.astype(np.int8),
    "uint64": LABELS.astype(np.uint64),
    "big-endian": LABELS.astype(">i4"),
    "whole floats": LABELS.astype(np.float32),
    "a tensor": torch.from_numpy(LABELS),
    "a list": LABELS.tolist(),
    "every second of more": np.repeat(LABELS, 2)[::2],
    "unaligned": np.frombuffer(b"x" + LABELS.astype("<i8").tobytes(), "u1")[1:].view("<i8"),
    "some missing": np.where(LABELS == 1, -1, LABELS),
}


@pytest.mark.parametrize("name", GOOD_LABELS)
def test_labels_of_any_dtype_are_the_same(name: str, fast: Path, record: Record) -> None:
    expected = np.where(LABELS == 1, -1, LABELS) if name == "some missing" else LABELS
    np.testing.assert_array_equal(imported(fast, labels=GOOD_LABELS[name]).labels, expected)
    record("S14", "hostile imports", injected=1, recovered=1, refused=0, silent=0, control=CONTROL)


def with_logit(value: float) -> np.ndarray:
    logits = np.ones((N, C))
    logits[7, 1] = value
    return logits


BAD_LOGITS: dict[str, tuple[Any, str]] = {
    "complex": (np.ones((N, C)) * 1j, "these are no logits"),
    "objects": (np.array([[{}] * C] * N, object), "these are no logits"),
    "text": (np.full((N, C), "1"), "these are no logits"),
    "structured": (np.zeros((N, C), [("a", "f4")]), "these are no logits"),
    "masked": (masked(np.ones((N, C))), "these are no logits .*masked float64"),
    "one axis": (np.ones(N), "these are no logits"),
    "0-d": (np.array(1.0), "these are no logits"),
    "one NaN": (with_logit(np.nan), "the logits of row 7 are not finite"),
    "infinite": (with_logit(-np.inf), "the logits of row 7 are not finite"),
    "too large for float32": (with_logit(1e300), "the logits of row 7 are not finite"),
    "another number of classes": (np.ones((N, C + 1)), "labels or logits do not fit"),
    "another number of rows": (np.ones((N + 1, C)), "labels or logits do not fit"),
}


@pytest.mark.parametrize("name", BAD_LOGITS)
def test_logits_that_are_none_are_refused(name: str, fast: Path, record: Record) -> None:
    logits, message = BAD_LOGITS[name]
    with pytest.raises(UsageError, match=message) as error:
        imported(fast, logits=logits)
    assert "\n" not in error.value.line
    record("S14", "hostile imports", injected=1, recovered=0, refused=1, silent=0, control=CONTROL)


def test_logits_that_are_not_known_in_some_rows(fast: Path) -> None:
    logits = np.ones((N, C))
    logits[3] = np.nan
    store = imported(fast, logits=logits)
    np.testing.assert_array_equal(np.isnan(store.logits).all(axis=1), np.arange(N) == 3)


GOOD_VALUES: dict[str, np.ndarray] = {
    "C order": VALUES,
    "Fortran order": np.asfortranarray(VALUES),
    "Fortran order, two axes": np.asfortranarray(VALUES[:, 0]),
    "big-endian": VALUES.astype(">f4"),
    "big-endian in Fortran order": np.asfortranarray(VALUES.astype(">f8")),
    "float64": VALUES.astype(np.float64),
    "long double": VALUES.astype(np.longdouble),
    "float16": VALUES.astype(np.float16),
    "one row": VALUES[:1],
    "one column": VALUES[:, 0, :1],
}


@pytest.mark.parametrize("name", GOOD_VALUES)
def test_features_of_any_order_and_float_are_the_same(name: str, fast: Path, record: Record) -> None:
    values = GOOD_VALUES[name]
    found = imported(fast, values).features[:]
    np.testing.assert_array_equal(found.reshape(values.shape), values.astype(np.float32))
    record("S14", "hostile imports", injected=1, recovered=1, refused=0, silent=0, control=CONTROL)


BAD_VALUES: dict[str, Any] = {
    "integers": np.ones((N, K), int),
    "complex": np.ones((N, K), complex),
    "bool": np.ones((N, K), bool),
    "structured": np.zeros((N, K), [("a", "f4")]),
    "text": np.full((N, K), "1.0"),
    "0-d": np.array(1.0),
    "one axis": np.ones(N),
    "four axes": np.ones((N, 1, 1, K)),
    "no rows": np.ones((0, K)),
    "no columns": np.ones((N, 0)),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_features_that_are_none_are_refused(name: str, fast: Path, record: Record) -> None:
    with pytest.raises(UsageError, match="this is no array of features") as error:
        imported(fast, BAD_VALUES[name])
    assert "\n" not in error.value.line
    record("S14", "hostile imports", injected=1, recovered=0, refused=1, silent=0, control=CONTROL)


def archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, VALUES)


def huge(path: Path) -> None:
    np.save(path, VALUES)
    os.truncate(path, 200)


FILES: dict[str, Callable[[Path], object]] = {
    "npz": archive,
    "empty": Path.touch,
    "text": lambda path: path.write_text("hello"),
    "an object array": lambda path: np.save(path, np.array([{}], object), allow_pickle=True),
    "cut short": huge,
    "a deep header": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535),
    "code": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x20\x00" + b"__import__('os').system('x')    "),
    "a pipe": os.mkfifo,
    "a directory": os.mkdir,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "nothing": lambda path: None,
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_arrays_are_refused(name: str, fast: Path, record: Record) -> None:
    """As features, raw features, and labels."""
    FILES[name](fast / "file.npy")
    for read in (
        lambda: import_features(fast / "file.npy", fast / "out", TRAK),
        lambda: import_features(fast / "file.npy", fast / "out", TRAK, shape=(7, 3)),
        lambda: read_array(fast / "file.npy"),
    ):
        with pytest.raises(UsageError, match="this is no") as error:
            read()
        assert "\n" not in error.value.line
    record("S14", "hostile imports", injected=3, recovered=0, refused=3, silent=0, control=CONTROL)


def test_a_link_of_the_users_own_is_followed(fast: Path) -> None:
    np.save(fast / "far.npy", VALUES)
    (fast / "near.npy").symlink_to("far.npy")
    assert import_features(fast / "near.npy", fast / "out", TRAK).shape == (N, C, K)


@pytest.mark.parametrize(
    "shape", [(N, C * K + 1), (-N, K), (N, 0), (1 << 62, 1 << 62), (N, C, K, 1), (N * C * K,)], ids=str
)
def test_shapes_of_raw_maps_that_do_not_fit_are_refused(shape: tuple[int, ...], fast: Path, record: Record) -> None:
    VALUES.tofile(fast / "raw")
    with pytest.raises(UsageError, match="this is no array of features"):
        import_features(fast / "raw", fast / "out", TRAK, shape=shape)
    record("S14", "hostile imports", injected=1, recovered=0, refused=1, silent=0, control=CONTROL)


def cut(path: Path) -> None:
    os.truncate(path, 600)


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [cut, overwritten, Path.unlink], ids=lambda change: change.__name__)
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_file_that_changes_while_it_is_read(
    change: Callable[[Path], None], after: int, fast: Path, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    """A mapped file that gets shorter would end the process."""
    reads = iter(range(1000))
    rows = ArrayFile.rows

    def spying(file: ArrayFile, start: int, stop: int) -> np.ndarray:
        if next(reads) == after:
            change(file.path)
        return rows(file, start, stop)

    monkeypatch.setattr(ArrayFile, "rows", spying)
    monkeypatch.setattr("gradstore.store.import_features._TOGETHER", 1)  # bytes, so that each group is read by itself
    with pytest.raises((UsageError, CorruptError), match=r"changed while it was read|the file is gone") as error:
        imported(fast)
    assert "\n" not in error.value.line
    record("S14", "hostile imports", injected=1, recovered=0, refused=1, silent=0, control=CONTROL)


@pytest.mark.parametrize("change", [cut, overwritten, Path.unlink], ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_change_between_the_look_and_the_read_is_seen(
    when: str, change: Callable[[Path], None], fast: Path, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    np.save(fast / "x.npy", VALUES)
    file = open_array(fast / "x.npy", "array")
    reading = ArrayFile._read

    def changing(file: ArrayFile, start: int, stop: int) -> np.ndarray:
        if when == "before":
            change(file.path)
        values = reading(file, start, stop)
        if when == "after":
            change(file.path)
        return values

    monkeypatch.setattr(ArrayFile, "_read", changing)
    with pytest.raises((UsageError, CorruptError), match=r"the file changed while it was read|the file is gone"):
        file.rows(0, N)
    record("S14", "hostile imports", injected=1, recovered=0, refused=1, silent=0, control=CONTROL)


def test_mutated_array_files(fast: Path, amount: Callable[[int, int], int], record: Record) -> None:
    """They have no digest: what is read is what the file says, or one line."""
    rng, count, read = np.random.default_rng(0), amount(1500, 40_000), 0
    np.save(fast / "whole.npy", VALUES)
    content = (fast / "whole.npy").read_bytes()
    for _ in range(count):
        (fast / "x.npy").write_bytes(mutated(rng, content))
        found = told(fast / "x.npy")
        read += isinstance(found, np.ndarray)
        if isinstance(found, np.ndarray):
            np.testing.assert_array_equal(found, np.load(fast / "x.npy"))
        else:
            assert found.exit_code in (2, 5)
            assert "\n" not in found.line
    record("S14", "hostile imports", injected=count, recovered=read, refused=count - read, silent=0, control=CONTROL)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (40, 0), (3, 0, 8)], ids=str)
def test_arrays_of_nothing_are_read_as_such_and_are_no_labels(
    shape: tuple[int, ...], fast: Path, record: Record
) -> None:
    for array in (np.zeros(shape, np.int64), np.zeros(shape, np.int64, order="F")):
        np.save(fast / "x.npy", array)
        assert open_array(fast / "x.npy", "array").rows(0, shape[0]).shape == shape
    if len(shape) < 3:
        with pytest.raises(UsageError, match="labels or logits do not fit"):
            imported(fast, labels=np.load(fast / "x.npy"))
    record("S14", "hostile imports", injected=2, recovered=2, refused=0, silent=0, control=CONTROL)


def told(path: Path) -> np.ndarray | GradstoreError:
    try:
        file = open_array(path, "array")
        return file.rows(0, len(file)) if file.shape else np.load(path)
    except GradstoreError as error:
        return error


def test_how_many_classes_there_are(fast: Path) -> None:
    sums = VALUES[:, 0]
    for i, (given, classes) in enumerate(
        (
            ({"labels": LABELS}, 3),
            ({}, 1),
            ({"labels": LABELS, "classes": ["a", "b", "c", "d"]}, 4),
            ({"labels": LABELS, "logits": np.ones((N, 5))}, 5),
        )
    ):
        folder = fast / str(i)
        folder.mkdir()
        assert imported(folder, sums, **given).schema.classes == classes
    with pytest.raises(UsageError, match="the label of row 2 is no class"):
        imported(fast, sums, labels=LABELS, classes=["a", "b"])


def test_what_numpy_makes_of_such_labels() -> None:
    """The control."""
    with np.errstate(invalid="ignore"):
        assert np.array([0.9, np.nan]).astype(np.int64).tolist()[0] == 0
    assert module.class_indices(LABELS, where="labels").dtype == np.int64
