"""How examples look, as a dataset of a feature file: pictures of one size, or texts padded with zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradstore.errors import ProjectError
from gradstore.model.image_and_text import Show

TEXT_BYTES = 512


def preview_shape(show: Show | None, x: Any) -> tuple[int, ...]:
    """Shape of one row of /preview: that of the first picture, 512 bytes of text, or () for none."""
    if show is None:
        return ()
    shown = show(x)
    return (TEXT_BYTES,) if isinstance(shown, str) else tuple(shown.shape)


def preview_table(show: Show, inputs: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Show examples as rows of bytes; texts are cut at 512 bytes of UTF-8.

    Returns:
        uint8 [len(inputs), *shape].

    Raises:
        ProjectError: a picture has another size than the first.
    """
    table = np.zeros((len(inputs), *shape), np.uint8)
    for i, x in enumerate(inputs):
        shown = show(x)
        if isinstance(shown, str):
            data = shown.encode(errors="replace")[:TEXT_BYTES].decode(errors="ignore").encode()
            table[i, : len(data)] = np.frombuffer(data, np.uint8)
        elif shown.shape != shape:
            raise ProjectError(
                "pictures differ in size",
                where="show",
                expected=shape,
                got=shown.shape,
                hint="Resize in the dataset or in show=",
            )
        else:
            table[i] = shown
    return table
