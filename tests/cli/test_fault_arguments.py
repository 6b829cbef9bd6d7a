"""A2, A3: rows and numbers of bytes as people and programs write them: what was meant, or one line; never another."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Record

from gradstore.errors import UsageError
from gradstore.indices import chosen_rows
from gradstore.machine.byte_counts import parse_bytes

pytestmark = pytest.mark.soak


def outcome(read: Callable[[], Any]) -> Any:
    """What an argument is taken for, or the one line in which it is refused; any other error is a failure."""
    try:
        return read()
    except UsageError as error:
        return error


def is_one_line(error: UsageError) -> bool:
    return "\n" not in error.line and len(error.line) < 500


# -- rows ----------------------------------------------------------------------------------------------------------

Rows = tuple[Any, list[int] | None]
"""An argument, and the rows that it means; None where it means none."""
HUGE = [2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63), -(10**30)]
NOTHING = [None, "1", b"1", 1.0, float("nan"), float("inf"), 1j, {}, [], object(), "", "all", [1], (0, 1)]


def some(rng: np.random.Generator, n: int) -> list[int]:
    """Rows that exist, more than two of them, so that they are no mask."""
    return [int(row) for row in rng.integers(0, n, int(rng.integers(3, 9)))] + [n - 1]


def with_a_stranger(rng: np.random.Generator, n: int) -> Rows:
    """One that does not exist: counted from the end, one too many, or huge."""
    rows = some(rng, n)
    rows[rng.integers(len(rows))] = [-1, -n, n, n + 1, *HUGE][rng.integers(4 + len(HUGE))]
    return in_some_way(rng, rows), None


def with_no_number(rng: np.random.Generator, n: int) -> Rows:
    rows: list[Any] = some(rng, n)
    rows[rng.integers(len(rows))] = NOTHING[rng.integers(len(NOTHING))]
    return rows, None


def with_a_boolean(rng: np.random.Generator, n: int) -> Rows:
    rows: list[Any] = some(rng, n)
    rows[rng.integers(len(rows))] = bool(rng.random() < 0.5)
    return rows, None


def as_floats(rng: np.random.Generator, n: int) -> Rows:
    values = np.array(some(rng, n), [np.float16, np.float32, np.float64, complex][rng.integers(4)])
    return (torch.from_numpy(values) if rng.random() < 0.5 else values), None


def nested(rng: np.random.Generator, n: int) -> Rows:
    rows = np.array(some(rng, n))
    return [rows[None], rows[:, None], [list(rows), list(rows)], [list(rows), [0]]][rng.integers(4)], None


def of_no_kind(rng: np.random.Generator, n: int) -> Rows:
    rows = np.array(some(rng, n))
    ways: list[Any] = [
        *(rows.astype(object), rows.astype(str), rows.astype("M8[s]"), rows.astype("m8[s]"), np.array(None)),
        *(np.ma.array(rows, mask=rows % 2 == 0), np.zeros(3, [("a", "i8")]), slice("a", None), iter(rows), "0:3"),
    ]
    return ways[rng.integers(len(ways))], None


def a_mask_of_others(rng: np.random.Generator, n: int) -> Rows:
    mask = rng.random(n + [-1, 1, n][rng.integers(3)]) < 0.5
    return [mask, torch.from_numpy(mask), mask.tolist(), mask[None, :n]][rng.integers(4)], None


def a_mask(rng: np.random.Generator, n: int) -> Rows:
    mask = rng.random(n) < 0.5
    return [mask, torch.from_numpy(mask), mask.tolist()][rng.integers(3)], [
        i for i, chosen in enumerate(mask) if chosen
    ]


def zeros_and_ones(rng: np.random.Generator, n: int) -> Rows:
    """As many as there are rows: likelier a mask than rows."""
    ones = (rng.random(n) < 0.5).astype([np.int8, np.uint8, np.int64][rng.integers(3)])
    return (ones if rng.random() < 0.5 else ones.tolist()), None


def right(rng: np.random.Generator, n: int) -> Rows:
    rows = some(rng, n)
    return in_some_way(rng, rows), rows


def in_some_way(rng: np.random.Generator, rows: Sequence[int]) -> Any:
    """The same integers as a list, a tuple, or an array or tensor that can hold them."""
    dtypes = [dtype for dtype in "bBhHiIlL" if all(np.iinfo(dtype).min <= row <= np.iinfo(dtype).max for row in rows)]
    ways: list[Any] = [list(rows), tuple(rows), *(np.array(rows, dtype) for dtype in dtypes)]
    ways += [np.array(rows, f">{dtype}") for dtype in dtypes]
    ways += [torch.tensor(rows)] if "l" in dtypes else []
    return ways[rng.integers(len(ways))]


WAYS = (with_a_stranger, with_no_number, with_a_boolean, as_floats, nested, of_no_kind, a_mask_of_others, a_mask,
        zeros_and_ones, right)  # fmt: skip


def test_rows_that_nobody_can_mean(amount: Callable[[int, int], int], record: Record) -> None:
    rng, count, meant, believed = np.random.default_rng(0), amount(2000, 50_000), 0, 0
    for _ in range(count):
        n = int(rng.integers(10, 100))
        given, expected = WAYS[rng.integers(len(WAYS))](rng, n)
        found = outcome(lambda given=given, n=n: chosen_rows(given, n, where="rows"))
        if isinstance(found, UsageError):
            assert expected is None, found
            assert is_one_line(found)
            believed += believed_by_numpy(given, n)
        else:
            assert found.dtype == np.int64
            assert found.tolist() == expected
            meant += 1
    assert believed > count / 20
    control = f"NumPy's own indexing: {believed} of those refused give some rows"
    record("A2", "rows in Python", injected=count, recovered=meant, refused=count - meant, silent=0, control=control)


def believed_by_numpy(given: Any, n: int) -> bool:
    """The control: whether an array of n rows gives anything for them."""
    try:
        np.arange(n)[given]
    except Exception:
        return False
    return True


# -- numbers of bytes ------------------------------------------------------------------------------------------------

UNITS = {"": 1, "B": 1, "b": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "mb": 10**6, "GB": 10**9, "Gb": 10**9,
         "TB": 10**12, "KiB": 1 << 10, "MiB": 1 << 20, "mib": 1 << 20, "GiB": 1 << 30, "k": 10**3, "M": 10**6,
         "G": 10**9, "Mi": 1 << 20}  # fmt: skip
NO_UNITS = ["iB", "PB", "bytes", "GBB", "G B", "%", "GB/s", "ГБ", "GB GB", "MiBi", "\0", "e", "j", "_", ";"]
NUMBERS = ["1", "2", "7", "1.5", "0.5", "1e3", "2e0", "1.25e2", "123456789", "0001", "9" * 17, "1e15", "3.0"]
NO_NUMBERS = [
    *(
        "",
        "-1",
        "+1",
        "nan",
        "inf",
        "-inf",
        "NaN",
        "1_0",
        "0x10",
        "٣",
        "²",
        "１",
        "1,5",
        "1.",
        ".5",
        "1e",
        "e3",
        "1e-5",
        "--1",
    ),
    *("1.2.3", "½", "auto", "None", "1e3.5", "1 000", "'1'", "(1)", "\udcff", "1\n1"),
]
SPACES = ["", " ", "\t"]


def test_numbers_of_bytes(record: Record) -> None:
    """Every number with every unit: all that is one is read exactly, all else is refused."""
    read = believed = 0
    cases = [
        *((number, unit, Fraction(number) * size) for number in NUMBERS for unit, size in UNITS.items()),
        *((number, unit, None) for number in NO_NUMBERS for unit in (*UNITS, *NO_UNITS)),
        *((number, unit, None) for number in NUMBERS for unit in NO_UNITS),
        *((number, unit, None) for number in ("0", "0.0", "0e9", "1e400", "9" * 30, "9" * 400) for unit in UNITS),
    ]
    tried = [(space.join((number, unit)), size) for number, unit, size in cases for space in SPACES]
    for text, size in tried:
        found = outcome(lambda text=text: parse_bytes(text))
        if isinstance(found, UsageError):
            assert size is None or not 1 <= size <= 10**18, text
            assert is_one_line(found)
            believed += believed_by_float(text)
        else:
            assert size is not None, text
            assert math.isclose(found, size, rel_tol=1e-15, abs_tol=1), text
            read += 1
    assert believed > 20
    control = f"float() and a unit: {believed} of those refused are some number, or infinitely many"
    record("A3", "numbers of bytes", injected=len(tried), recovered=read, refused=len(tried) - read, silent=0,
           control=control)  # fmt: skip


def believed_by_float(text: str) -> bool:
    """The control: what is left when letters are taken off the end."""
    try:
        float(re.sub(r"[A-Za-z]{1,3}\Z", "", text))
    except ValueError:
        return False
    return True
