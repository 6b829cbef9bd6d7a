"""A store as a torch Dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from gradstore.store.rows import Rows


class FeatureDataset(Dataset):
    """Rows as (features float32 [c, K], label); picklable, so DataLoader workers may share it."""

    def __init__(self, store: Rows) -> None:
        self.store = store

    def __len__(self) -> int:
        """Rows that can be read."""
        return len(self.store)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        """One row, its digest checked."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        return torch.from_numpy(self.store.features[row]), int(self.store.labels[row])
