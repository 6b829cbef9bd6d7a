"""S15: annotations and their tables in anyone's hands are refused in one line, or say what was written."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Record
from mutations import mutated, places, with_strange_value
from safetensors import SafetensorError
from safetensors.numpy import load, save
from small_store import N, write

import gradstore as gs
from gradstore.errors import CorruptError, GradstoreError, UsageError
from gradstore.store.annotation_table import read_annotation_table
from gradstore.store.annotations import ANNOTATIONS
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.tensor_file import under_digest

pytestmark = pytest.mark.soak

CLASSES = ("cat", "dog")
Said = tuple[Any, ...]


@pytest.fixture
def store(fast: Path) -> FeatureStore:
    """A store of 22 rows, annotated."""
    write(fast / "store")
    labels = np.random.default_rng(0).integers(0, 2, N)
    return gs.annotate(fast / "store", labels=labels, poisoned=[1, 5], classes=CLASSES, note="by hand")


def told(path: Path) -> Said | GradstoreError:
    """What annotations say of the rows, or the one line in which they are refused."""
    try:
        opened = FeatureStore(path)
        return opened.labels.tolist(), np.asarray(opened.poisoned).tolist(), opened.classes, opened.note
    except GradstoreError as error:
        return error


def is_one_line(error: GradstoreError) -> bool:
    return error.exit_code == 5 and "\n" not in error.line and len(error.line) < 1000


def header_of(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["annotations"])


def test_mutated_annotations(store: FeatureStore, amount: Callable[[int, int], int], record: Record) -> None:
    rng, count, harmless, truth = np.random.default_rng(0), amount(1500, 50_000), 0, told(store.path)
    file = store.path / ANNOTATIONS
    whole = file.read_bytes()
    for _ in range(count):
        file.write_bytes(mutated(rng, whole))
        found = told(store.path)
        harmless += not isinstance(found, GradstoreError)
        assert is_one_line(found) if isinstance(found, GradstoreError) else found == truth
    silent = believed_without_a_digest(whole)
    control = f"annotations without a digest: {silent} of 300 say something else"
    record("S15", "mutated annotations", injected=count, recovered=harmless, refused=count - harmless, silent=0,
           control=control)  # fmt: skip


def believed_without_a_digest(whole: bytes) -> int:
    """The control: the arrays as the library of such files reads them."""
    rng, truth, silent = np.random.default_rng(0), load(whole), 0
    for _ in range(300):
        try:
            found = load(mutated(rng, whole))
            silent += any(not np.array_equal(found[name], array) for name, array in truth.items())
        except (SafetensorError, KeyError):
            continue
    assert silent > 5
    return silent


def test_strange_values_under_a_right_digest(
    store: FeatureStore, amount: Callable[[int, int], int], record: Record
) -> None:
    rng, count, passed, failures = np.random.default_rng(0), amount(600, 20_000), 0, 0
    file = store.path / ANNOTATIONS
    whole, truth = file.read_bytes(), told(store.path)
    assert not isinstance(truth, GradstoreError)
    header, arrays = header_of(whole), load(whole)
    spots = [(), *(place for place in places(header) if place)]
    for i in range(count):
        strange = with_strange_value(rng, header, spots)
        file.write_bytes(save(arrays, metadata=under_digest("annotations", json.dumps(strange), arrays)))
        found = told(store.path)
        passed += not isinstance(found, GradstoreError)
        if isinstance(found, GradstoreError):
            assert is_one_line(found)
        else:  # names and notes may be any text; of rows it says the same
            assert found[:2] == truth[:2]
            assert found[2:] == (tuple(strange["classes"] or ("a", "b")), strange["note"])
        failures += i < 100 and fails_without_checks(strange)
    assert failures > 5
    control = f"fields not checked: {failures} of 100 end in an uncaught exception or no names"
    record("S15", "strange values in annotations", injected=count, recovered=passed, refused=count - passed, silent=0,
           control=control)  # fmt: skip


def fails_without_checks(said: Any) -> bool:
    """The control: a header that is believed."""
    try:
        classes, note = [str.upper(name) for name in said["classes"]], str.upper(said["note"])
        lines = [f"{str.upper(at)} {str.upper(what)}" for at, what in said["history"]]
        return len(classes) != 2 or said["version"] != 1 or not note or not lines or len(said["fingerprint"]) != 64
    except Exception:
        return True


TABLE = "row,label,poisoned\r\n" + "".join(f"{i},{('cat', 'dog', '1', '-1')[i % 4]},{i % 2}\r\n" for i in range(N))
PIECES = [
    *(
        "row",
        "label",
        "poisoned",
        "cat",
        "dog",
        "-1",
        "0",
        "1",
        "2",
        "21",
        "22",
        "99",
        "yes",
        "no",
        "true",
        "maybe",
        "",
    ),
    *(" ", "\t", "\0", ";", "٣", "1e0", "1.0", "0x1", "nan", "x" * 5000, "9" * 400, "\u202e", "1_0", " 7 ", "+3", "-0"),
    *('"', '""', '"a', ",", ",,", "\n", "\r\n", "\n\n", "\ufeff", "=1+1"),
]


def changed_table(rng: np.random.Generator) -> bytes:
    """A table in which a cell, a line or some bytes are others."""
    if rng.random() < 0.2:
        return mutated(rng, TABLE.encode())
    lines = TABLE.split("\r\n")
    at = int(rng.integers(len(lines) - 1)) if rng.random() < 0.8 else 0
    cells = lines[at].split(",")
    piece = PIECES[rng.integers(len(PIECES))]
    cells[rng.integers(len(cells))] = piece
    if rng.random() < 0.1:
        cells = cells[:-1] if rng.random() < 0.5 else [*cells, piece]
    lines[at] = ",".join(cells)
    return "\r\n".join(lines).encode()


def test_hostile_tables(store: FeatureStore, amount: Callable[[int, int], int], record: Record) -> None:
    rng, count, read, silent = np.random.default_rng(0), amount(1000, 50_000), 0, 0
    file = store.path.with_name("table.csv")
    for _ in range(count):
        table = changed_table(rng)
        file.write_bytes(table)
        found = read_or_refused(file, store)
        if isinstance(found, UsageError):
            assert "\n" not in found.line
            silent += taken_as_it_stands(table)
        else:
            read += 1
            assert {name: array.tolist() for name, array in found.items()} == meant(table, store)
    assert silent > 5
    control = f"cells turned into numbers without a look: {silent} of those refused are taken for rows and labels"
    record("S15", "hostile tables of annotations", injected=count, recovered=read, refused=count - read, silent=0,
           control=control)  # fmt: skip


def read_or_refused(file: Path, store: FeatureStore) -> dict[str, np.ndarray] | UsageError:
    try:
        return read_annotation_table(file, store)
    except UsageError as error:
        return error


def meant(table: bytes, store: FeatureStore) -> dict[str, list[Any]]:
    """What a table says, a cell at a time: the reference. No cell of these tables spans lines."""
    names, *lines = (line.split(",") for line in table.decode("utf-8-sig").splitlines() if line)
    said: dict[str, list[Any]] = {"labels": store.labels.tolist(), "poisoned": store.poisoned.tolist()}  # type: ignore[union-attr]
    for line in lines:
        cells = {name.strip('"'): cell.strip('"') for name, cell in zip(names, line, strict=True)}
        row, label, mark = (cells.get(name, "") for name in ("row", "label", "poisoned"))
        if label:
            said["labels"][int(row)] = CLASSES.index(label) if label in CLASSES else int(label)
        said["poisoned"][int(row)] = mark.strip().lower() in ("1", "true", "yes")
    return {name: value for name, value in said.items() if name.removesuffix("s") in [n.strip('"') for n in names]}


def taken_as_it_stands(table: bytes) -> bool:
    """The control: NumPy's reader of tables, and arrays indexed by what it finds, the last row by -1."""
    try:
        rows = np.genfromtxt(io.BytesIO(table), delimiter=",", skip_header=1, usecols=(0, 2), invalid_raise=True)
        with np.errstate(invalid="ignore"):
            np.zeros(N)[rows[:, 0].astype(np.int64)]
    except (ValueError, IndexError, UserWarning):
        return False
    return True


def test_annotations_are_read_at_all(store: FeatureStore) -> None:
    """The reference of these tests agrees with what was written, in the table as in the file."""
    file = store.path.with_name("table.csv")
    file.write_text(TABLE, newline="")
    found = read_annotation_table(file, store)
    assert {name: array.tolist() for name, array in found.items()} == meant(TABLE.encode(), store)
    assert meant(TABLE.encode(), store)["labels"][:4] == [0, 1, 1, -1]
    (store.path / ANNOTATIONS).write_bytes(b"")
    with pytest.raises(CorruptError, match="annotations are damaged"):
        FeatureStore(store.path).labels  # noqa: B018
