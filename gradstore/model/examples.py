"""Reading the examples of a split: stacked inputs, integer labels, and checks that they are what they seem."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor
from torch.utils.data import IterableDataset

from gradstore.errors import GradstoreError, ProjectError

Inputs = Tensor | dict[str, Tensor]


class Examples:
    """One split of a project: a map-style dataset read by row.

    Args:
        dataset: `len(dataset)`, and `dataset[i] -> (x, label)` or `x` alone; x is a tensor, an array, or a dict of
            them.
        split: the split's name, for messages.
        skipping: a row for which the dataset raises an error reads as the first row that can be read, without a label,
            and is noted; but not where the system lacks something, such as memory or descriptors.

    Attributes:
        unreadable: rows that could not be read so far.

    Raises:
        ProjectError: the dataset has no length or no rows, or can only be iterated.
    """

    def __init__(self, dataset: Any, split: str, *, skipping: bool = False) -> None:
        self.dataset, self.split, self.skipping = dataset, split, skipping
        self.unreadable: set[int] = set()
        where = f"split {split!r}"
        if (
            isinstance(dataset, IterableDataset)
            or not hasattr(dataset, "__getitem__")
            or not hasattr(dataset, "__len__")
        ):
            raise ProjectError(
                "the split cannot be read by row",
                where=where,
                expected="a map-style dataset with len(ds) and ds[i]",
                got=type(dataset).__name__,
                hint="Collect the examples in a list, or wrap them in torch.utils.data.TensorDataset",
            )
        if len(dataset) == 0:
            raise ProjectError("the split is empty", where=where, expected="at least one example")

    def __len__(self) -> int:
        """Rows."""
        return len(self.dataset)

    def read(self, rows: Sequence[int] | range) -> tuple[Inputs, np.ndarray]:
        """Read and stack some rows; holds just these.

        Returns:
            Inputs with first axis len(rows), and labels int64 [len(rows)], -1 for none.

        Raises:
            ProjectError: a row cannot be read, has another shape than its neighbours, or a label that is no class.
        """
        items = [self._item(int(row)) for row in rows]
        inputs = [self._input(item, row) for item, row in zip(items, rows, strict=True)]
        labels = [self._label(item, row) for item, row in zip(items, rows, strict=True)]
        return self._stack(inputs, rows), np.asarray(labels, np.int64)

    @cached_property
    def labels(self) -> np.ndarray:
        """All labels, int64 [n]: from the dataset's own table where it has one, otherwise by reading every row."""
        if self.label_table is not None:
            return self.label_table
        return np.asarray([self._label(self._item(row), row) for row in range(len(self))], np.int64)

    @cached_property
    def label_table(self) -> np.ndarray | None:
        """Labels int64 [n] that the dataset keeps beside its examples; None where it has none.

        They are a hint: dropped where sampled rows have other labels, as with a `target_transform`; and rows that are
        stored are held against them (`require_labels`).
        """
        table = _label_table(self.dataset)
        if table is None or len(table) != len(self):
            return None
        sampled = {int(row): self._label(self._item(int(row)), int(row)) for row in sample_rows(len(self))}
        return table if all(table[row] == label or row in self.unreadable for row, label in sampled.items()) else None

    def require_labels(self, rows: range, labels: np.ndarray) -> None:
        """Compare the labels [len(rows)] of rows that were read with those that the dataset's own table has.

        Raises:
            ProjectError: names the first row that has another one.
        """
        if self.label_table is None:
            return
        expected = self.label_table[rows.start : rows.stop]
        differ = [i for i in np.flatnonzero(expected != labels).tolist() if rows[i] not in self.unreadable]
        if differ:
            i = differ[0]
            raise ProjectError(
                f"row {rows[i]} has another label than the dataset's own table of labels says",
                where=f"split {self.split!r}",
                expected=f"{expected[i]}, as .targets, .labels or .tensors has it",
                got=f"{labels[i]} from ds[{rows[i]}]",
                hint="A wrapper that changes labels should change the table too, or not pass it on",
            )

    def require_repeatable(self, rows: Sequence[int] | np.ndarray) -> None:
        """Read each row twice.

        Raises:
            ProjectError: a row differs from itself, as under augmentation or shuffling.
        """
        for row in map(int, rows):
            inputs, labels = self.read([row])
            self.require_same(row, inputs, int(labels[0]))

    def require_same(self, row: int, inputs: Inputs, label: int) -> None:
        """Read a row again.

        Args:
            row: which.
            inputs: of this row, as they were read before, with a first axis of 1.
            label: as it was read before.

        Raises:
            ProjectError: it is another example, as under augmentation or shuffling.
        """
        again, labels = self.read([row])
        if input_bytes(inputs) != input_bytes(again) or label != labels[0]:
            raise ProjectError(
                f"row {row} read twice differs",
                where=f"split {self.split!r}",
                expected="the same example each time",
                hint="Turn off shuffling, augmentation and other randomness in this dataset",
            )

    def _item(self, row: int) -> Any:
        try:
            return self.dataset[row]
        except GradstoreError:
            raise
        except Exception as error:
            if self.skipping and not _is_of_the_system(error):
                self.unreadable.add(row)
                return self._stand_in
            raise ProjectError(
                f"row {row} cannot be read",
                where=f"split {self.split!r}",
                got=f"{type(error).__name__}: {error}",
                hint=f"len() of this dataset is {len(self)}; ds[i] must work for every i below it, or "
                "featurize --on-bad-row skip leaves such rows out",
            ) from error

    @cached_property
    def _stand_in(self) -> tuple[Any, int]:
        """What a row that cannot be read reads as, so that its neighbours are computed as ever."""
        for row in range(len(self)):
            if row not in self.unreadable:
                item = self._item(row)
                if row not in self.unreadable:
                    return (item[0] if isinstance(item, (tuple, list)) else item), -1
        raise ProjectError("no row can be read", where=f"split {self.split!r}", got=f"errors for {len(self)} rows")

    def _input(self, item: Any, row: int) -> Inputs:
        x = item[0] if isinstance(item, (tuple, list)) else item
        if isinstance(x, Mapping):
            return {str(name): self._tensor(value, row) for name, value in x.items()}
        return self._tensor(x, row)

    def _tensor(self, x: Any, row: int) -> Tensor:
        if isinstance(x, (Tensor, np.ndarray)):
            return torch.as_tensor(x).detach()
        raise ProjectError(
            f"row {row} is not a tensor",
            where=f"split {self.split!r}",
            expected="x as a tensor, or a dict of tensors",
            got=type(x).__name__,
            hint="Apply the transform that makes tensors in the dataset itself",
        )

    def _label(self, item: Any, row: int) -> int:
        if not isinstance(item, (tuple, list)) or len(item) < 2 or item[1] is None:
            return -1
        label = item[1]
        if isinstance(label, (Tensor, np.generic, np.ndarray)) and np.asarray(label).size == 1:
            label = label.item()
        if isinstance(label, bool) or not isinstance(label, int) or not -(2**63) <= label < 2**63:
            raise ProjectError(
                f"the label of row {row} is not a class index",
                where=f"split {self.split!r}",
                expected="an integer, or -1 for none",
                got=f"{type(label).__name__} {str(label)[:40]}",
            )
        return label

    def _stack(self, inputs: list[Inputs], rows: Sequence[int] | range) -> Inputs:
        first = inputs[0]
        try:
            if isinstance(first, dict):
                if any(not isinstance(x, dict) or x.keys() != first.keys() for x in inputs):
                    raise RuntimeError("the keys of the dicts differ")
                return {name: _stacked([x[name] for x in inputs], rows) for name in first}  # type: ignore[index]
            return _stacked(inputs, rows)  # type: ignore[arg-type]
        except (RuntimeError, TypeError) as error:
            raise ProjectError(
                f"rows {rows[0]} to {rows[-1]} do not fit together",
                where=f"split {self.split!r}",
                expected="the same shape and dtype in every row",
                got=str(error).splitlines()[0],
                hint="Pad or crop in the dataset",
            ) from error


def _is_of_the_system(error: Exception) -> bool:
    """Whether an error says nothing of the row: memory, descriptors or a disk failed, and the next try may not."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in (None, errno.ENOENT))


def _stacked(tensors: list[Tensor], rows: Sequence[int] | range) -> Tensor:
    """Stack tensors of one dtype, which torch would make equal, so that a row's bytes depended on its neighbours."""
    for tensor, row in zip(tensors, rows, strict=True):
        if tensor.dtype != tensors[0].dtype:
            raise RuntimeError(f"{tensors[0].dtype} in row {rows[0]}, {tensor.dtype} in row {row}")
    return torch.stack(tensors)


def sample_rows(n: int, count: int = 64) -> np.ndarray:
    """`count` fixed rows spread over n, first and last among them; all of them where n is small."""
    return np.unique(np.linspace(0, n - 1, min(count, n)).round().astype(np.int64))


def input_digests(inputs: Inputs) -> np.ndarray:
    """Digest each row of stacked inputs: first 16 bytes of BLAKE3 over its bytes, with names, dtypes and shapes.

    Returns:
        uint8 [n, 16].
    """
    named = {name: x.cpu().contiguous() for name, x in (inputs.items() if isinstance(inputs, dict) else [("", inputs)])}
    n = len(next(iter(named.values())))
    heads = {name: f"{name}|{x.dtype}|{tuple(x.shape[1:])}|".encode() for name, x in named.items()}
    flat = {name: x.reshape(n, -1).view(torch.uint8).numpy() for name, x in named.items()}
    out = np.empty((n, 16), np.uint8)
    for i in range(n):
        digest = blake3()
        for name in sorted(named):
            digest.update(heads[name])
            digest.update(flat[name][i].data)
        out[i] = np.frombuffer(digest.digest()[:16], np.uint8)
    return out


def input_bytes(inputs: Inputs) -> bytes:
    """Bytes that stand for stacked inputs, with their names, dtypes and shapes."""
    named = inputs if isinstance(inputs, dict) else {"": inputs}
    parts = [
        f"{name}|{x.dtype}|{tuple(x.shape)}|".encode()
        + x.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, x in sorted(named.items())
    ]
    return b"".join(parts)


def _label_table(dataset: Any) -> np.ndarray | None:
    """Labels that common datasets keep beside their examples; checked against sampled rows before use."""
    table = getattr(dataset, "targets", None)
    if table is None:
        table = getattr(dataset, "labels", None)
    if table is None and isinstance(getattr(dataset, "tensors", None), tuple) and len(dataset.tensors) == 2:
        table = dataset.tensors[1]
    try:
        array = np.asarray(table)
    except (ValueError, TypeError, RuntimeError):
        return None
    return array.astype(np.int64) if array.ndim == 1 and array.dtype.kind in "iu" else None
