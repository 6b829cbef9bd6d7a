"""Data sets that the user has on disk: MNIST idx files, CIFAR-10 python batches, CoLA tables. Nothing is fetched."""

from __future__ import annotations

import csv
import gzip
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import CorruptError, ProjectError, UnsafeError

Split = tuple[Tensor, Tensor]
"""(images float32 [n, channels, side, side] within [0, 1], labels int64 [n])."""

_IDX = {"train": "train", "test": "t10k"}
_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_COLA = {"train": "in_domain_train.tsv", "test": "in_domain_dev.tsv"}


def mnist(folder: Path, split: str) -> Split:
    """MNIST or Fashion-MNIST: `train-images-idx3-ubyte` and its three siblings, gzipped or not."""
    images = _idx(_found(folder, f"{_IDX[split]}-images-idx3-ubyte"), 3)
    labels = _idx(_found(folder, f"{_IDX[split]}-labels-idx1-ubyte"), 1)
    return torch.from_numpy(images)[:, None].float() / 255, torch.from_numpy(labels).long()


def cifar10(folder: Path, split: str) -> Split:
    """CIFAR-10's python version: `data_batch_1` … `test_batch`, pickles that are read without running any code."""
    parts = [_batch(_found(folder, name)) for name in _BATCHES[split]]
    pixels = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([np.asarray(part[b"labels"]) for part in parts])
    return torch.from_numpy(pixels).float() / 255, torch.from_numpy(labels).long()


def cola(folder: Path, split: str) -> tuple[list[str], Tensor]:
    """CoLA: `in_domain_train.tsv` and `in_domain_dev.tsv` of source, label, note, sentence."""
    path = _found(folder, _COLA[split])
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if any(len(row) != 4 or row[1] not in ("0", "1") for row in rows):
        raise CorruptError("this is not a CoLA table", where=path, expected="source, 0 or 1, note, sentence")
    return [row[3] for row in rows], torch.tensor([int(row[1]) for row in rows])


def two_of(split: Split, classes: tuple[int, int], each: int) -> Split:
    """The first examples of two classes, labelled 0 and 1."""
    images, labels = split
    rows = torch.cat([(labels == c).nonzero()[:each, 0] for c in classes])
    return images[rows], (labels[rows] == classes[1]).long()


def _found(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ProjectError(
        "a file of the data set is missing",
        where=folder / name,
        hint="Put the data set there, or try `--smoke` first",
    )


def _idx(path: Path, axes: int) -> np.ndarray:
    """uint8 [n, ...] of an idx file: two zero bytes, the type 8, the number of axes, their lengths, the values."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if data[:4] != bytes((0, 0, 8, axes)):
        raise CorruptError("this is not an idx file of bytes", where=path, expected=f"{axes} axes")
    shape = np.frombuffer(data, ">i4", axes, 4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * axes)
    if len(values) != int(np.prod(shape)):
        raise CorruptError("the idx file is cut short", where=path, expected=list(shape), got=len(values))
    return values.reshape(shape).copy()


class _Plain(pickle.Unpickler):
    """Builds arrays and built-in values only; a pickle that names anything else is refused."""

    _ALLOWED = ("numpy.core.multiarray", "numpy._core.multiarray"), ("numpy",), ("_codecs",)

    def find_class(self, module: str, name: str) -> Any:
        if (module in self._ALLOWED[0] and name == "_reconstruct") or (
            module in self._ALLOWED[1] and name in ("ndarray", "dtype")
        ):
            return super().find_class(module, name)
        if module in self._ALLOWED[2] and name == "encode":
            return super().find_class(module, name)
        raise UnsafeError("the batch names code", where="CIFAR-10", expected="arrays and lists", got=f"{module}.{name}")


def _batch(path: Path) -> dict[bytes, Any]:
    found = _Plain(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    if not isinstance(found, dict) or b"data" not in found or b"labels" not in found:
        raise CorruptError("this is not a CIFAR-10 batch", where=path, expected="data and labels")
    return found
