"""Rows of features as a torch Dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from gradstore.store.rows import Rows


class FeatureDataset(Dataset):
    """Rows that are there as (features float32 [c, K], label); picklable, so DataLoader workers may share it."""

    def __init__(self, store: Rows) -> None:
        self.store = store

    def __len__(self) -> int:
        """Rows that are there."""
        return len(self.store.present_at)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        """The i-th of them, its digest checked."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        row = int(self.store.present_at[i])
        return torch.from_numpy(self.store.features[row]), int(self.store.labels[row])
