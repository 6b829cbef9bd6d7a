"""Digests of rows against the hash of a row's bytes put together, by one call of `blake3` or `hashlib`."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.store.files.digests import PartedDigests, row_digests
from gradstore.store.schema import Schema, hash_of

pytestmark = pytest.mark.numerical


def columns_of(schema: Schema, n: int, seed: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    columns = {name: array for name, array in schema.empty(n).items() if name != "digest"}
    for array in columns.values():
        raw = rng.integers(0, 256, array.nbytes, np.uint8)
        array[...] = raw.view(array.dtype).reshape(array.shape)
    return columns


def hashed_rows(columns: dict[str, np.ndarray], new: object) -> list[bytes]:
    n = len(columns["row"])
    return [new(b"".join(array[i].tobytes() for array in columns.values())).digest()[:16] for i in range(n)]  # type: ignore[operator]


def digests_of(schema: Schema, columns: dict[str, np.ndarray], threads: int = 1) -> list[bytes]:
    return [digest.tobytes() for digest in row_digests(schema, columns, threads)]


def test_version_2_is_the_published_blake3() -> None:
    answers = {0: "af1349b9f5f9a1a6a0404dea36dcc949", 1: "2d3adedff11b61f14c886e35afa03673"}  # of the official vectors
    for length, answer in answers.items():
        assert hash_of(2)(bytes(length)).hexdigest()[:32] == answer


@pytest.mark.parametrize("preview", [(), (9, 7)])
@pytest.mark.parametrize(
    ("c", "K", "n"), [(1, 4, 40), (1, 24, 5), (1, 40, 5), (10, 3, 50), (10, 600, 21), (10, 10_240, 9)]
)
@pytest.mark.parametrize(("version", "new"), [(1, hashlib.sha256), (2, blake3)])
def test_a_digest_is_the_hash_of_the_whole_row(
    version: int, new: object, c: int, K: int, n: int, preview: tuple[int, ...]
) -> None:
    schema = Schema(c=c, K=K, classes=c, preview=preview, version=version)
    columns = columns_of(schema, n)
    want = hashed_rows(columns, new)
    for threads in (1, 3):
        assert digests_of(schema, columns, threads) == want
    parted = PartedDigests(schema, {name: array for name, array in columns.items() if name != "features"})
    for low, high in ((0, 1), (1, 4), (4, n)):
        assert [d.tobytes() for d in parted.of(low, columns["features"][low:high])] == want[low:high]


@settings(max_examples=60, deadline=None)
@given(
    c=st.integers(1, 5),
    K=st.one_of(st.integers(1, 70), st.integers(400, 700), st.integers(1, 20_000)),
    dtype=st.sampled_from(["float16", "float32", "int8"]),
    preview=st.sampled_from([(), (3,), (1024,), (50, 50, 3)]),
    truth=st.booleans(),
    n=st.integers(1, 12),
    threads=st.integers(1, 4),
)
def test_rows_of_any_size(
    c: int, K: int, dtype: str, preview: tuple[int, ...], truth: bool, n: int, threads: int
) -> None:
    schema = Schema(c=c, K=K, classes=5, dtype=dtype, preview=preview, truth=truth)
    columns = columns_of(schema, n)
    assert digests_of(schema, columns, threads) == hashed_rows(columns, blake3)


def test_a_flipped_bit_changes_the_digest_of_its_row_alone() -> None:
    rng, schema = np.random.default_rng(2), Schema(c=2, K=800, classes=2, preview=(40,), truth=True)
    columns = columns_of(schema, 20)
    before = digests_of(schema, columns)
    for array in columns.values():
        row = int(rng.integers(20))
        flat = array.reshape(20, -1).view(np.uint8)
        flat[row, rng.integers(flat.shape[1])] ^= 1 << int(rng.integers(8))
        after = digests_of(schema, columns)
        assert [i for i in range(20) if before[i] != after[i]] == [row]
        before = after


def test_threads_do_not_disturb_one_another() -> None:
    schema = Schema(c=1, K=2500, classes=1)
    columns = columns_of(schema, 60)
    want = hashed_rows(columns, blake3)
    with ThreadPoolExecutor(4) as pool:
        assert all(got == want for got in pool.map(lambda _: digests_of(schema, columns, 2), range(20)))
