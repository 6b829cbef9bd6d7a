"""`concat`: the rows of several stores one after another, as if one store held them; nothing is copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from gradstore.errors import UsageError
from gradstore.machine.byte_counts import format_bytes
from gradstore.store.rows import Rows, require_comparable

# Of what a part's rows have and the whole's have not, such as pictures of another size: read to check digests, a few
# rows at a time.
_SPARE_BYTES = 8 << 20
_NAMED = 4


def concat(parts: Iterable[Rows]) -> Rows:
    """The rows of several stores, one after another (`gradstore.store.concatenated`).

    Whatever takes a store takes them, and answers as for one store with all the rows, to the last bit: `gram`, `topk`,
    `forensics`, `KernelGLM`, `attribute`, `evaluate`, `residual`, `export`. Only an index is kept beside one store.

    Rows are counted through the whole, in `topk(…).indices` and `rows` alike; `concat(…).part(i)` says which store row
    i is from and where it is there, and reports do so too. What one store does not know stays unknown: `labels` are -1
    and `logits` NaN in its rows, and `poisoned` is None unless all of them know it. Pictures are shown whatever their
    size, but are part of `read` only where all have the same.

    Args:
        parts: finished stores, rows featurized on the spot, or what `concat` made of such; one is returned as it is.

    Returns:
        A handle on them; holds no rows itself.

    Raises:
        UsageError: there are none, they are no rows, or a store is unfinished.
        MismatchError: they differ in more than their data; lists every field.

    Example:
        >>> both = gs.concat([train, gs.open("stores/extra")])
        >>> len(both), both.part(25)[0].where, both.part(25)[1]
        (32, 'stores/extra', 1)
    """
    stores = [] if isinstance(parts, Rows) else list(parts)
    wrong = parts if isinstance(parts, Rows) else next((part for part in stores if not isinstance(part, Rows)), None)
    if wrong is not None or not stores:
        got = "none" if wrong is None else type(wrong).__name__
        raise UsageError("nothing to concatenate", where="concat", expected="a list of stores", got=got)
    flat = [own for part in stores for own in part.parts]
    for part in flat:
        require_comparable(flat[0], part)
    return flat[0] if len(flat) == 1 else Concatenated(flat)


class Concatenated(Rows):
    """Rows of several stores one after another; see `concat`.

    The identity is theirs, and its data that of each in order. The dataset `row` counts through the whole; `digest` is
    of the row in its own store.
    """

    _kind = "are of several stores"

    def __init__(self, parts: Sequence[Rows]) -> None:
        first = parts[0]
        self._parts = tuple(parts)
        self._ends = np.array([*accumulate(map(len, parts))])
        self.where, self.split = (_joined(getattr(part, name) for part in parts) for name in ("where", "split"))
        previews = {part.schema.preview for part in parts}
        self.schema = replace(
            first.schema,
            version=min(part.schema.version for part in parts),
            truth=all(part.schema.truth for part in parts),
            preview=first.schema.preview if len(previews) == 1 else (),
        )
        self.classes, self.fingerprint = first.classes, first.fingerprint
        self.identity = {**first.identity, "data": {f"part {i}": part.data for i, part in enumerate(parts, 1)}}
        self._shared = {column.name for column in self.schema.columns} - {"row"}

    def __len__(self) -> int:
        """Rows of all parts."""
        return int(self._ends[-1])

    def __eq__(self, other: object) -> bool:
        """Whether they are the same rows of the same stores in the same order."""
        return isinstance(other, Concatenated) and self._parts == other._parts

    def __hash__(self) -> int:
        """Of the parts."""
        return hash(self._parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self._parts)

    @property
    def source(self) -> list[str] | str:
        """Paths of the stores; "" where some of the rows are in memory."""
        paths = [part.source for part in self._parts]
        return [str(path) for path in paths] if all(paths) else ""

    @property
    def parts(self) -> tuple[Rows, ...]:
        """The stores, none of them concatenated."""
        return self._parts

    def part(self, row: int) -> tuple[Rows, int]:
        """The store that a row is from, and its position there."""
        self._require_range(row, row + 1)
        i = int(np.searchsorted(self._ends, row, side="right"))
        return self._parts[i], int(row) - self._first(i)

    def read(
        self, start: int, stop: int, *, out: Mapping[str, np.ndarray] | None = None, check: bool = True
    ) -> dict[str, np.ndarray]:
        """Every column of rows start:stop, each part's read by itself; see `Rows.read`."""
        self._require_range(start, stop)
        data = self._cut(self.schema.empty(stop - start) if out is None else out, np.arange(start, stop))
        for i, low, high in self._spans(start, stop):
            part, first = self._parts[i], self._first(i)
            part.read(low - first, high - first, out=self._room(part, data, low - start, high - start), check=check)
        return data

    def gather(self, rows: np.ndarray, out: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every column of scattered rows, each part's read by itself; see `Rows.gather`."""
        data = self._cut(out, rows)
        if not len(rows):
            return data
        self._require_range(int(rows[0]), int(rows[-1]) + 1)
        for i, low, high in self._spans(int(rows[0]), int(rows[-1]) + 1):
            at, stop = np.searchsorted(rows, (low, high)).tolist()
            if at < stop:
                part = self._parts[i]
                part.gather(rows[at:stop] - self._first(i), self._room(part, data, at, stop))
        return data

    def stream(
        self, start: int, stop: int, columns: Mapping[str, np.ndarray], room: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Features of rows start:stop, a few rows at a time, part after part; see `Rows.stream`."""
        self._require_range(start, stop)
        data = self._cut(columns, np.arange(start, stop))
        for i, low, high in self._spans(start, stop):
            part, first = self._parts[i], self._first(i)
            views = self._room(part, data, low - start, high - start)
            for at, features in part.stream(low - first, high - first, views, room):
                yield first + at, features

    def column(self, name: str) -> np.ndarray:
        """One small dataset of all rows; `row` counts through the whole."""
        if name == "row":
            return np.arange(len(self))
        return np.concatenate([part.column(name) for part in self._parts])

    @cached_property
    def data(self) -> Mapping[str, Any]:
        """What the rows of each part are made of."""
        return self.identity["data"]

    @cached_property
    def labels(self) -> np.ndarray:
        """True classes as each part has them; see `Rows.labels`."""
        return np.concatenate([part.labels for part in self._parts])

    @cached_property
    def absent(self) -> np.ndarray:
        """Why rows are not there; see `Rows.absent`."""
        return np.concatenate([part.absent for part in self._parts])

    @cached_property
    def poisoned(self) -> np.ndarray | None:
        """Which rows are poisoned, or None where a part does not know."""
        known = [part.poisoned for part in self._parts]
        return None if any(mask is None for mask in known) else np.concatenate(known)  # type: ignore[arg-type]

    def preview(self, row: int) -> np.ndarray | str | None:
        """The picture or text that shows one row, if its store has any."""
        part, own = self.part(row)
        return part.preview(own)

    def card(self) -> dict[str, str]:
        """What they are, for people."""
        split = f"{self.split}, {len(self)} rows of {len(self._parts)} stores"
        return {**super().card(), "split": split, "size": f"{format_bytes(self.nbytes)} in {len(self._parts)} stores"}

    def _first(self, i: int) -> int:
        """The row of the whole at which part i begins."""
        return int(self._ends[i]) - len(self._parts[i])

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(part, first row, one past the last) of the whole, so few that what is spare of them takes little memory."""
        for i in range(int(np.searchsorted(self._ends, start, side="right")), len(self._parts)):
            low, high = max(start, self._first(i)), min(stop, int(self._ends[i]))
            spare = sum(column.row_bytes for column in self._parts[i].schema.columns if column.name not in self._shared)
            step = max(1, _SPARE_BYTES // spare)
            yield from ((i, at, min(at + step, high)) for at in range(low, high, step))

    def _cut(self, out: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays of as many rows as are read, `row` filled in."""
        data = {name: array[: len(rows)] for name, array in out.items()}
        data["row"][:] = rows
        return data

    def _room(self, part: Rows, data: Mapping[str, np.ndarray], at: int, stop: int) -> dict[str, np.ndarray]:
        """Make room for what a part reads of some rows; it needs all of a row to compare its digest.

        Returns:
            Views of `data`, and spare arrays for its own numbers and what only it has.
        """
        columns = part.schema.columns
        spare = {c.name: np.empty((stop - at, *c.shape), c.dtype) for c in columns if c.name not in self._shared}
        return spare | {name: data[name][at:stop] for name in self._shared if name in data}


def _joined(names: Iterable[str]) -> str:
    """The first few of some names, each once."""
    found = list(dict.fromkeys(names))
    return " + ".join(found[:_NAMED]) + (f" + {len(found) - _NAMED} more" if len(found) > _NAMED else "")
