"""F5 and F6: stored bytes change. Nothing wrong is read, `verify` names the rows, featurize computes them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import Record
from small_store import ROWS, N, columns, files, write

from gradstore.errors import CorruptError
from gradstore.store.feature_store import FeatureStore
from gradstore.store.verify import verify

pytestmark = pytest.mark.soak


@dataclass
class Change:
    """One changed file; `rows` are the only rows that may be affected, None for all of the file's."""

    file: Path
    data: bytes
    rows: set[int] | None


@pytest.fixture
def store(fast: Path) -> Path:
    write(fast / "store")
    return fast / "store"


def flips(path: Path, count: int) -> Iterator[Change]:
    """One flipped bit: half of the time in any byte of any file, half of the time in a row."""
    rng = np.random.default_rng(0)
    whole, manifest = files(path), FeatureStore(path).manifest
    names, sizes = list(whole), np.array([len(data) for data in whole.values()])
    for i in range(count):
        if i % 2:
            shard = manifest.shards[rng.integers(len(manifest.shards))]
            column = manifest.schema.columns[rng.integers(len(manifest.schema.columns))]
            name, local = manifest.file_of(shard.index), int(rng.integers(shard.rows))
            at = shard.offsets[column.name] + local * column.row_bytes + int(rng.integers(column.row_bytes))
            row = manifest.rows_of(shard.index).start + local
            rows = {row} if column.name != "digest" else None
        else:
            name = names[rng.choice(len(names), p=sizes / sizes.sum())]
            at, rows = int(rng.integers(len(whole[name]))), None
        data = bytearray(whole[name])
        data[at] ^= 1 << int(rng.integers(8))
        yield Change(path / name, bytes(data), rows)


def maulings(path: Path, count: int) -> Iterator[Change]:
    """Truncation, extension, zeroed blocks."""
    rng = np.random.default_rng(1)
    whole = files(path)
    while count:  # around bytes that are not zero, of which most of such a small file consists
        name = list(whole)[rng.integers(len(whole))]
        data = bytearray(whole[name])
        kind, at = count % 3, int(rng.choice(np.flatnonzero(np.frombuffer(whole[name], np.uint8))))
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data += rng.bytes(int(rng.integers(1, 5000)))
        else:
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        if bytes(data) != whole[name]:
            count -= 1
            yield Change(path / name, bytes(data), None)


def named_rows(path: Path) -> set[int]:
    """Rows that verify names; all where the manifest itself is refused."""
    try:
        return set(verify(path).damaged_rows)
    except CorruptError:
        return set(range(N))


def reads(path: Path) -> tuple[set[int], set[int]]:
    """(rows that raise, rows that read well and are wrong), each read by itself."""
    try:
        store = FeatureStore(path)
    except CorruptError:
        return set(range(N)), set()
    raised, wrong = set(), set()
    for row in range(N):
        try:
            got = store.read(row, row + 1)
        except CorruptError:
            raised.add(row)
        else:
            wrong |= (
                {row}
                if any(got[name][0].tobytes() != ROWS[row][name].tobytes() for name in got if name != "digest")
                else set()
            )
    return raised, wrong


def unnoticed_by_hdf5(path: Path) -> bool:
    """The control: HDF5 alone, which has checksums on its header only, reads a wrong value without an error."""
    manifest = FeatureStore(path).manifest
    for index in range(manifest.shard_count):
        try:
            with h5py.File(path / manifest.file_of(index)) as file:
                rows = manifest.rows_of(index)
                if any(file[name][:].tobytes() != data.tobytes() for name, data in columns(rows).items()):
                    return True
        except (OSError, KeyError, RuntimeError, ValueError):
            continue
    return False


def survive(path: Path, changes: Iterator[Change]) -> tuple[int, int]:
    """(changes, those of every fifth that HDF5 alone reads wrongly without an error)."""
    whole = files(path)
    count = unnoticed = 0
    for change in changes:
        count += 1
        change.file.write_bytes(change.data)
        named, (raised, wrong) = named_rows(path), reads(path)
        assert named, f"{change.file.name} changed and verify did not see it"
        assert change.rows is None or named == change.rows
        assert wrong == set()
        assert named == raised
        unnoticed += count % 5 == 1 and change.file.name != "store.json" and unnoticed_by_hdf5(path)
        if change.file.name == "store.json":
            with pytest.raises(CorruptError, match=r"the manifest is not what was written|too large"):
                write(path)
            change.file.write_bytes(whole["store.json"])
        write(path)
        assert files(path) == whole
    return count, unnoticed


def test_a_flipped_bit_is_never_read(store: Path, amount: Callable[[int, int], int], record: Record) -> None:
    count, unnoticed = survive(store, flips(store, amount(1000, 10_000)))
    assert unnoticed > count / 50
    control = f"HDF5 alone: {unnoticed} of {-(-count // 5)} read wrongly without an error"
    record("F5", "one bit flipped anywhere", injected=count, recovered=count, refused=0, silent=0, control=control)


def test_truncation_extension_and_zeroed_blocks_are_never_read(
    store: Path, amount: Callable[[int, int], int], record: Record
) -> None:
    count, unnoticed = survive(store, maulings(store, amount(300, 3000)))
    assert unnoticed > 0  # few: most of such a small shard is header and padding
    control = f"HDF5 alone: {unnoticed} of {-(-count // 5)} read wrongly without an error"
    what = "truncated, extended, blocks zeroed"
    record("F6", what, injected=count, recovered=count, refused=0, silent=0, control=control)
