"""Examples of a split as a Hugging Face model takes them: texts and pictures encoded when a row is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gradstore.errors import ProjectError

Encode = Callable[[Any], dict[str, Tensor]]
_LABELS = ("labels", "label")  # what a mapping's labels are called


@dataclass(frozen=True)
class Encoded:
    """Rows that are encoded one by one, when they are read.

    Attributes:
        examples: texts, pairs of texts, or pictures [n].
        labels: int64 [n], or None.
        encode: from one of them to the model's inputs.
    """

    examples: Sequence[Any]
    labels: np.ndarray | None
    encode: Encode

    def __len__(self) -> int:
        """Rows."""
        return len(self.examples)

    def __getitem__(self, row: int) -> tuple[dict[str, Tensor], int | None]:
        """The model's inputs of one row, and its label."""
        return self.encode(self.examples[row]), None if self.labels is None else int(self.labels[row])


@dataclass(frozen=True)
class TensorRows:
    """Rows of tensors that are there already.

    Attributes:
        tensors: the model's inputs by name, each [n, …].
        labels: int64 [n], or None.
    """

    tensors: Mapping[str, Tensor]
    labels: np.ndarray | None

    def __len__(self) -> int:
        """Rows."""
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, row: int) -> tuple[dict[str, Tensor], int | None]:
        """The model's inputs of one row, and its label."""
        inputs = {name: tensor[row] for name, tensor in self.tensors.items()}
        return inputs, None if self.labels is None else int(self.labels[row])


def to_encode(given: Any) -> Sequence[Any] | None:
    """Texts or pictures of a split as `gs.huggingface` takes it; None where it is of tensors, or a dataset."""
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Sized):
        return None if isinstance(given[0], (Mapping, Tensor)) else cast("Sequence[Any]", given[0])
    return None


def as_rows(given: Any, encode: Encode | None, split: str) -> Any:
    """Make a split out of what `gs.huggingface` takes for one.

    Args:
        given: (texts or pictures or a mapping of tensors, labels), a mapping of tensors with its labels among them, or
            a dataset, which stays as it is.
        encode: from a text or picture to the model's inputs; not used for tensors.
        split: name of the split, for messages.

    Returns:
        A map-style dataset.

    Raises:
        ProjectError: there are more labels than examples or fewer, or the tensors have other numbers of rows.
    """
    if isinstance(given, Mapping):
        label = next((name for name in _LABELS if name in given), None)
        given = ({name: value for name, value in given.items() if name != label}, given.get(label))
    if not isinstance(given, tuple):
        return given
    examples, labels = given if len(given) == 2 else (None, None)
    if isinstance(examples, Mapping):
        tensors = {str(name): torch.as_tensor(value) for name, value in examples.items()}
        return TensorRows(tensors, _labels(labels, _rows(tensors, split), split))
    raw = to_encode(given)
    if encode is None or raw is None:
        got = ", ".join(type(part).__name__ for part in given[:4])
        expected = "(texts, labels), (images, labels) or (tensors by name, labels)"
        raise ProjectError("the split is no examples and labels", where=f"split {split!r}", expected=expected, got=got)
    return Encoded(raw, _labels(labels, len(raw), split), encode)


def _rows(tensors: Mapping[str, Tensor], split: str) -> int:
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors.values()}
    if len(lengths) != 1:
        raise ProjectError(
            "the tensors differ in their rows",
            where=f"split {split!r}",
            expected="the same first axis n in each",
            got=", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()) or "no tensors",
        )
    return lengths.pop()


def _labels(labels: Any, n: int, split: str) -> np.ndarray | None:
    if labels is None:
        return None
    table = np.asarray(labels if isinstance(labels, (np.ndarray, Tensor)) else list(labels))
    if table.shape != (n,) or (n and table.dtype.kind not in "iu"):
        raise ProjectError(
            "the labels are not one class index a row",
            where=f"split {split!r}",
            expected=f"{n} integers, or -1 for none",
            got=f"{table.dtype} {list(table.shape)}",
        )
    return table.astype(np.int64)


@dataclass(frozen=True)
class TextEncoder:
    """From a text, or a pair of texts, to the tokens that a tokenizer makes of it, padded to one length.

    Attributes:
        tokenizer: of transformers.
        length: tokens of every row; longer texts are cut.
    """

    tokenizer: Any
    length: int

    def __call__(self, text: Any) -> dict[str, Tensor]:
        """Tensors [length] by the model's own names."""
        found = self.tokenizer(
            *parts_of(text), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return {str(name): tensor[0] for name, tensor in found.items()}


def parts_of(text: Any) -> tuple[str, ...]:
    """Take a text, or a pair of texts, apart.

    Returns:
        One or two strings.

    Raises:
        ProjectError: it is neither.
    """
    parts = tuple(text) if isinstance(text, (tuple, list)) else (text,)
    if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
        got = ", ".join(type(part).__name__ for part in parts[:3])
        raise ProjectError("this is no text", where="gs.huggingface", expected="a string, or a pair of them", got=got)
    return parts


@dataclass(frozen=True)
class PictureEncoder:
    """From a picture to the pixels that an image processor makes of it.

    Attributes:
        processor: of transformers.
    """

    processor: Any

    def __call__(self, picture: Any) -> dict[str, Tensor]:
        """Tensors by the model's own names, of a PIL image, a path to one, or whatever else the processor takes."""
        if isinstance(picture, (str, Path)):
            with Image.open(picture) as file:
                picture = file.convert("RGB")
        elif isinstance(picture, Image.Image):
            picture = picture.convert("RGB")
        return {str(name): tensor[0] for name, tensor in self.processor(images=picture, return_tensors="pt").items()}
