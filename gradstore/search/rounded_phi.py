"""Φ of a block of rows, rounded: one digit or two for every stretch of K."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gradstore.search.phi import Phi, Scaled
from gradstore.search.rounding import Rounded, round_rows


def round_phi(
    phi: Phi, features: Tensor, scaled: Scaled, high: Tensor, low: Tensor | None = None
) -> tuple[list[Rounded], np.ndarray]:
    """Round Φ · 2^-e of some rows.

    Args:
        phi: the feature map.
        features: as stored, [n, c, K].
        scaled: of the same rows.
        high: int8 [segments, n, K]; overwritten.
        low: the same, for a second digit; None for one digit.

    Returns:
        What is known of each segment, and ‖Φ‖ / 2^e, float64 [n]. Holds 4·K bytes a row, unless features are float16 or
        float32 and classes stand side by side.
    """
    if phi.weights is None:
        values = features.float() if features.dtype == torch.int8 else features
        parts = [
            round_rows(values[:, c], scaled.factors[:, c], high[c], None if low is None else low[c])
            for c in range(phi.c)
        ]
        assert scaled.norms is not None, "known where classes stand side by side"
        return parts, scaled.norms
    vectors = torch.empty(len(features), phi.K)
    for i in range(len(features)):
        phi.write_row(features[i], scaled.factors[i], vectors[i : i + 1])
    norms = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64).numpy()
    return [round_rows(vectors, torch.ones(len(vectors)), high[0], None if low is None else low[0])], norms
