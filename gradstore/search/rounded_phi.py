"""Φ of a block of rows, rounded: one digit or two for every stretch of K."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gradstore.arithmetic.int8_digits import round_stretches
from gradstore.search.phi import Phi, Scaled


def round_phi(
    phi: Phi, features: Tensor, scaled: Scaled, high: Tensor, low: Tensor | None, found: np.ndarray
) -> np.ndarray:
    """Round Φ · 2^-e of some rows.

    Args:
        phi: the feature map.
        features: as stored, [n, c, K].
        scaled: of the same rows.
        high: int8 [segments, n, K]; overwritten.
        low: the same, for a second digit; None for one digit.
        found: float64 [segments, n, 4]; overwritten with what `Rounded.of` takes.

    Returns:
        ‖Φ‖ / 2^e, float64 [n]. Holds 4·K bytes a row where classes are summed, 4·D where features are int8.
    """
    if phi.weights is None:
        values = features.float() if features.dtype == torch.int8 else features
        round_stretches(values, scaled.factors, high, low, found)
        assert scaled.norms is not None, "known where classes stand side by side"
        return scaled.norms
    vectors = torch.empty(len(features), 1, phi.K)
    for i in range(len(features)):
        phi.write_row(features[i], scaled.factors[i], vectors[i])
    round_stretches(vectors, torch.ones(len(vectors), 1), high, low, found)
    return torch.linalg.vector_norm(vectors[:, 0], dim=1, dtype=torch.float64).numpy()
