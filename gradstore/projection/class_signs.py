"""Random combinations of classes: the signs of the layout "sketched", which differentiates these, not the classes.

Draw j takes `v_j = Σ_c s_jc g^c` with independent signs s_jc = ±1, by one backward pass. They are the same for every
example and every store of one seed: s_jc is the Rademacher entry (k = j, p = c) of the last stream, 2³¹ - 1, which no
class and no draw is projected with, whatever kind P is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradstore.projection.entries import Entries
from gradstore.projection.rademacher import KIND

STREAM = 2**31 - 1


def class_signs(seed: int, draws: int, classes: int) -> Tensor:
    """Make the signs of all draws.

    Args:
        seed: of the projection.
        draws: r.
        classes: c.

    Returns:
        float32 [r, c] of ±1.
    """
    entries = Entries(KIND.name, seed, STREAM)
    return entries.at(torch.arange(draws)[:, None], torch.arange(classes)).float()
