"""The errors that gradstore raises: one line that says what, where, expected, got, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST = 60  # characters of a value that an error shows


class GradstoreError(Exception):
    """Base of every error that a caller can act on.

    Args:
        what: the failure, as a clause without a full stop.
        where: the file, dataset, row or option it concerns.
        expected: what would have been right.
        got: what was found.
        hint: what to do next, as a sentence without a full stop.
        table: rows of cells, the first one headings, where the difference is more than a line can say.

    Attributes:
        exit_code: the exit status of the command line for this kind of error.

    Example:
        >>> try:
        ...     gs.open("stores/no")
        ... except gs.GradstoreError as error:
        ...     print(error.line, error.exit_code)
        stores/no: this is not a gradstore store (expected a directory with store.json). Nothing exists at this path. 2
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
        table: Sequence[Sequence[str]] = (),
    ) -> None:
        self.what, self.where, self.expected, self.got, self.hint = what, where, expected, got, hint
        self.table = tuple(tuple(row) for row in table)
        super().__init__(what)

    @property
    def line(self) -> str:
        """The whole error, but for its table, as one line."""
        line = self.what if self.where is None else f"{self.where}: {self.what}"
        named = (("expected", self.expected), ("got", self.got))
        details = [f"{name} {' '.join(str(value).split())}" for name, value in named if value is not None]
        if details:
            line += " (" + ", ".join(details) + ")"
        return line + "." + (f" {self.hint}." if self.hint else "")

    def __str__(self) -> str:
        """The line, and below it the table where there is one."""
        return "\n".join([self.line, *aligned(self.table)])


def shown(value: object) -> str:
    """A value as an error shows what it got, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose rows have as many cells each, indented."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


class UsageError(GradstoreError):
    """An argument is unusable: unknown kernel, k larger than n, an output that is not a store."""

    exit_code = 2


class ProjectError(GradstoreError):
    """The user's project is wrong: file, model, weights, splits or classes."""

    exit_code = 3


class MismatchError(GradstoreError):
    """Two things that must agree differ: a store and a project, or two stores."""

    exit_code = 4


class CorruptError(GradstoreError):
    """Stored bytes are not what was written."""

    exit_code = 5


class LockedError(GradstoreError):
    """Another writer holds the store."""

    exit_code = 6


class NoSpaceError(GradstoreError):
    """The disk has too little room."""

    exit_code = 7


class NonFiniteError(GradstoreError):
    """A gradient, norm or feature is NaN, infinite or outside its audited band."""

    exit_code = 8


class UnsafeError(GradstoreError):
    """The input could run code or read another file, so it was refused."""

    exit_code = 9


class ClosedError(GradstoreError):
    """Nobody reads an output that is a pipe."""

    exit_code = 141
