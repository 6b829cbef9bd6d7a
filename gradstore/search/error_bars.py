"""Error bars of a search: how far a similarity of projected features may be from the exact kernel's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gradstore.kernels.projection_error import standard_errors
from gradstore.search.phi import Phi
from gradstore.search.topk_result import TopK
from gradstore.store.rows import Rows


def with_error_bars(result: TopK, phis: Sequence[Phi]) -> TopK:
    """The result with the standard error of every similarity, (1 - ρ²) / sqrt(K_eff) for a cosine.

    Reads each query's row and its neighbours' again, m (1 + k) rows, and holds the features of two in float64.

    Args:
        result: of a search.
        phis: the feature map of each query.
    """
    errors = np.empty(result.indices.shape)
    for q, (row, phi) in enumerate(zip(result.rows, phis, strict=True)):
        own = _classes(result.queries, int(row), phi)
        for rank, index in enumerate(result.indices[q]):
            other = _classes(result.train, int(index), phi)
            errors[q, rank] = standard_errors(own[None], other[None], phi.kernel).item()
    return replace(result, standard_error=errors)


def _classes(store: Rows, row: int, phi: Phi) -> Tensor:
    """The features of one row that a similarity is made of: [c, K], or [1, K] where classes are summed."""
    features = torch.from_numpy(store.features[row])
    if phi.weights is None:
        return features
    return (features.double() * torch.tensor(phi.weights, dtype=torch.float64)[:, None]).sum(dim=0, keepdim=True)
