"""Digests of many rows in one call against the `blake3` package, which hashes one row at a time."""

from __future__ import annotations

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.schema import Schema
from gradstore.storage import native
from gradstore.storage.digests import PartedDigests, row_digests

pytestmark = pytest.mark.numerical

LEVELS = native.levels()
# Those of the official test vectors, and both sides of where a tree of 16 lanes is filled.
LENGTHS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 2048, 2049, 3072, 3073, 4096, 4097]
LENGTHS += [5120, 5121, 6144, 6145, 7168, 7169, 8192, 8193, 15360, 15361, 16384, 16385, 17408, 17409, 31744, 102400]

needs_native = pytest.mark.skipif(not LEVELS, reason="nothing was compiled")


def expected(parts: list[np.ndarray]) -> list[bytes]:
    return [blake3(b"".join(part[i].tobytes() for part in parts)).digest()[:16] for i in range(len(parts[0]))]


def compiled(parts: list[np.ndarray], simd: str) -> list[bytes]:
    out = np.full((len(parts[0]), 16), 0xA5, np.uint8)
    native.hash_rows(parts, out, simd)
    return [digest.tobytes() for digest in out]


def unaligned(data: np.ndarray) -> np.ndarray:
    """The same array one byte past where an array begins."""
    copy = np.empty(data.size + 1, np.uint8)[1:].reshape(data.shape)
    copy[...] = data
    return copy


def columns_of(schema: Schema, n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    columns = {name: array for name, array in schema.empty(n).items() if name != "digest"}
    for array in columns.values():
        raw = rng.integers(0, 256, array.nbytes, np.uint8)
        array[...] = raw.view(array.dtype).reshape(array.shape)
    return columns


def hashed_rows(columns: dict[str, np.ndarray], new: object) -> list[bytes]:
    n = len(columns["row"])
    return [new(b"".join(array[i].tobytes() for array in columns.values())).digest()[:16] for i in range(n)]  # type: ignore[operator]


@needs_native
@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize("length", LENGTHS)
def test_digests_are_those_of_the_package(length: int, simd: str) -> None:
    one = (np.arange(length) % 251).astype(np.uint8)[None]  # as in the official test vectors
    assert compiled([one], simd) == expected([one])
    several = np.random.default_rng(length).integers(0, 256, (17, length), np.uint8)
    assert compiled([unaligned(several)], simd) == expected([several])


@needs_native
def test_a_known_answer() -> None:
    answers = {0: "af1349b9f5f9a1a6a0404dea36dcc949", 1: "2d3adedff11b61f14c886e35afa03673"}  # of the official vectors
    for length, answer in answers.items():
        for simd in LEVELS:
            assert compiled([np.zeros((1, length), np.uint8)], simd)[0].hex() == answer


@needs_native
@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(
        st.one_of(st.integers(0, 200), st.integers(900, 1200), st.integers(0, 40_000)), min_size=1, max_size=5
    ),
    n=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_rows_in_parts_of_any_size(sizes: list[int], n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [unaligned(rng.integers(0, 256, (n, size), np.uint8)) for size in sizes]
    want = expected(parts)
    for simd in LEVELS:
        assert compiled(parts, simd) == want, simd


@needs_native
@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize(("n", "size"), [(2500, 1025), (9000, 100), (35, 205_000), (3, 9_000_001)])
def test_more_rows_or_bytes_than_are_hashed_together(n: int, size: int, simd: str) -> None:
    parts = [np.random.default_rng(1).integers(0, 256, (n, size), np.uint8)]
    assert compiled(parts, simd) == expected(parts)


@needs_native
@pytest.mark.parametrize("simd", LEVELS)
def test_a_flipped_bit_changes_the_digest_of_its_row_alone(simd: str) -> None:
    rng = np.random.default_rng(2)
    parts = [rng.integers(0, 256, (20, size), np.uint8) for size in (3000, 70, 1)]
    before = compiled(parts, simd)
    for part in parts:
        for at in {0, 1, 1023, 1024, 2047, 2048, 2999, 69} & set(range(part.shape[1])):
            row = int(rng.integers(20))
            part[row, at] ^= 1 << int(rng.integers(8))
            after = compiled(parts, simd)
            assert [i for i in range(20) if before[i] != after[i]] == [row]
            before = after


@needs_native
def test_nothing_beyond_the_digests_is_written() -> None:
    parts = [np.random.default_rng(3).integers(0, 256, (5, 2000), np.uint8)]
    for simd in LEVELS:
        room = np.full((7, 16), 0xA5, np.uint8)
        native.hash_rows(parts, room[1:6], simd)
        assert (room[[0, 6]] == 0xA5).all()


@pytest.mark.parametrize("preview", [(), (9, 7)])
@pytest.mark.parametrize(("K", "n"), [(3, 50), (600, 21), (10_240, 9)])
@pytest.mark.parametrize(("version", "new"), [(1, hashlib.sha256), (2, blake3)])
@pytest.mark.parametrize("simd", [*LEVELS, ""])
def test_digests_of_a_schema(
    simd: str, version: int, new: object, K: int, n: int, preview: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "level", lambda: simd)
    schema = Schema(c=10, K=K, classes=10, preview=preview, version=version)
    columns = columns_of(schema, n)
    want = hashed_rows(columns, new)
    for threads in (1, 3):
        assert [digest.tobytes() for digest in row_digests(schema, columns, threads)] == want
    parted = PartedDigests(schema, {name: array for name, array in columns.items() if name != "features"})
    for low, high in ((0, 1), (1, 4), (4, n)):
        assert [d.tobytes() for d in parted.of(low, columns["features"][low:high])] == want[low:high]


@needs_native
def test_rows_need_no_package_where_the_compiled_part_is(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = Schema(c=2, K=40, classes=2, version=2)
    columns = columns_of(schema, 30)
    want = hashed_rows(columns, blake3)
    monkeypatch.setitem(sys.modules, "blake3", None)
    assert [digest.tobytes() for digest in row_digests(schema, columns)] == want


@needs_native
def test_threads_do_not_disturb_one_another() -> None:
    parts = [np.random.default_rng(4).integers(0, 256, (60, 5001), np.uint8)]
    want = expected(parts)
    with ThreadPoolExecutor(4) as pool:
        assert all(got == want for got in pool.map(lambda i: compiled(parts, LEVELS[i % len(LEVELS)]), range(40)))
