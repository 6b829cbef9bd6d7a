from __future__ import annotations

import pytest

from gradstore import errors


def test_an_error_is_one_line_that_says_everything() -> None:
    error = errors.UsageError("unknown kernel", where="--kernel", expected="a or b", got="'c'", hint="See --help")
    assert str(error) == "--kernel: unknown kernel (expected a or b, got 'c'). See --help."


def test_parts_that_are_not_given_leave_no_trace() -> None:
    assert str(errors.CorruptError("broken")) == "broken."
    assert str(errors.CorruptError("broken", got=0)) == "broken (got 0)."


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("GradstoreError", 1),
        ("UsageError", 2),
        ("ProjectError", 3),
        ("MismatchError", 4),
        ("CorruptError", 5),
        ("LockedError", 6),
        ("NoSpaceError", 7),
        ("NonFiniteError", 8),
        ("UnsafeError", 9),
        ("ClosedError", 141),
    ],
)
def test_each_kind_has_its_exit_status(kind: str, status: int) -> None:
    assert getattr(errors, kind).exit_code == status


def test_a_table_stands_below_the_line_in_columns() -> None:
    error = errors.MismatchError(
        "they differ", table=[("", "train", "test"), ("weights", "ab  cd", "e"), ("K", "1", "")]
    )
    assert error.line == "they differ."
    assert str(error).split("\n") == [
        "they differ.",
        "           train   test",
        "  weights  ab  cd  e",
        "  K        1",
    ]
