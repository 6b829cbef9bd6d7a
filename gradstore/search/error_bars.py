"""Error bars of a search: how far a similarity of projected features may be from the exact kernel's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import UsageError
from gradstore.kernels.feature_map import FeatureMap
from gradstore.kernels.sketched_error import errors_of
from gradstore.search.topk_result import TopK
from gradstore.store.files.encoding import decode
from gradstore.store.rows import Rows


def with_error_bars(result: TopK, phis: Sequence[FeatureMap]) -> TopK:
    """The result with the standard error of every similarity, (1 - ρ²) / sqrt(K_eff) for a cosine.

    Reads each query's row and its neighbours' again, m (1 + k) rows, and holds the features of two in float64.

    Args:
        result: of a search.
        phis: the feature map of each query.

    Returns:
        The same, with `standard_error`.

    Raises:
        UsageError: Φ is fitted, so that it is no sum of projected gradients.
    """
    errors = np.empty(result.indices.shape)
    for q, (row, phi) in enumerate(zip(result.rows, phis, strict=True)):
        if phi.state is not None:
            raise UsageError("no error is known of features that are fitted", where="--error-bars", got=result.kernel)
        own = _classes(result.queries, int(row), phi)
        for rank, index in enumerate(result.indices[q]):
            other = _classes(result.train, int(index), phi)
            errors[q, rank] = errors_of(own[None], other[None], phi.kernel, result.train.identity).item()
    return replace(result, standard_error=errors)


def _classes(store: Rows, row: int, phi: FeatureMap) -> Tensor:
    """The features of one row that a similarity is made of: [c, K], or [1, K] where classes are summed."""
    columns = store.read(row, row + 1)
    features, weights = decode(columns["features"], columns["scale"])[0], phi.weights(columns)
    if weights is None:
        return features
    return (features.double() * torch.from_numpy(weights[0].copy())[:, None]).sum(dim=0, keepdim=True)
