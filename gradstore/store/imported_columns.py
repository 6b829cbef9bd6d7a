"""Rows of another tool's features as a store keeps them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from gradstore.errors import NonFiniteError
from gradstore.store.files.encoding import encode


def imported_columns(
    read: Callable[[int, int], np.ndarray], span: slice, labels: np.ndarray, logits: np.ndarray, dtype: str, where: Path
) -> dict[str, np.ndarray]:
    """Read, check and round some rows.

    Args:
        read: (first row, one past the last) -> features [rows, c, K] of any float dtype.
        span: which rows.
        labels: int64 [n], of all rows.
        logits: float32 [n, classes], of all rows.
        dtype: of the stored features.
        where: the source, for errors.

    Returns:
        name of the dataset -> array [rows, ...]. Holds them, and the features in their own dtype and in float32.

    Raises:
        NonFiniteError: a row is NaN, infinite or zero; names it.
    """
    with np.errstate(over="ignore"):  # what becomes infinite is refused below
        values = torch.from_numpy(read(span.start, span.stop).astype(np.float32))
    peak = values.abs().amax(dim=-1)
    bad = torch.nonzero(~(torch.isfinite(peak) & (peak > 0)))
    if len(bad):
        i, c = bad[0].tolist()
        raise NonFiniteError(
            f"the features of row {span.start + i}, class {c} are zero or not finite",
            where=where,
            expected="finite values, not all zero",
            hint="The tool that wrote them failed at this row, or did not finish",
        )
    encoded = encode(values, dtype)
    rows, c = values.shape[:2]
    return {
        "features": encoded.features,
        "scale": encoded.scale,
        "sq_norm": np.full((rows, c), np.nan),
        "logits": logits[span],
        "label": labels[span],
        "row": np.arange(span.start, span.stop, dtype=np.int64),
        "norm": encoded.norm,
    }
