"""Imported by `killed_writer.py`: featurize once, so that forked commands find every lazy import done."""

from __future__ import annotations

import tempfile
from pathlib import Path

import gradstore_cli.commands
import torch
from torch.utils.data import TensorDataset

import gradstore as gs

assert gradstore_cli.main is not None
model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
data = TensorDataset(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64))
with tempfile.TemporaryDirectory() as folder:
    project = gs.Project(model=model, splits={"train": data})
    gs.featurize(project, split="train", out=Path(folder) / "store", proj_dim=64)
